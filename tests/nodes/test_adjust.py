"""Embedding adjustment and the published objectives as nodes of a real ComfyUI; skipped where there is none."""

from __future__ import annotations

import json
from itertools import combinations

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfyui import comfy_server
from tests.nodes.graphs import node, pixels, sampling, training

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

SUBJECT, CLASS = "a photo of a sks star at night", "a photo of a star at night"


def adjusting(**changes) -> dict:
    """A picture (24) by the sandbox with an adjusted conditioning (30)."""
    prompt = {"1": node("AnchorSandboxModel"), **sampling(["1", 0])}
    prompt["23"]["inputs"]["positive"] = ["30", 0]
    prompt["23"]["inputs"]["steps"] = 2
    prompt["20"]["inputs"]["text"] = SUBJECT
    prompt["27"] = node("CLIPTextEncode", clip=["1", 1], text=CLASS)
    how = {"alpha": 0.2, "length": "norm_mix", "norm_mix": 0.5, "beta": 1.5, "pooled": False, "align": "index"}
    inputs = {"subject_conditioning": ["20", 0], "class_conditioning": ["27", 0], **how, **changes}
    return prompt | {"30": node("AnchorAdjustConditioning", **inputs)}


def picture(server, prompt: dict) -> numpy.ndarray:
    return pixels(server.picture(server.run(prompt)["24"]))


def same(one: numpy.ndarray, other: numpy.ndarray) -> bool:
    return numpy.abs(one - other).max() <= 1


def test_a_conditioning_is_adjusted_on_the_canvas(server):
    by_token = {"align": "token", "clip": ["1", 1], "subject_prompt": SUBJECT, "class_prompt": CLASS}
    plain = adjusting()
    plain["23"]["inputs"]["positive"] = ["20", 0]
    own, index, token, beta = (
        picture(server, prompt) for prompt in (plain, adjusting(), adjusting(**by_token), adjusting(length="beta"))
    )
    assert not any(same(*pair) for pair in combinations((own, index, token, beta), 2))
    assert same(picture(server, adjusting(alpha=0.0, norm_mix=0.0)), own)
    of_class = adjusting()
    of_class["23"]["inputs"]["positive"] = ["27", 0]
    assert same(picture(server, adjusting(alpha=1.0, norm_mix=1.0)), picture(server, of_class))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "bigger than max"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"length": "beta", "beta": float("nan")}, "beta is nan"),
        ({"align": "token"}, "clip is not connected"),
        ({"align": "token", "clip": ["1", 1], "subject_prompt": SUBJECT}, "class_prompt is empty"),
    ],
)
def test_wrong_input_is_named(server, changes, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        server.run(adjusting(**changes))


def test_an_embedding_file_is_adjusted_and_read_by_its_word(server):
    folder = server.base / "models/embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    width = json.loads((comfy_server.ROOT / "anchor_core/sandbox/weights/text_encoder/config.json").read_text())[
        "hidden_size"
    ]
    save_file({"emb_params": torch.randn(2, width)}, folder / "pip.safetensors")
    save_file({"emb_params": torch.randn(2, width + 8)}, folder / "other.safetensors")

    def adjust(**changes) -> dict:
        how = {"alpha": 1.0, "length": "beta", "norm_mix": 0.5, "beta": 1.5, "class_word": "star", "name": "new/pip"}
        inputs = {"file": "pip.safetensors", "clip": ["1", 1], **how, **changes}
        return {"1": node("AnchorSandboxModel"), "2": node("AnchorAdjustEmbedding", **inputs)}

    assert server.run(adjust())["2"]["text"] == ["embedding:new/pip_00001_"]
    written = load_file(folder / "new/pip_00001_.safetensors")["emb_params"]
    assert torch.equal(written[0], written[1]) and written.shape == (2, width)

    read = {"1": node("AnchorSandboxModel"), **sampling(["1", 0])}
    read["23"]["inputs"]["steps"] = 2
    read["20"]["inputs"]["text"] = "a photo of a embedding:new/pip_00001_ star"
    without = {**read, "20": node("CLIPTextEncode", clip=["1", 1], text="a photo of a star")}
    assert not same(picture(server, read), picture(server, without))

    before = sorted(folder.rglob("*"))
    for changes, message in (
        ({"file": "other.safetensors"}, "made for another model"),
        ({"file": "nowhere.safetensors"}, "nowhere"),
        ({"class_word": "shooting star"}, "class_word is 'shooting star', which is [0-9]+ tokens"),
        ({"name": "../outside"}, "name is '../outside'"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            server.run(adjust(**changes))
    assert sorted(folder.rglob("*")) == before


def test_the_published_objectives_train_from_nodes(server):
    inputs = server.get("/object_info/AnchorTrainOptions")["AnchorTrainOptions"]["input"]["required"]
    defaults = {name: settings["default"] for name, (_, settings) in inputs.items()}

    def run(objective: str, changes: dict | None = None, **options) -> dict:
        prompt = training(objective=objective, steps=2, preview_every=0, options=["7", 0], **(changes or {}))
        prompt["7"] = node("AnchorTrainOptions", **defaults | options)
        server.run(prompt | {"5": node("PreviewAny", source=["4", 4])})
        file = max((server.base / "output/loras").rglob("*.safetensors"), key=lambda each: each.stat().st_mtime_ns)
        from anchor_core.adapters.file import load_adapter

        return load_adapter(file)[1]

    assert run("sude", sude_weight=0.8, text_encoder=True)["anchor.sude_weight"] == "0.8"
    assert run("anchor", anchor="current", text_encoder=True)["anchor.anchor"] == "current"
    told = run("class_diffusion", text_encoder=True, semantic_weight=0.5, **{"lambda": 0.8})
    assert told["anchor.semantic_weight"] == "0.5" and float(told["anchor.w"]) == pytest.approx(0.25)
    files = sorted((server.base / "output").rglob("*"))
    with pytest.raises(RuntimeError, match="objective is 'class_diffusion'.*set text_encoder"):
        run("class_diffusion", {"seed": 5})
    assert sorted((server.base / "output").rglob("*")) == files
