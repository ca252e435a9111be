"""The guidance rules in a real ComfyUI on the CPU: the engine in one process, the nodes over HTTP."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy
import pytest
import torch
from safetensors.torch import save_file

from anchor_core.guidance import RULES
from tests.comfyui import check_rules, comfy_server
from tests.nodes.test_nodes import base_latents, node, pixels, sampling, server, weights  # noqa: F401 (fixtures)

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

# --- the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("rules")
    output = folder / "results.json"
    comfy_server.run_script(check_rules.__file__, comfy_server.ROOT, output, folder=folder)
    return json.loads(output.read_text())


@pytest.mark.parametrize("family", check_rules.FAMILIES)
def test_a_rows_strength_is_that_of_the_stock_loader(results, family):
    assert not results["check_strengths"][family], results["check_strengths"][family]


@pytest.mark.parametrize("family", check_rules.LIMITS)
def test_limits_of_the_rules(results, family):
    assert not results["check_limits"][family], results["check_limits"][family]


@pytest.mark.parametrize("check", check_rules.ALONE, ids=lambda check: check.removeprefix("check_"))
def test_engine(results, check):
    assert not results["alone"][check], results["alone"][check]


@pytest.mark.parametrize(
    ("case", "message"),
    {
        "no_class": "class_conditioning is not connected",
        "no_early": "early_lora is not connected",
        "nan_strength": "strength is nan",
        "nan_cfg": "cfg is nan",
        "out_of_range": "weak is 1.5",
        "twice": "connect the model from before that node",
        "replaced": "connect that node before the guidance",
        "split": "another node on this model runs the network on 2 rows for 2 predictions of 2 pictures",
        "other_guider": "take CFGGuider, KSampler or AnchorGuider",
        "masked_sd3": "this model, SD3, has none",
        "other_lora": "lora: this LoRA was made for another model",
        "other_early": "early_lora: this LoRA was made for another model",
        "wide_class": "class_conditioning has embeddings of width 32, but this model takes 24",
        "wide_negative": "negative has embeddings of width 32, but this model takes 24",
        "nan_positive": "positive has embeddings with NaN",
        "nan_class": "class_conditioning has embeddings with NaN",
        "sd3_width": "negative has embeddings of width 32, but this model takes 24",
        "sd3_pooled": "negative has a pooled output of width 24, but this model takes 16",
        "sdxl_pooled": "positive has no pooled output",
        "hooked_class": "class_conditioning carries hooks",
        "same_prompt": "class_conditioning is the same prompt as positive",
        "other_clip": "encode both with the same CLIP",
        "row_less": "ln_q.weight of a RMSNorm, which cannot differ from row to row",
    }.items(),
)
def test_what_does_not_fit_is_refused(results, case, message):
    text = results["refused"][case]
    assert message in text and "\n" not in text


# --- the nodes ----------------------------------------------------------------------------------------------------

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


def test_the_guidance_workflow_runs(server):
    workflow = json.loads((comfy_server.ROOT / "workflows/guidance.json").read_text())
    prompt = server.to_api(workflow, server.get("/object_info"))
    for entry in prompt.values():
        short = {"AnchorTrainLoRA": {"steps": 4, "learning_rate": 1e-2}, "KSampler": {"steps": 4}}
        entry["inputs"] |= short.get(entry["class_type"], {})
    (guidance,) = (entry["inputs"] for entry in prompt.values() if entry["class_type"] == "AnchorGuidance")
    assert (guidance["rule"], guidance["rule.weak"]) == ("personalization", 0.5)
    outputs = server.run(prompt)
    saved = [outputs[key] for key, entry in prompt.items() if entry["class_type"] == "SaveImage"]
    plain, guided = (pixels(server.picture(output)) for output in saved)
    assert numpy.abs(plain.astype(int) - guided.astype(int)).max() > 1
