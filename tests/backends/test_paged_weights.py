"""Training on paged weights (ComfyUI's dynamic VRAM), over the stand-in for its paging library: `paged_vram.py`."""

from __future__ import annotations

import json

import pytest

from tests.comfyui import check_contract, check_paged, comfy_server, contract

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

CONTRACT = [check.__name__ for check in contract.CHECKS] + [*check_contract.INSIDE, *check_contract.AROUND_PAGED]


def results(script, folder, *chosen: str) -> dict[str, dict[str, str]]:
    output = folder / "results.json"
    comfy_server.run_script(script.__file__, comfy_server.ROOT, output, *chosen, folder=folder)
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    "families", [check_paged.SHORT, pytest.param((), marks=pytest.mark.long)], ids=["short", "every_family_and_kind"]
)
def test_trains_as_plain_weights_do(tmp_path, families):
    told = results(check_paged, tmp_path, *families)
    assert set(told) == set(families or (*check_paged.FAMILIES, "clip"))
    assert not [text for checks in told.values() for text in checks.values() if text]


@pytest.mark.parametrize(
    "families",
    [("flux",), pytest.param(check_contract.FAMILIES, marks=pytest.mark.long)],
    ids=["short", "every_family"],
)
def test_contract(tmp_path, families):
    told = results(check_contract, tmp_path, "--paged", *families)
    assert [list(told[family]) for family in families] == [CONTRACT] * len(families)
    assert not [text for checks in told.values() for text in checks.values() if "Traceback" in text]
