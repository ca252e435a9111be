"""Fixtures of this room: tiny pipelines to be guided."""

from __future__ import annotations

import pytest

from tests.backends.guided_models import Model


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def model(request, tmp_path_factory):
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return Model("sd1", tmp_path_factory.mktemp("sd1"))
