from __future__ import annotations

import os

import pytest

from anchor_core.writing import STALE, whole


def names(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_the_file_takes_its_place_at_the_end(tmp_path):
    (tmp_path / "x").write_text("old")
    with whole(tmp_path / "x") as part:
        part.write_text("new")
        assert (tmp_path / "x").read_text() == "old"
    assert (tmp_path / "x").read_text() == "new" and names(tmp_path) == {"x"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "x").write_text("old")
    with pytest.raises(error), whole(tmp_path / "x") as part:
        part.write_text("ne")
        raise error
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == {"x"}


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path):
    for name, age in ((".dead.safetensors.17.part", STALE + 60), (".busy.safetensors.18.part", 60)):
        (tmp_path / name).write_text("half")
        past = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (past, past))
    with whole(tmp_path / "x") as part:
        part.write_text("new")
    assert names(tmp_path) == {"x", ".busy.safetensors.18.part"}
