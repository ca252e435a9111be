"""Training Self Test in a real ComfyUI."""

from __future__ import annotations

import pytest

from tests.comfyui import comfy_server
from tests.nodes.graphs import node

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


def test_the_embedded_model_passes(server):
    inputs = {"model": ["1", 0], "resolution": 64, "batch_size": 2, "rank": 4, "steps": 1}
    outputs = server.run({"1": node("AnchorSandboxModel"), "9": node("AnchorSelfTest", **inputs)})
    (report,) = outputs["9"]["text"]
    assert "the base model: unchanged" in report and report.endswith("\npassed")
