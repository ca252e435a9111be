"""The guidance nodes in a real ComfyUI on the CPU; skipped where there is none."""

from __future__ import annotations

from dataclasses import fields

import numpy
import pytest
import torch
from safetensors.torch import save_file

from anchor_core.guidance import RULES
from tests.comfyui import comfy_server
from tests.nodes.graphs import base_latents, node, pixels, sampling

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

LORA, WIDTH = "attention.safetensors", 128


@pytest.fixture(scope="module")
def draw(server):
    """`draw(model, end)`: the picture by a node (6) that makes a MODEL of the embedded one (1), as numbers."""
    generator, layer = torch.Generator().manual_seed(0), "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
    tensors = {
        f"{layer}{name}.{part}.weight": torch.randn(shape, generator=generator)
        for name in ("attn1_to_v", "attn2_to_q", "attn2_to_v")
        for part, shape in (("lora_down", (4, WIDTH)), ("lora_up", (WIDTH, 4)))
    }
    save_file(tensors, server.base / "models/loras" / LORA)

    def draw(model: dict, **nodes: dict) -> numpy.ndarray:
        prompt = {"1": node("AnchorSandboxModel"), "6": model, **sampling(["6", 0]), **nodes}
        prompt["30"] = node("CLIPTextEncode", clip=["1", 1], text="a photo of a star")
        return pixels(server.picture(server.run(prompt)["24"]))

    return draw


def stock(strength: float) -> dict:
    return node("LoraLoaderModelOnly", model=["1", 0], lora_name=LORA, strength_model=strength)


def guidance(rule: str, type_: str = "AnchorGuidance", **inputs) -> dict:
    return node(type_, **{"model": ["1", 0], "strength": 1.0, "file": LORA, "rule": rule} | inputs)


def test_the_model_patch_under_ksampler(server, draw):
    base = base_latents(server, 8999)
    theirs, pretrained = draw(stock(1.0)), draw(stock(0.0))
    assert numpy.abs(draw(guidance("personalization", **{"rule.weak": 1.0})) - theirs).max() <= 1
    weak = draw(guidance("personalization", **{"rule.weak": 0.0}))
    assert all(numpy.abs(weak - each).max() > 1 for each in (theirs, pretrained))
    assert torch.equal(base_latents(server, 8998), base)


def test_every_rule_is_offered_with_its_options(server):
    for name in ("AnchorGuidance", "AnchorGuider"):
        options = server.get(f"/object_info/{name}")[name]["input"]["required"]["rule"][1]["options"]
        assert [each["key"] for each in options] == list(RULES)
        for each in options:
            inputs = each["inputs"]["optional"]
            assert set(inputs) == {field.name for field in fields(RULES[each["key"]])}
            assert all(option["tooltip"] for _, option in inputs.values())


def test_the_guider_makes_the_same_picture(draw):
    for rule in ("autoguidance", "masked"):
        inputs = {"class_conditioning": ["30", 0]}
        guider = guidance(rule, "AnchorGuider", positive=["20", 0], negative=["21", 0], cfg=5.0, **inputs)
        custom = {
            "23": node(
                "SamplerCustomAdvanced",
                noise=["31", 0],
                guider=["32", 0],
                sampler=["33", 0],
                sigmas=["34", 0],
                latent_image=["22", 0],
            ),
            "31": node("RandomNoise", noise_seed=1),
            "32": guider,
            "33": node("KSamplerSelect", sampler_name="euler"),
            "34": node("BasicScheduler", model=["1", 0], scheduler="normal", steps=10, denoise=1.0),
        }
        patched, guided = draw(guidance(rule, **inputs)), draw(stock(1.0), **custom)
        assert patched.std() > 1 and numpy.array_equal(patched, guided), rule


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"rule": "switching"}, "class_conditioning is not connected"),
        ({"rule": "personalization", "rule.weak": 1.5}, "rule.weak"),
        ({"rule": "personalization", "rule.weak": float("nan")}, "weak is nan"),
        ({"rule": "cfg", "rule.start": 0.5, "rule.stop": 0.25}, "start is 0.5"),
        ({"rule": "elsewhere"}, "rule"),
        ({"rule": "cfg", "strength": float("nan")}, "strength is nan"),
        ({"rule": "cfg", "file": "[connected lora]"}, "no LoRA is connected"),
    ],
)
def test_wrong_input_is_named(draw, inputs, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        draw(guidance(**inputs))
