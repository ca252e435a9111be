"""What ComfyUI's backend trains besides LoRAs, in a real ComfyUI (`check_parts.py`); skipped where there is none."""

from __future__ import annotations

import json

import pytest

from anchor_core.sandbox.model import WEIGHTS
from tests.comfyui import comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

CHECKS = ("tokens", "embedding_file", "sdxl", "stock_loader", "untouched", "refusals", "tokenizers")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    script = comfy_server.ROOT / "tests/comfyui/check_parts.py"
    comfy_server.run_script(script, comfy_server.ROOT, WEIGHTS, folder, folder=folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_parts(results, check):
    assert not results[f"check_{check}"], results[f"check_{check}"]
