"""Fixtures of this room: a tiny pipeline of each architecture."""

from __future__ import annotations

import pytest

from tests.backends import tiny_models
from tests.training.parts import ARCHITECTURES


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return {name: tiny_models.build(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def any_denoiser(request, pipelines):
    denoiser = tiny_models.denoiser_of(pipelines[request.param])
    yield denoiser
    denoiser.detach()  # however the test ended: the next ones share the pipeline
