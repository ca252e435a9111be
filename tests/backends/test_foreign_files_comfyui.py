"""LoRA files of other programs in ComfyUI: Apply Adapter and a denoiser read what ComfyUI's loader reads."""

from __future__ import annotations

import json

import pytest

from tests.comfyui import comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


def test_every_spelling_and_kind_is_read_alike(tmp_path):
    script = comfy_server.ROOT / "tests/comfyui/check_foreign_files.py"
    comfy_server.run_script(script, comfy_server.ROOT, tmp_path, folder=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) > 60 and not {case: told for case, told in results.items() if told}
