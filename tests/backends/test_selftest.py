"""The self test of training, over ComfyUI's classes: plain weights and paged ones."""

from __future__ import annotations

import pytest

from anchor_core.cli import main
from tests.comfyui import check_selftest, comfy_server

found = comfy_server.find()


@pytest.mark.skipif(isinstance(found, str), reason=str(found))
@pytest.mark.parametrize("options", [(), ("--paged",)], ids=["plain", "paged"])
def test_self_test(tmp_path, options):
    told = comfy_server.results_of(check_selftest, tmp_path, *options)
    assert set(told) == set(check_selftest.CHECKS)
    assert not [text for text in told.values() if text]


def test_without_a_comfyui(tmp_path, capsys):
    assert main(["selftest", "--comfyui", str(tmp_path)]) == 2
    assert "give the folder of a ComfyUI" in capsys.readouterr().err
