"""Embedding adjustment of ComfyUI's conditionings, in a process under its interpreter; skipped where there is none."""

from __future__ import annotations

import json

import pytest

from tests.comfyui import check_adjust, comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adjust")
    output = folder / "outcomes.json"
    comfy_server.run_script(check_adjust.__file__, comfy_server.ROOT, output, folder=folder)
    return json.loads(output.read_text())


@pytest.mark.parametrize("check", check_adjust.CHECKS)
def test_conditionings(outcomes, check):
    assert not outcomes[check], outcomes[check]
