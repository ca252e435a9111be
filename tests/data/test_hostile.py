"""Damaged pictures, masks, captions and names by the hundred: each is read, or refused in one sentence, in time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.data import hostile
from tests.data.cases import ROOT, run_cases

CASES = {"pictures": 450, "exif": 300, "masks": 150, "captions": 200, "names": 100}


@pytest.mark.long
@pytest.mark.parametrize("kind", CASES)
def test_hostile(tmp_path, kind):
    told, wrong = run_cases(hostile.__file__, kind, CASES[kind], ("read", "refused"), tmp_path)
    assert not wrong
    assert told["read"] == CASES[kind] if kind == "exif" else told["read"] and told["refused"]


def test_the_hook_sees_a_write(tmp_path):
    """In a process of its own, as hooks stay."""
    code = f"from tests.data.hostile import watch\ndone = watch()\nopen({str(tmp_path / 'a')!r}, 'w')\nprint(done())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("[\"open '") and str(tmp_path) in done.stdout
