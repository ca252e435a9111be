"""Prompts in which every node of the pack stands, and the inputs that it has."""

from __future__ import annotations

from typing import Any

from tests.nodes.graphs import node, sampling, training, with_options


def prompts() -> dict[str, dict]:
    """Prompts that run, by the node (4) whose inputs a test changes; a LoRA is 9, an odd value 50."""
    lora = {"9": node("OddLORA_MODEL", value="tokens")}
    encoded = {
        number: node("CLIPTextEncode", clip=["1", 1], text=text)
        for number, text in (("20", "a photo of a sks star"), ("27", "a photo of a star"))
    }
    length = {"alpha": 0.2, "length": "beta", "norm_mix": 0.5, "beta": 1.5}
    adjusting = {"pooled": False, "align": "index", "subject_conditioning": ["20", 0], "class_conditioning": ["27", 0]}
    measured = {name: training()["4"]["inputs"][name] for name in ("model", "clip", "vae", "images", "concept")}
    measured |= {"lora": ["9", 0], "timesteps": 1, "noises": 1, "seed": 0}
    pictures = {
        "references": ["2", 1], "pictures.system0": ["2", 0], "names": "one", "prompts": "a star", "token": "sks",
        "clip": "sandbox", "dino": "sandbox", "class_word": "star", "encoder_dtype": "fp32", "encoder_batch": 1,
        "folder": "[connected]",
    }  # fmt: skip
    shown = {"5": node("PreviewAny", source=["4", 0])}
    base = {key: value for key, value in training().items() if key != "4"} | lora
    sampled = base | sampling(["4", 0]) | encoded
    sampled["23"]["inputs"]["steps"] = 1
    applied = {"model": ["1", 0], "strength": 1.0, "file": "[connected lora]", "lora": ["9", 0]}
    guided = applied | {"rule": "switching", "class_conditioning": ["27", 0], "early_lora": ["9", 0]}
    file = {"file": "pip.safetensors", "clip": ["1", 1], "class_word": "star", "name": "out"}
    return {
        "train": base | shown | {"4": training(steps=1, preview_every=0)["4"]},
        "drift": base | shown | {"4": node("AnchorDriftReport", **measured)},
        "compare": base | shown | {"4": node("AnchorCompare", **pictures)},
        "apply": sampled | {"4": node("AnchorApplyAdapter", **applied)},
        "save": base | {"4": node("AnchorSaveAdapter", lora=["9", 0], name="saved")},
        "load": shown | {"4": node("AnchorLoadAdapter", file="told.safetensors")},
        "guide": sampled | {"4": node("AnchorGuidance", **guided)},
        "conditioning": base | encoded | shown | {"4": node("AnchorAdjustConditioning", **length, **adjusting)},
        "embedding": base | {"4": node("AnchorAdjustEmbedding", **length, **file)},
    }  # fmt: skip


def all_prompts(server) -> dict[str, dict]:
    """Prompts in which every node of the pack stands once or more; they take a `plain.safetensors`.

    Those with a short name run; one under a node's own is only connected, for want of one that is written here.
    """
    found = prompts() | {"options": with_options(server, {"steps": 1, "preview_every": 0})}
    images = {**training(steps=1, preview_every=0), "5": node("PreviewAny", source=["4", 4])}
    images["6"] = node("AnchorImageReferences", images=["2", 0], size=64, buckets=False)
    images["4"]["inputs"]["references"] = ["6", 0]
    del images["4"]["inputs"]["images"]
    found["images"] = images
    guider = prompts()["guide"]
    for number in ("24", "25", "26"):
        del guider[number]
    guider["4"]["class_type"] = "AnchorGuider"
    guider["4"]["inputs"] |= {"positive": ["20", 0], "negative": ["21", 0], "cfg": 2.0}
    guider["23"] = node(
        "SamplerCustomAdvanced", noise=["30", 0], guider=["4", 0], sampler=["31", 0], sigmas=["32", 0],
        latent_image=["22", 0],
    )  # fmt: skip
    guider["30"] = node("RandomNoise", noise_seed=1)
    guider["31"] = node("KSamplerSelect", sampler_name="euler")
    guider["32"] = node("BasicScheduler", model=["1", 0], scheduler="normal", steps=1, denoise=1.0)
    guider["5"] = node("SaveLatent", samples=["23", 0], filename_prefix="latents/guided")
    found["guider"] = guider
    drawn = {"prompt": "", "count": 1, "size": 64, "seed": 0, "sampling_steps": 1, "guidance": 2.0, "judge": "sandbox"}
    varied = {"sweep": "strength", "values": "0, 1", "preset": "auto", "name": "sweep", "lora": ["9", 0]}
    given = {name: training()["4"]["inputs"][name] for name in ("model", "clip", "vae", "images", "concept")}
    found["sweep"] = {key: value for key, value in training().items() if key != "4"} | {
        "4": node("AnchorSweep", **given, **varied, **drawn), "5": node("PreviewAny", source=["4", 2]),
        "9": node("AnchorLoadAdapter", file="plain.safetensors"),
    }  # fmt: skip
    checked = {name: prompts()["drift"]["4"]["inputs"][name] for name in ("model", "clip", "vae", "lora", "images")}
    checked |= {"subject_prompt": "a photo of a sks star", "class_prompt": "a photo of a star", "name": "checked"}
    checked |= {"budget": 0.7, "timesteps": 1, "noises": 1, "count": 1, "steps": 1, "resolution": 64, "seed": 0}
    found["checkup"] = prompts()["drift"] | {"4": node("AnchorCheckup", **checked)}
    small = {"resolution": 64, "batch_size": 1, "rank": 1, "steps": 1}
    found["selftest"] = {"1": node("AnchorSandboxModel"), "4": node("AnchorSelfTest", model=["1", 0], **small)}
    for prompt in found.values():  # a LoRA that all take
        prompt |= {"9": node("AnchorLoadAdapter", file="plain.safetensors")} if "9" in prompt else {}
    found["load"]["4"]["inputs"]["file"] = "plain.safetensors"
    infos = server.get("/object_info")
    missing = {each for each in infos if each.startswith("Anchor")} - {
        each["class_type"] for prompt in found.values() for each in prompt.values()
    }
    return found | {name: _plain(infos, name) for name in missing}


GIVEN = {
    "MODEL": ["1", 0], "CLIP": ["1", 1], "VAE": ["1", 2], "IMAGE": ["2", 0], "ANCHOR_REFERENCES": ["2", 1],
    "ANCHOR_CONCEPT": ["3", 0], "LORA_MODEL": ["9", 0], "CONDITIONING": ["20", 0],
}  # fmt: skip
"""What `_plain` connects to an input of a type."""


def _plain(infos: dict, type_: str) -> dict[str, dict]:
    """A prompt of a node that none is written for: its required inputs connected, or at their defaults."""
    inputs = {}
    for name, (kind, *more) in infos[type_]["input"].get("required", {}).items():
        choices = kind if isinstance(kind, list) else more[0].get("options", [None])
        inputs[name] = GIVEN.get(str(kind)) or more[0].get("default", choices[0])
    prompt = {key: each for key, each in training().items() if key != "4"} | {"4": node(type_, **inputs)}
    prompt["9"] = node("AnchorLoadAdapter", file="plain.safetensors")
    prompt["20"] = node("CLIPTextEncode", clip=["1", 1], text="a photo of a sks star")
    return prompt | ({} if infos[type_]["output_node"] else {"5": node("PreviewAny", source=["4", 0])})


def declared(infos: dict, type_: str, given: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a node by name, with what /object_info says of each: its type, or the choices, and its options.

    Of a dynamic combo those of the choice in `given`, of an input that grows the ones in `given` and another.
    """
    both = {**infos[type_]["input"].get("required", {}), **infos[type_]["input"].get("optional", {})}
    found = {}
    for name, (kind, *more) in both.items():
        if kind == "COMFY_AUTOGROW_V3":
            parts = more[0]["template"]["input"]
            (told,) = [each for part in parts.values() for each in part.values()]
            numbers = range(1 + sum(each.startswith(f"{name}.") for each in given))
            found |= {f"{name}.{more[0]['template']['prefix']}{number}": told for number in numbers}
            continue
        found[name] = (kind, *more)
        if kind == "COMFY_DYNAMICCOMBO_V3":
            for option in more[0]["options"]:
                if option["key"] == given.get(name):
                    parts = [each for part in option["inputs"].values() for each in part.items()]
                    found |= {f"{name}.{inner}": told for inner, told in parts}
    return found
