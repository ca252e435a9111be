"""Every objective with every trained part in both backends: the same losses, or the same refusal."""

from __future__ import annotations

import json

import pytest

from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from anchor_core.sandbox.model import WEIGHTS
from tests.comfyui import comfy_server, objective_parts

found = comfy_server.find()
needs_comfyui = pytest.mark.skipif(isinstance(found, str), reason=str(found))


@pytest.fixture(scope="module")
def ours() -> DiffusersDenoiser:
    return DiffusersDenoiser.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("objectives")
    script = comfy_server.ROOT / "tests/comfyui/check_objectives.py"
    comfy_server.run_script(script, comfy_server.ROOT, WEIGHTS, folder, folder=folder)
    return json.loads((folder / "results.json").read_text())


def test_the_anchor_is_the_pretrained_models_while_its_text_side_is_trained(ours):
    objective_parts.check_anchor_is_the_pretrained_models(ours)


@needs_comfyui
@pytest.mark.parametrize("case", objective_parts.CASES)
@pytest.mark.parametrize("part", objective_parts.PARTS)
def test_both_backends_make_the_same_steps_or_the_same_refusal(ours, results, part, case):
    settings = objective_parts.CASES[case]
    objective = settings["objective"]
    here, there = objective_parts.trained(ours, part, **settings), results["outcomes"][f"{part}, {case}"]
    if isinstance(here, str):
        assert there == here and here.startswith(f"objective is {objective!r}")
        return
    assert here.keys() == there.keys()
    for term, values in here.items():
        assert values == pytest.approx(there[term], rel=1e-2, abs=2e-6), term
    assert objective != "sude" or any(here["sude"]), "the term is truncated in every row, so nothing is compared"


@needs_comfyui
@pytest.mark.parametrize("check", ["anchor", "preview", "class_count"])
def test_inside_comfyui(results, check):
    assert not results[f"check_{check}"], results[f"check_{check}"]
