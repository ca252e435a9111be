"""Gradients of ComfyUI's models in 16 bits, and their families (`check_precision.py`); skipped without a ComfyUI."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anchor_core.families import FAMILIES
from tests.comfyui import comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

CASES = ("sd1 float16 auto", "sd1 float16 fp32", "sdxl float8_e4m3fn auto", "flux bfloat16 auto")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("precision")
    script = comfy_server.ROOT / "tests/comfyui/check_precision.py"
    comfy_server.run_script(script, comfy_server.ROOT, folder, folder=folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_gradients_in_16_bits_are_those_of_fp32(results, case):
    scaled, whole, worst = results[case]
    assert whole >= 0.9995 and worst >= 0.99
    assert scaled == ("bfloat16" not in case)


def test_families(results):
    others = {"sd1": "sd1", "sd2_v": "sd1", "sdxl_v": "sdxl"}  # both UNets are as narrow, and not SD2's 1024 wide
    assert results["families"] == {name: others.get(name, name) for name in results["families"]}
    assert set(results["families"].values()) <= set(FAMILIES)
