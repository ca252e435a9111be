"""Names of files that nobody else takes."""

from __future__ import annotations

import pytest
import torch

from anchor_core.training.saving import Files, Trained
from anchor_core.writing import claimed


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "dog_00001_.safetensors"
    for number in (1, 2, 4):
        (tmp_path / f"dog_{number:05}_.safetensors").write_text("another's")
    with claimed(path) as own:
        assert own.name == "dog_00003_.safetensors" and own.is_file()
        with claimed(path) as other:  # of the same name, at the same time
            assert other.name == "dog_00005_.safetensors"
            other.write_text("its")
        own.write_text("ours")
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == ["another's"] * 2 + ["ours", "another's", "its"]


def test_a_save_that_fails_leaves_no_empty_file(tmp_path):
    path = tmp_path / "dog_00001_.safetensors"
    with pytest.raises(KeyboardInterrupt), claimed(path):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), claimed(path) as own:
        own.write_text("whole")
        raise RuntimeError
    assert path.read_text() == "whole"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "loras").write_text("a file")
    with (
        pytest.raises(ValueError, match="cannot be written"),
        claimed(tmp_path / "loras/dog_00001_.safetensors"),
    ):
        raise AssertionError


def test_a_name_without_a_number_gets_one(tmp_path):
    path = tmp_path / "dog_step000100.safetensors"
    for name in (path.name, "dog_step000100_00002_.safetensors"):
        with claimed(path) as own:
            assert own.name == name


def test_a_training_overwrites_no_file_that_came_meanwhile(tmp_path):
    files = Files(tmp_path / "a_00001_.safetensors", tmp_path / "b_00001_.safetensors", new=True)
    trained = Trained({"x": torch.ones(2)}, {"modelspec.architecture": "one/lora"}, {"emb_params": torch.ones(1, 2)})
    files.adapter.write_text("another's")
    adapter, embedding = trained.save(files)
    assert files.adapter.read_text() == "another's" and adapter.name == "a_00002_.safetensors"
    assert embedding == files.embedding and embedding.stat().st_size
    (step,) = {path.parent / path.name for path in trained.save(files.at(7))[:1]}
    assert step.name == "a_00001_step000007.safetensors" and files.at(7).new
    over = Files(files.adapter, files.embedding)  # as the command line writes
    assert trained.save(over) == (files.adapter, files.embedding) and files.adapter.stat().st_size > 9
