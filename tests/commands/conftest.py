"""Fixtures of this room: pictures to train on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from anchor_core import cli


@pytest.fixture(scope="session")
def pip(tmp_path_factory) -> Path:
    """The folder that `sandbox subject pip` writes."""
    folder = tmp_path_factory.mktemp("pip")
    assert cli.main(["sandbox", "subject", "pip", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def references(pip, tmp_path_factory) -> str:
    """Two pictures of pip; a training's probe takes as long as its pictures are many."""
    folder = tmp_path_factory.mktemp("references") / "two"
    return str(shutil.copytree(pip, folder, ignore=lambda folder, names: sorted(names)[2:]))
