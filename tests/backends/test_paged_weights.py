"""Training on paged weights (ComfyUI's dynamic VRAM), over the stand-in for its paging library: `paged_vram.py`.

The contract of every family on them is in `test_contract_comfyui.py`.
"""

from __future__ import annotations

import pytest

from tests.comfyui import check_adjust, check_paged, check_room, check_rules, comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


@pytest.mark.parametrize("options", [["--core"], pytest.param([], marks=pytest.mark.long)], ids=["core", "whole"])
def test_trains_as_plain_weights_do(tmp_path, options):
    told = comfy_server.results_of(check_paged, tmp_path, *options)
    assert set(told) == {*check_paged.FAMILIES, "clip"}
    assert not [f"{family}: {text}" for family, checks in told.items() for text in checks.values() if text]


def test_guidance_rules(tmp_path):
    told = comfy_server.results_of(check_rules, tmp_path, "--paged")
    assert told.pop("pinned") == 0
    assert list(told["check_strengths"]) == list(check_rules.PAGED) and list(told["alone"]) == check_rules.ALONE_PAGED
    assert not [f"{case}: {text}" for checks in told.values() for case, text in checks.items() if text]


def test_adjustment_reads_the_rows_of_a_paged_clip(tmp_path):
    told = comfy_server.results_of(check_adjust, tmp_path, "--paged")
    assert told == dict.fromkeys(check_adjust.PAGED, "")


def test_without_paging_weights_make_room_for_a_step(tmp_path):
    assert comfy_server.results_of(check_room, tmp_path) == dict.fromkeys(check_room.FAMILIES, "")
