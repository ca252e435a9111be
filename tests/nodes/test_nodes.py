"""The backend and the nodes in a real ComfyUI on the CPU; skipped, with the reason, where there is none."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from anchor_core.sandbox import model as sandbox
from tests.comfyui import comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

NODES = (
    "AnchorSandboxModel AnchorLoadReferences AnchorConcept AnchorTrainLoRA AnchorTrainOptions AnchorDriftReport "
    "AnchorCompare AnchorApplyAdapter AnchorSaveAdapter AnchorLoadAdapter AnchorAdjustConditioning "
    "AnchorAdjustEmbedding AnchorGuidance AnchorGuider"
).split()


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """The shipped model; where the repository holds none, one of its kind at random weights."""
    if (sandbox.WEIGHTS / "model_index.json").is_file():
        return sandbox.WEIGHTS
    from anchor_core.sandbox import tokenizer

    folder = tmp_path_factory.mktemp("weights")
    tokenizer.build(folder / "words", captions=300)
    words = tokenizer.load(folder / "words")
    sandbox.save(sandbox.build(words), words, folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def server(tmp_path_factory, weights):
    base = tmp_path_factory.mktemp("comfyui")
    pack = comfy_server.install_pack(base / "custom_nodes" / comfy_server.PACK)
    if weights != sandbox.WEIGHTS:
        (pack / "anchor_core/sandbox/weights").symlink_to(weights, target_is_directory=True)
    server = comfy_server.ComfyServer(*found, base)
    yield server
    server.stop()


# --- the backend against diffusers --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def both(tmp_path_factory, weights):
    """Inputs, diffusers' results and ComfyUI's results."""
    from anchor_core.adapters.config import AdapterConfig
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
    from anchor_core.concept import Concept
    from anchor_core.training.settings import TrainSettings
    from anchor_core.training.trainer import train

    draw = torch.Generator().manual_seed(0)
    given = {
        "pixels": torch.rand(2, 3, 64, 64, generator=draw),
        "noise": torch.randn(2, 4, 16, 16, generator=draw),
        "timesteps": torch.tensor([37, 801]),
    }
    denoiser, theirs = DiffusersDenoiser.from_pretrained(weights), {}
    concept = Concept("a photo of a sks star", "a photo of a star")
    given["latents"] = theirs["latents"] = denoiser.encode_images(given["pixels"])
    theirs["decoded"] = denoiser.decode_latents(given["latents"])
    theirs["noisy"] = given["noisy"] = denoiser.add_noise(given["latents"], given["noise"], given["timesteps"])
    theirs["target"] = denoiser.target(given["latents"], given["noise"], given["timesteps"])
    theirs["epsilon_scale"] = denoiser.epsilon_scale(given["timesteps"])
    conditions = [denoiser.encode_prompt(prompt) for prompt in (concept.subject_prompt, concept.class_prompt)]
    with torch.no_grad():
        theirs["prediction"] = denoiser.predict(given["noisy"], given["timesteps"], conditions)
    adapter = denoiser.attach(AdapterConfig(rank=4), 0)
    settings = TrainSettings(steps=10, batch_size=2, seed=3)
    theirs["losses"] = torch.tensor(train(denoiser, adapter, given["latents"], concept, settings).losses)

    script, folder = comfy_server.ROOT / "tests/comfyui/parity.py", tmp_path_factory.mktemp("parity")
    inputs, outputs = folder / "inputs.safetensors", folder / "outputs.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, inputs)
    comfy_server.run_script(script, comfy_server.ROOT, weights, inputs, outputs, folder=folder)
    return given, theirs, load_file(outputs)


@pytest.mark.parametrize("name", ["latents", "decoded", "noisy", "target", "epsilon_scale", "prediction"])
def test_both_backends_compute_the_same(both, name):
    _, theirs, ours = both
    torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


def test_both_backends_have_the_same_first_losses(both):
    _, theirs, ours = both
    torch.testing.assert_close(ours["losses"], theirs["losses"], atol=1e-4, rtol=0)
    assert len(ours["losses"]) == 10


def test_adapter_off_is_the_untouched_network(both):
    _, _, ours = both
    assert torch.equal(ours["disabled"], ours["prediction"])
    assert not torch.equal(ours["adapted"], ours["prediction"])


@pytest.mark.parametrize("end", ["finished", "RuntimeError", "InterruptProcessingException"])
def test_the_model_is_untouched_however_a_training_ends(both, end):
    assert both[2][f"untouched.{end}"].item()


def test_a_lora_on_the_model_is_part_of_what_is_trained_on(both):
    _, _, ours = both
    torch.testing.assert_close(ours["patched"], ours["adapted"], atol=1e-5, rtol=0)
    assert torch.equal(ours["again"], ours["prediction"])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_predictions_are_native_for_every_kind_of_model(both, kind):
    torch.testing.assert_close(both[2][f"implied.{kind}"], both[2][f"denoised.{kind}"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [("wrapped", "a function wrapped around it"), ("edm", "samples by ModelSamplingContinuousEDM")],
)
def test_a_model_that_cannot_be_trained_on_is_refused(both, model, message):
    text = bytes(both[2][f"refusal.{model}"].tolist()).decode()
    assert message in text and "\n" not in text


@pytest.mark.parametrize("check", ["adapter", "file_keys", "detach", "slope", "untouched", "stock_loader"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoder_adapters(both, family, check):
    text = bytes(both[2][f"text_encoder.{family}.{check}"].tolist()).decode().strip()
    assert not text, text


# --- the nodes ----------------------------------------------------------------------------------------------------


def node(type_: str, **inputs) -> dict:
    return {"class_type": type_, "inputs": inputs}


def training(**changes) -> dict:
    """Sandbox model (1), references (2), concept (3) and a short training (4)."""
    inputs = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "concept": ["3", 0],
        "objective": "anchor", "w": 0.5, "steps": 4, "learning_rate": 1e-3, "batch_size": 2, "rank": 4,
        "layers": "attention", "seed": 0, "name": "test", "preview_every": 2, "probe_every": 0, "prior_weight": 1.0,
        "class_count": 2,
    }  # fmt: skip
    return {
        "1": node("AnchorSandboxModel"),
        "2": node("AnchorLoadReferences", references="sandbox/pip", size=64),
        "3": node("AnchorConcept", token="sks", class_word="star", template="a photo of a {}"),
        "4": node("AnchorTrainLoRA", **inputs | changes),
    }


def sampling(model, end_at_step: int = 10000) -> dict:
    """A picture (24) and its latents (25) by `model`; each large `end_at_step` is the same, but not cached."""
    return {
        "20": node("CLIPTextEncode", clip=["1", 1], text="a photo of a sks star"),
        "21": node("CLIPTextEncode", clip=["1", 1], text=""),
        "22": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "23": node(
            "KSamplerAdvanced",
            model=model,
            positive=["20", 0],
            negative=["21", 0],
            latent_image=["22", 0],
            add_noise="enable",
            noise_seed=1,
            steps=10,
            cfg=5.0,
            sampler_name="euler",
            scheduler="normal",
            start_at_step=0,
            end_at_step=end_at_step,
            return_with_leftover_noise="disable",
        ),  # fmt: skip
        "24": node("SaveImage", images=["26", 0], filename_prefix="picture"),
        "25": node("SaveLatent", samples=["23", 0], filename_prefix=f"latents/{end_at_step}"),
        "26": node("VAEDecode", samples=["23", 0], vae=["1", 2]),
    }


def pixels(png: bytes) -> numpy.ndarray:
    return numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def loras(server) -> list[Path]:
    return sorted((server.base / "output/loras").rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)


def base_latents(server, end_at_step: int) -> torch.Tensor:
    """What the untouched model on the canvas samples."""
    prompt = {"1": node("AnchorSandboxModel"), **sampling(["1", 0], end_at_step)}
    server.run(prompt)
    (file,) = (server.base / "output/latents").glob(f"{end_at_step}_*.latent")
    return load_file(file)["latent_tensor"]


def test_every_node_is_there_and_explains_itself(server):
    assert "IMPORT FAILED" not in server.log.read_text()
    for name in NODES:
        info = server.get(f"/object_info/{name}")[name]
        assert info["category"] == "anchor" and info["description"]
        for section in ("required", "optional"):
            for key, (_, options) in info["input"].get(section, {}).items():
                assert options.get("tooltip"), f"{name}.{key}"
        assert all(info["output_tooltips"]), name


def test_empty_latent_fits_the_picture_size(server):
    output = server.run({"1": node("AnchorSandboxModel"), **sampling(["1", 0], 9000)})
    assert pixels(server.picture(output["24"])).shape == (64, 64, 3)


def test_base_picture_is_the_same_after_a_training_a_cancelled_and_a_failed_one(server):
    before = base_latents(server, 9999)
    server.run({**training(seed=7), "5": node("PreviewAny", source=["4", 4])})
    assert torch.equal(base_latents(server, 9998), before)

    files, log = loras(server), len(server.log.read_text())
    prompt = server.queue({**training(seed=8, steps=100000), "5": node("PreviewAny", source=["4", 4])})
    while "step 1 of 100000" not in server.log.read_text()[log:]:
        assert server.failure(server.get(f"/history/{prompt}").get(prompt, EMPTY)) is None
        time.sleep(0.2)
    server.post("/interrupt", {})
    assert server.failure(server.wait(prompt)) == "interrupted"
    assert torch.equal(base_latents(server, 9997), before)
    (kept,) = set(loras(server)) - set(files)  # a cancelled training keeps what it has learnt
    assert any(tensor.any() for name, tensor in load_file(kept).items() if "lora_up" in name)

    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    huge = {
        f"{layer}.lora_down.weight": torch.full((4, 128), 1e30),
        f"{layer}.lora_up.weight": torch.full((128, 4), 1e30),
    }
    save_file(huge, server.base / "models/loras/huge.safetensors")
    failing = {**training(seed=9, model=["9", 0]), "5": node("PreviewAny", source=["4", 4])}
    failing["9"] = node("AnchorApplyAdapter", model=["1", 0], strength=1.0, file="huge.safetensors")
    with pytest.raises(RuntimeError, match="became nan at step 1 of 4"):
        server.run(failing)
    assert torch.equal(base_latents(server, 9996), before)
    assert server.log.read_text().count("model_type ") == 1  # one model all the time


EMPTY = {"status": {"messages": []}}


def test_apply_adapter_is_the_stock_lora_loader(server):
    adapt = {"6": node("AnchorApplyAdapter", model=["1", 0], strength=1.0, file="[connected lora]", lora=["4", 1])}
    prompt = training(learning_rate=1e-2, name="compare")
    ours = server.run({**prompt, **adapt, **sampling(["6", 0])})["24"]
    name = loras(server)[-1].relative_to(server.base / "output/loras").as_posix()
    assert name.startswith("compare")
    stock = node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name=name, strength_model=1.0, strength_clip=1.0)
    theirs = server.run({"1": node("AnchorSandboxModel"), "6": stock, **sampling(["6", 0])})["24"]
    from_file = node("AnchorApplyAdapter", model=["1", 0], strength=1.0, file=name)
    ours_from_file = server.run({"1": node("AnchorSandboxModel"), "6": from_file, **sampling(["6", 0])})["24"]
    plain = server.run({"1": node("AnchorSandboxModel"), **sampling(["1", 0])})["24"]
    ours, ours_from_file, theirs, plain = (pixels(server.picture(p)) for p in (ours, ours_from_file, theirs, plain))
    assert numpy.abs(ours - theirs).max() <= 1
    assert numpy.abs(ours_from_file - theirs).max() <= 1
    assert numpy.abs(plain - theirs).max() > 1


def test_stock_nodes_take_the_trained_adapter(server):
    outputs = server.run(
        {
            **training(objective="prior_preservation", probe_every=2),
            "5": node("LossGraphNode", loss=["4", 2], filename_prefix="loss"),
            "6": node("SaveLoRA", lora=["4", 1], prefix="loras/stock"),
            "7": node("LoraModelLoader", model=["1", 0], lora=["4", 1], strength_model=1.0, bypass=False),
            **sampling(["7", 0]),
        }
    )
    assert outputs["5"]["images"] and outputs["24"]["images"]
    assert load_file(next(file for file in loras(server) if file.name.startswith("stock")))


def test_saved_adapter_comes_back_with_its_prompts(server):
    server.run({**training(), "5": node("AnchorSaveAdapter", lora=["4", 1], name="folder/kept")})
    load = {"1": node("AnchorLoadAdapter", file="folder/kept_00001_.safetensors")}
    shown = {str(i + 2): node("PreviewAny", source=["1", i]) for i in (1, 2, 3, 4)}
    outputs = server.run(load | shown)
    assert outputs["3"]["text"] == ["a photo of a sks star"]
    assert outputs["4"]["text"] == ["a photo of a star"]
    assert "anchor.w: 0.5" in outputs["5"]["text"][0]
    assert outputs["6"]["text"] == ["5.0"]  # the guidance


@pytest.fixture
def wrong_inputs(server):
    """Folders and files that no training can use."""
    (server.base / "input/empty").mkdir(exist_ok=True)
    (server.base / "input/broken").mkdir(exist_ok=True)
    (server.base / "input/broken/bad.png").write_bytes(b"no picture")
    (server.base / "output/loras").mkdir(exist_ok=True)
    (server.base / "output/loras/blocked").write_text("a file, where a folder is needed")
    names = [f"lora_unet_down_blocks_1_attentions_0_proj_in.{part}.weight" for part in ("lora_down", "lora_up")]
    shapes = ((4, 999), (999, 4))
    save_file(
        {n: torch.ones(s) for n, s in zip(names, shapes, strict=True)}, server.base / "models/loras/large.safetensors"
    )
    save_file({"elsewhere.lora_down.weight": torch.ones(4, 9)}, server.base / "models/loras/other.safetensors")
    (server.base / "models/loras/text.safetensors").write_text("no tensors")


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("2", {"references": "empty"}, "holds no picture"),
        ("2", {"references": "broken"}, "bad.png cannot be read"),
        ("2", {"references": "nowhere"}, "nowhere"),
        ("3", {"class_word": " "}, "class_word is ' '"),
        ("3", {"token": ""}, "token is ''"),
        ("3", {"template": "a photo"}, "template is 'a photo'"),
        ("4", {"w": float("nan")}, "w is nan"),
        ("4", {"w": -1.0}, "smaller than min"),
        ("4", {"w": "much"}, "much"),
        ("4", {"steps": 0}, "smaller than min"),
        ("4", {"steps": "many"}, "many"),
        ("4", {"learning_rate": 0.0}, "learning_rate is 0.0"),
        ("4", {"learning_rate": float("nan")}, "learning_rate is nan"),
        ("4", {"objective": "best"}, "best"),
        ("4", {"name": "../outside"}, "name is '../outside'"),
        ("4", {"name": " "}, "name is ' '"),
        ("4", {"name": "blocked/lora"}, "cannot be written"),
        ("6", {"file": "other.safetensors"}, "made for another model"),
        ("6", {"file": "large.safetensors"}, "made for another model"),
        ("6", {"file": "text.safetensors"}, "not a readable safetensors file"),
        ("6", {"file": "[connected lora]"}, "no LoRA is connected"),
    ],
)
def test_wrong_input_is_one_clear_line_and_writes_nothing(server, wrong_inputs, target, changes, message):
    if target == "6":
        prompt = {"1": node("AnchorSandboxModel"), "6": node("AnchorApplyAdapter", model=["1", 0], strength=1.0)}
        prompt |= sampling(["6", 0])
    else:
        prompt = {**training(seed=99), "5": node("PreviewAny", source=["4", 4])}
    prompt[target]["inputs"] |= changes
    before = loras(server)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        server.run(prompt)
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert loras(server) == before and not list((server.base / "output").rglob("*.part"))


def test_quickstart_runs(server):
    workflow = json.loads((comfy_server.ROOT / "workflows/quickstart.json").read_text())
    prompt = server.to_api(workflow, server.get("/object_info"))
    (train,) = (entry for entry in prompt.values() if entry["class_type"] == "AnchorTrainLoRA")
    train["inputs"] |= {"steps": 6, "preview_every": 3, "probe_every": 3}  # the whole length is the demo's matter
    outputs = server.run(prompt)
    kinds = {prompt[key]["class_type"] for key in outputs}
    assert {"PreviewImage", "SaveImage", "PreviewAny"} <= kinds
    pictures = [server.picture(outputs[k]) for k, entry in prompt.items() if entry["class_type"] == "SaveImage"]
    assert all(pixels(picture).shape == (64, 64, 3) for picture in pictures)


# --- training options ---------------------------------------------------------------------------------------------


def with_options(server, changes: dict, **options) -> dict:
    """`training(**changes)` with Train Options (7), whose other inputs are at their defaults."""
    inputs = server.get("/object_info/AnchorTrainOptions")["AnchorTrainOptions"]["input"]["required"]
    defaults = {name: settings["default"] for name, (_, settings) in inputs.items()}
    prompt = training(**changes, options=["7", 0]) | {"7": node("AnchorTrainOptions", **defaults | options)}
    return prompt | {"5": node("PreviewAny", source=["4", 4])}


def newest_lora(server) -> tuple[dict, dict, Path]:
    from anchor_core.adapters.file import load_adapter

    return (*load_adapter(loras(server)[-1]), loras(server)[-1])


def test_options_reach_the_training_and_the_file(server):
    given = {"kind": "lokr", "schedule": "cosine", "warmup": 1, "ema": 0.9, "timestep_sampling": "logit_normal"}
    given |= {"gradient_checkpointing": True, "flip": True, "caption_dropout": 0.2, "layer_pattern": "attn2"}
    server.run(with_options(server, {"name": "options"}, **given))
    tensors, metadata, file = newest_lora(server)
    assert file.name == "options_00001_.safetensors"
    assert all("attn2" in key for key in tensors) and any("lokr" in key for key in tensors)
    for name in ("kind", "schedule", "warmup", "ema", "timestep_sampling", "gradient_checkpointing"):
        assert metadata[f"anchor.{name}"] == str(given[name])


def test_token_vectors_are_written_where_prompts_find_them(server):
    tokens = {"vectors": 2, "initial": "star", "token_learning_rate": 0.1}
    for name, options in (
        ("word", {"kind": "none"}),
        ("custom", {"kind": "full", "layer_pattern": "attn2", "detach_start": False}),
    ):
        prompt = with_options(server, {"name": name, "probe_every": 2}, **tokens | options)
        prompt |= {"8": node("PreviewAny", source=["4", 6]), "9": node("PreviewAny", source=["4", 4])}
        outputs = server.run(prompt)
        (said,) = outputs["8"]["text"]
        assert said == f"embedding:{name}_00001_"
        file = server.base / "models/embeddings" / f"{name}_00001_.safetensors"
        assert {key: len(tensor) for key, tensor in load_file(file).items()} == {"emb_params": 2}
        assert outputs["9"]["text"] == [str(file)] or name == "custom"
        drawn = []
        for text in (f"a photo of a {said} star", "a photo of a sks star"):
            picture = {"1": node("AnchorSandboxModel"), **sampling(["1", 0])}
            picture["20"]["inputs"]["text"] = text
            drawn.append(pixels(server.picture(server.run(picture)["24"])))
        assert numpy.abs(drawn[0] - drawn[1]).max() > 1
    assert newest_lora(server)[2].name == "custom_00001_.safetensors"
    # Its two files make the same network as the training's own LoRA.
    measured = {name: prompt["4"]["inputs"][name] for name in ("model", "clip", "vae", "images", "concept")}
    measured |= {"timesteps": 2, "noises": 1, "seed": 0}
    file = "custom_00001_.safetensors"
    loaded = prompt | {"10": node("AnchorLoadAdapter", file=file, embedding=file)}
    for number, lora in (("11", ["4", 1]), ("12", ["10", 0])):
        loaded[number] = node("AnchorDriftReport", lora=lora, **measured)
        loaded[f"{number}1"] = node("PreviewAny", source=[number, 1])
    outputs = server.run(loaded)
    assert outputs["111"]["text"] == outputs["121"]["text"]
    loaded["10"]["inputs"]["embedding"] = "[none]"
    with pytest.raises(RuntimeError, match="trained together with vectors of 'sks', but no embedding"):
        server.run(loaded)
    with pytest.raises(RuntimeError, match="semantic-anchor train --kind full"):
        server.run(with_options(server, {}, kind="full", layer_pattern="."))
    with pytest.raises(RuntimeError, match="token is 'zwx', but the subject prompt"):
        server.run(with_options(server, {}, kind="none", vectors=1, token="zwx"))


def test_a_training_is_resumed_from_its_checkpoints(server):
    server.run(with_options(server, {"name": "whole", "steps": 5}))
    whole = newest_lora(server)[0]
    server.run(with_options(server, {"name": "parts", "steps": 3}, checkpoint_every=1))
    (folder,) = (server.base / "output/anchor_checkpoints").glob("parts_*")
    server.run(with_options(server, {"name": "parts", "steps": 5}, checkpoint_every=1, resume=folder.name))
    resumed, _, file = newest_lora(server)
    assert file.name == "parts_00002_.safetensors"
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_references_carry_captions_masks_and_their_shapes(server):
    folder = server.base / "input/shapes"
    folder.mkdir(exist_ok=True)
    for number, size in enumerate([(128, 128), (64, 192)]):
        picture = Image.radial_gradient("L").resize(size).convert("RGB")
        picture.putalpha(Image.linear_gradient("L").resize(size))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a sks star at night")
    prompt = training(name="shapes")
    prompt["2"]["inputs"] |= {"references": "shapes", "size": 128, "buckets": True, "captions": True, "masks": True}
    inputs = prompt["4"]["inputs"]
    inputs["references"] = ["2", 1]
    both = {**prompt, "5": node("PreviewAny", source=["4", 4])}
    with pytest.raises(RuntimeError, match="images and references are both or neither connected"):
        server.run(both)
    del inputs["images"]
    server.run({**prompt, "5": node("PreviewAny", source=["4", 4])})
    assert newest_lora(server)[2].name == "shapes_00001_.safetensors"


def test_a_diverging_training_says_where_the_lora_before_it_is(server):
    with pytest.raises(RuntimeError, match="at step [0-9]+ of 40.*the LoRA of the [0-9]+ steps before is in") as caught:
        server.run(with_options(server, {"name": "diverged", "steps": 40, "learning_rate": 1.0}, grad_clip=0.0,
                                precision="fp16"))  # fmt: skip
    assert "\n" not in str(caught.value)
    tensors, metadata, file = newest_lora(server)
    assert file.name in str(caught.value)
    assert all(torch.isfinite(value).all() for value in tensors.values())
