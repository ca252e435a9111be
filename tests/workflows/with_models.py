"""The workflows that train on models of one's own, with what they need to download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anchor_core.training.presets import PRESETS
from tests.workflows.graph import Graph, Out
from tests.workflows.parts import PICKED, drawn, pictures, prompt, star

HUB = "https://huggingface.co"
ON_TRAINING = ("preset", "w", "run")


def model_file(name: str, repository: str, directory: str, path: str = "") -> dict[str, str]:
    return {"name": name, "url": f"{HUB}/{repository}/resolve/main/{path}{name}", "directory": directory}


def checkpoint(name: str, repository: str) -> Callable[[Graph], list[Out]]:
    return lambda g: g.add(
        "CheckpointLoaderSimple", ckpt_name=name, models=[model_file(name, repository, "checkpoints")]
    )


def flux(g: Graph) -> tuple[Out, Out, Out]:
    unet, encoders = "flux1-dev.safetensors", ("clip_l.safetensors", "t5xxl_fp16.safetensors")
    model = g.add(
        "UNETLoader", unet_name=unet, weight_dtype="fp8_e4m3fn",
        models=[model_file(unet, "Comfy-Org/flux1-dev", "diffusion_models")],
    )  # fmt: skip
    clip = g.add(
        "DualCLIPLoader", clip_name1=encoders[0], clip_name2=encoders[1], type="flux",
        models=[model_file(each, "comfyanonymous/flux_text_encoders", "text_encoders") for each in encoders],
    )  # fmt: skip
    vae = model_file("ae.safetensors", "Comfy-Org/Lumina_Image_2.0_Repackaged", "vae", "split_files/vae/")
    return model[0], clip[0], g.add("VAELoader", vae_name="ae.safetensors", models=[vae])[0]


def z_image(g: Graph) -> tuple[Out, Out, Out]:
    unet, encoder, split = "z_image_bf16.safetensors", "qwen_3_4b.safetensors", "split_files/"
    base, turbo = "Comfy-Org/z_image", "Comfy-Org/z_image_turbo"
    model = g.add(
        "UNETLoader", unet_name=unet, weight_dtype="default",
        models=[model_file(unet, base, "diffusion_models", f"{split}diffusion_models/")],
    )  # fmt: skip
    clip = g.add(
        "CLIPLoader", clip_name=encoder, type="lumina2",
        models=[model_file(encoder, turbo, "text_encoders", f"{split}text_encoders/")],
    )  # fmt: skip
    vae = model_file("ae.safetensors", turbo, "vae", f"{split}vae/")
    return model[0], clip[0], g.add("VAELoader", vae_name="ae.safetensors", models=[vae])[0]


ON_THE_NODE = ("learning_rate", "batch_size", "rank", "layers")
MEMORY = (
    "**Memory**: what a step takes is estimated before the first one, and what saves memory switched on where it does "
    "not fit. Still too much? A smaller `size`."
)


def subject(load, family: str, latent: str, how: dict[str, Any]) -> Callable[[Graph], None]:
    """Training on a model of one's own by the preset of its family, for five pictures. `how`: of the sampler."""
    preset = dict(PRESETS[family].options)
    size = preset.pop("resolution")
    given = {name: preset.pop(name) for name in ON_THE_NODE}
    given |= {"steps": 500, "preview_every": 100, "preset": "subject"}

    def write(g: Graph) -> None:
        g.note(
            "# Train a subject\n\n1. Drop 4 to 6 pictures of **one** subject on *Pictures of the subject*: sharp, "
            "several surroundings, nothing else of its kind in them. The frame on each is what the training sees; with "
            "**Mask** you paint what is learnt.\n"
            "2. Write what it is as `class_word`: dog, backpack, person.\n"
            "3. Press **Run**. The LoRA lies in `output/loras` under `name` when it ends; a cancelled training keeps "
            "what it has learnt.\n\n**preset**: *subject* takes what suits the model, and 100 steps for each picture; "
            "*quick try* a quarter; *low memory* where it does not fit; *manual* what the node says. **w**: 0.5 to "
            "begin with; more if the surroundings of your pictures come along, less if the subject is not met.\n\n"
            f"{MEMORY}",
            380,
        )
        model, clip, vae = load(g)[:3]
        concept = star(g, class_word="dog")
        loaded = pictures(g, size=size, buckets=True, **PICKED)  # last of its column: it grows with the pictures
        g.column(380)
        more = g.add("AnchorTrainOptions", "More settings")
        g.column(380)
        trained = g.add(
            "AnchorTrainLoRA", model=model, clip=clip, vae=vae, references=loaded[1], concept=concept[0],
            options=more[0], name="subject", **given,
        )  # fmt: skip
        g.column()
        text = g.add(
            "PrimitiveStringMultiline", "The prompt, with the subject's word", value="a photo of a sks dog in the snow"
        )
        positive = prompt(g, trained[5], text[0], "The prompt")
        negative = prompt(g, clip, "", "Nothing")
        if "guidance" in how:
            positive = g.add("FluxGuidance", conditioning=positive, guidance=how["guidance"])[0]
        latents = g.add(latent, "How many pictures", width=size, height=size, batch_size=1)[0]
        rows = [("Before", model, positive), ("After", trained[0], positive)]
        if "guidance" not in how:
            guided = g.add("AnchorGuidance", model=model, lora=trained[1], rule="personalization")[0]
            rows.append(("After, with guidance", guided, positive))
        sampler = {name: value for name, value in how.items() if name != "guidance"}
        results = drawn(g, rows, negative, latents, vae, "subject", **sampler)
        shown = [(loaded, "pictures"), (concept, "class_word"), (text, "value")]
        g.app(*shown, *((trained, name) for name in ON_TRAINING), outputs=[node for _, node in results])

    return write


def as_an_app(g: Graph) -> None:
    g.note(
        "# Train a subject, as a form\n\nSwitch to **app mode** to see the form alone. Drop 4 to 6 pictures of one "
        "subject, say what it is, press **Run**.",
        200,
    )
    model, clip, vae = checkpoint(*SD15)(g)
    concept = star(g, class_word="dog")
    loaded = pictures(g, size=512, buckets=True, **PICKED)
    g.column(380)
    settings = {name: PRESETS["sd1"].options[name] for name in ON_THE_NODE} | {"steps": 400, "preview_every": 50}
    settings["preset"] = "subject"
    trained = g.add(
        "AnchorTrainLoRA", model=model, clip=clip, vae=vae, references=loaded[1], concept=concept[0],
        name="subject", **settings,
    )  # fmt: skip
    g.column()
    text = g.add(
        "PrimitiveStringMultiline", "The prompt, with the subject's word", value="a photo of a sks dog in the snow"
    )
    positive, negative = prompt(g, clip, text[0], "The prompt"), prompt(g, clip, "", "Nothing")
    latents = g.add("EmptyLatentImage", "How many pictures", width=512, height=512, batch_size=2)[0]
    guided = g.add("AnchorGuidance", model=model, lora=trained[1], rule="personalization")[0]
    how = {"sampler_name": "euler", "scheduler": "normal", "steps": 25, "cfg": 7.0}
    results = drawn(g, [("Your subject", guided, positive)], negative, latents, vae, "subject", **how)
    shown = [(loaded, "pictures"), (concept, "class_word"), (text, "value")]
    g.app(*shown, *((trained, name) for name in ON_TRAINING), outputs=[node for _, node in results])


SD15 = ("v1-5-pruned-emaonly-fp16.safetensors", "Comfy-Org/stable-diffusion-v1-5-archive")
SDXL = ("sd_xl_base_1.0.safetensors", "stabilityai/stable-diffusion-xl-base-1.0")
SD35 = ("sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors", "Comfy-Org/stable-diffusion-3.5-fp8")
EULER = {"sampler_name": "euler"}


WORKFLOWS = {
    "Train a subject (SD 1.5)": subject(
        checkpoint(*SD15), "sd1", "EmptyLatentImage", EULER | {"scheduler": "normal", "steps": 25, "cfg": 7.0}
    ),
    "Train a subject (SDXL)": subject(
        checkpoint(*SDXL), "sdxl", "EmptyLatentImage", EULER | {"scheduler": "normal", "steps": 25, "cfg": 6.0}
    ),
    "Train a subject (SD 3.5)": subject(
        checkpoint(*SD35), "sd3", "EmptySD3LatentImage", EULER | {"scheduler": "sgm_uniform", "steps": 28, "cfg": 4.5}
    ),
    "Train a subject (Flux)": subject(
        flux, "flux", "EmptySD3LatentImage",
        EULER | {"scheduler": "simple", "steps": 20, "cfg": 1.0, "guidance": 3.5},
    ),
    "Train a subject (Z-Image)": subject(
        z_image, "z_image", "EmptySD3LatentImage",
        {"sampler_name": "res_multistep", "scheduler": "simple", "steps": 25, "cfg": 4.0},
    ),
    "Train a subject as an app (SD 1.5)": as_an_app,
}  # fmt: skip
