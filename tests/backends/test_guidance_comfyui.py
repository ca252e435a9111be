"""The guidance rules in ComfyUI's own sampling, in one process under its interpreter; skipped where there is none."""

from __future__ import annotations

import pytest

from tests.comfyui import check_rules, comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, str]]:
    return comfy_server.results_of(check_rules, tmp_path_factory.mktemp("rules"))


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
