"""The training node in a real ComfyUI: its options, files and checkpoints, and the model as it was before."""

from __future__ import annotations

import time

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.comfyui import comfy_server
from tests.nodes.graphs import base_latents, loras, newest_lora, node, pixels, sampling, training, with_options

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


def test_base_picture_is_the_same_after_a_training_a_cancelled_and_a_failed_one(server):
    before = base_latents(server, 9999)
    loaded = server.log.read_text().count("model_type ")
    server.run({**training(seed=7), "5": node("PreviewAny", source=["4", 4])})
    assert torch.equal(base_latents(server, 9998), before)

    files, log = loras(server), len(server.log.read_text())
    prompt = server.queue({**training(seed=8, steps=100000), "5": node("PreviewAny", source=["4", 4])})
    while "step 1 of 100000" not in server.log.read_text()[log:]:
        assert comfy_server.failure(server.get(f"/history/{prompt}").get(prompt, EMPTY)) is None
        time.sleep(0.2)
    server.post("/interrupt", {})
    assert comfy_server.failure(server.wait(prompt)) == "interrupted"
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
    assert server.log.read_text().count("model_type ") == loaded  # one model all the time


EMPTY = {"status": {"messages": []}}


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
