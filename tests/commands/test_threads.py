"""Processes share the cores: how the command line's threads wait, as OpenMP itself tells it when torch loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="only GNU's OpenMP, of torch for Linux, tells its spin count")
@pytest.mark.parametrize(
    "module, given, spins",
    [
        ("anchor_core.cli", {}, 1000),
        ("anchor_core.cli", {"GOMP_SPINCOUNT": "7"}, 7),
        ("anchor_core.cli", {"OMP_WAIT_POLICY": "active"}, 30_000_000_000),
        ("anchor_core.training.trainer", {}, 300_000),
    ],
    ids=["the command line", "as the user counts", "as the user says", "what the nodes import"],
)
def test_who_waits_soon_sleeps_under_the_command_line_and_nowhere_else(module, given, spins):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP_"))}
    told = subprocess.run(
        [sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**clean, **given, "OMP_DISPLAY_ENV": "VERBOSE"},
    ).stderr  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{spins}'" in told
