"""Files that are missed; without ComfyUI, which they do not need."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written():
    spec = importlib.util.spec_from_file_location("written", ROOT / "nodes/written.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_are_missed_once(written, tmp_path):
    files = written.Written()
    assert files.fingerprint("4") == 0
    own, beside = tmp_path / "a", tmp_path / "b"
    own.touch()
    beside.touch()
    files.add("4", own, beside)
    assert files.fingerprint("4") == 0 == files.fingerprint("5")
    beside.unlink()
    assert files.fingerprint("4") == 1 == files.fingerprint("4")
    beside.touch()
    files.add("4", own, beside)
    assert files.fingerprint("4") == 1 and files.fingerprint("5") == 0
