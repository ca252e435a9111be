"""The contract of every denoiser, and ComfyUI's own promises, over ComfyUI's classes of each family of models.

All of it runs in one process under ComfyUI's interpreter (`check_contract.py`); skipped where there is no ComfyUI.
"""

from __future__ import annotations

import json

import pytest

from tests.comfyui import check_contract, comfy_server, contract

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

CHECKS = [check.__name__ for check in contract.CHECKS] + [*check_contract.INSIDE, *check_contract.AROUND]


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("contract")
    output = folder / "results.json"
    comfy_server.run_script(check_contract.__file__, comfy_server.ROOT, output, folder=folder)
    return json.loads(output.read_text())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.removeprefix("check_"))
@pytest.mark.parametrize("family", check_contract.FAMILIES)
def test_contract(results, family, check):
    assert not results[family][check], results[family][check]


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
