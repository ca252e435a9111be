"""The contract of every denoiser, over diffusers' own classes of each architecture."""

from __future__ import annotations

import pytest

from anchor_core.backends.diffusers import DiffusersDenoiser
from tests import contract, tiny_models

ARCHITECTURES = tuple(tiny_models.BUILDERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in ARCHITECTURES:
        made[name] = tmp_path_factory.mktemp(name) / "model"
        tiny_models.build(name, tmp_path_factory.mktemp("parts")).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module", params=ARCHITECTURES)
def opened(request, folders):
    """One denoiser for all checks: each leaves it as it found it, as the last one asserts."""
    return request.param, DiffusersDenoiser.from_pretrained(folders[request.param])


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(opened, check):
    check(opened[1], tiny_models.LATENT)
