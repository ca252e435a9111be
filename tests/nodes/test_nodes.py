"""Every node in a real ComfyUI on the CPU; skipped, with the reason, where there is none."""

from __future__ import annotations

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfyui import comfy_server
from tests.nodes.graphs import loras, node, pixels, sampling, training

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

NODES = (
    "AnchorSandboxModel AnchorLoadReferences AnchorConcept AnchorTrainLoRA AnchorTrainOptions AnchorDriftReport "
    "AnchorCheckup AnchorCompare AnchorApplyAdapter AnchorSaveAdapter AnchorLoadAdapter AnchorAdjustConditioning "
    "AnchorAdjustEmbedding AnchorGuidance AnchorGuider AnchorSelfTest AnchorSweep"
).split()


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
    elsewhere = {"elsewhere.lora_down.weight": torch.ones(4, 9), "elsewhere.lora_up.weight": torch.ones(9, 4)}
    save_file(elsewhere, server.base / "models/loras/other.safetensors")
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
