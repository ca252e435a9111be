"""The contract of every denoiser, and ComfyUI's own promises, over ComfyUI's classes of each family of models.

All of it runs under ComfyUI's interpreter (`check_contract.py`), on weights in pages, which is what ComfyUI does on an
NVIDIA card, and on plain ones; skipped where there is no ComfyUI.
"""

from __future__ import annotations

import pytest

from tests.comfyui import check_contract, comfy_server, contract

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

WHOLE = [*(check.__name__ for check in contract.CHECKS), *check_contract.INSIDE]
BOTH = ("sdxl", "flux")
"""Families whose whole contract the fast suite sees on plain weights too; it sees every family's on paged ones."""


def short(check: str) -> str:
    return check.removeprefix("check_")


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, dict[str, str]]:
    return comfy_server.results_of(check_contract, tmp_path_factory.mktemp("contract"), *BOTH)


@pytest.fixture(scope="session")
def paged(tmp_path_factory) -> dict[str, dict[str, str]]:
    return comfy_server.results_of(check_contract, tmp_path_factory.mktemp("paged"), "--paged")


@pytest.mark.parametrize("check", [*WHOLE, *check_contract.AROUND_PAGED], ids=short)
@pytest.mark.parametrize("family", check_contract.FAMILIES)
def test_on_paged_weights(paged, family, check):
    assert not paged[family][check], paged[family][check]


@pytest.mark.parametrize("check", check_contract.AROUND, ids=short)
@pytest.mark.parametrize("family", check_contract.FAMILIES)
def test_around_plain_weights(results, family, check):
    assert not results[family][check], results[family][check]


@pytest.mark.parametrize("check", WHOLE, ids=short)
@pytest.mark.parametrize("family", BOTH)
def test_on_plain_weights(results, family, check):
    assert not results[family][check], results[family][check]


@pytest.mark.long
def test_on_plain_weights_of_every_family(tmp_path):
    told = comfy_server.results_of(check_contract, tmp_path)
    del told["refused"]
    assert {family: set(checks) for family, checks in told.items()} == dict.fromkeys(
        check_contract.FAMILIES, {*WHOLE, *check_contract.AROUND}
    )
    assert not [f"{family}: {text}" for family, checks in told.items() for text in checks.values() if text]


@pytest.mark.parametrize(
    ("kind", "message"),
    {
        "fp8_matrix_mult": "load it with weight_dtype fp8_e4m3fn",
        "quantised": "connect a model in 32 or 16 bit, or in fp8",
        "integers": "is quantised (torch.int8)",
        "packed_latents": "connect another model",
        "text_encoder": "text encoder is no CLIP",
        **{f"{kind}_of_another_model": "made for another model" for kind in check_contract.OTHERS},
    }.items(),
)
def test_what_cannot_be_trained_on_is_refused(results, kind, message):
    text = results["refused"][kind]
    assert message in text and "\n" not in text
