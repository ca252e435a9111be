"""Names of files that nobody else takes, and files that are missed; without ComfyUI, which they do not need."""

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


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(written, tmp_path):
    path = tmp_path / "dog_00001_.safetensors"
    for number in (1, 2, 4):
        (tmp_path / f"dog_{number:05}_.safetensors").write_text("another's")
    with written.claimed(path) as own:
        assert own.name == "dog_00003_.safetensors" and own.is_file()
        with written.claimed(path) as other:  # of the same name, at the same time
            assert other.name == "dog_00005_.safetensors"
            other.write_text("its")
        own.write_text("ours")
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == ["another's"] * 2 + ["ours", "another's", "its"]


def test_a_save_that_fails_leaves_no_empty_file(written, tmp_path):
    path = tmp_path / "dog_00001_.safetensors"
    with pytest.raises(KeyboardInterrupt), written.claimed(path):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), written.claimed(path) as own:
        own.write_text("whole")
        raise RuntimeError
    assert path.read_text() == "whole"


def test_a_folder_that_cannot_be_written_is_named(written, tmp_path):
    (tmp_path / "loras").write_text("a file")
    with (
        pytest.raises(ValueError, match="cannot be written"),
        written.claimed(tmp_path / "loras/dog_00001_.safetensors"),
    ):
        raise AssertionError


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
