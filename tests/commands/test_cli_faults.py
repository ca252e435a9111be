"""What a verb says when the disk fails it, and what it leaves."""

from __future__ import annotations

import pytest

from anchor_core import cli
from anchor_core.adapters.file import load_adapter

TRAIN = "train --model sandbox --steps 2 --batch_size 1 --rank 2".split()
PROMPTS = ["--subject", "a photo of a sks star", "--class", "a photo of a star"]


@pytest.mark.parametrize("name", ["report.json", "report.png"])
def test_a_report_that_cannot_be_written_leaves_the_adapter(references, tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    assert cli.main([*TRAIN, *PROMPTS, "--references", references, "--out", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"the adapter is in {tmp_path / 'adapter.safetensors'}, but its report cannot be written" in line
    assert load_adapter(tmp_path / "adapter.safetensors")[1]["anchor.steps"] == "2"


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path, capsys):
    (tmp_path / "report.json").mkdir()
    assert cli.main(["sandbox", "subject", "pip", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "report.json") in error and "Is a directory" in error and "Traceback" not in error
