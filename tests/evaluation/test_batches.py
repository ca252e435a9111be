"""Scores that depend on the pictures alone: not on their order, nor on how many go through a network at once."""

from __future__ import annotations

import json

import pytest
import torch

from anchor_core import cli
from anchor_core.evaluation.compare import Comparison
from anchor_core.evaluation.encoders import DTYPES, open_encoders
from tests.evaluation.folders import write
from tests.evaluation.tiny_encoders import save_encoders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


def scores(folders, order: list[int], batch_size: int, dtype: str = "fp32") -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand((3, 40 + 3 * number, 50), generator=generator) for number in range(9)]
    prompts = [" ".join(["a photo of a dog", *["in the snow"] * (number % 4)]) for number in range(9)]
    comparison = Comparison(open_encoders(folders / "clip", folders / "dino", dtype=dtype, batch_size=batch_size))
    comparison.add_references("dog", [pictures[number] for number in order[:4]])
    comparison.add("ours", "dog", [pictures[number] for number in order], [prompts[number] for number in order])
    found = comparison.result()
    return {metric: found["systems"]["ours"][metric]["mean"] for metric in ("clip_i", "clip_t", "dino")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_depend_on_neither_batch_nor_order(folders, dtype):
    order = list(range(9))
    wanted = scores(folders, order, 32, dtype)
    for batch_size in (1, 2, 9):
        assert scores(folders, order, batch_size, dtype) == pytest.approx(wanted, abs=1e-5)
    assert scores(folders, [3, 1, 0, 2, 8, 6, 7, 4, 5], 4, dtype) == pytest.approx(wanted, abs=1e-5)


def test_half_precision_is_near(folders):
    order = list(range(9))
    wanted, half = scores(folders, order, 4), scores(folders, order, 4, "bf16")
    assert half != wanted and half == pytest.approx(wanted, abs=2e-2)
    for changed, message in ({"dtype": "fp8"}, "encoder_dtype is 'fp8'"), ({"batch_size": 0}, "encoder_batch is 0"):
        with pytest.raises(ValueError, match=message):
            open_encoders(folders / "clip", None, **changed)


def test_the_verb_names_counts_and_leaves_out_what_it_cannot_take(folders, tmp_path, capsys):
    for subject, colour in (("dog", (1, 0, 0)), ("cat", (0, 1, 0)), ("bird", (0, 0, 1))):
        write(tmp_path / "references" / subject, "0.png", "1.png", colour=colour)
        write(tmp_path / "ours" / subject, "a.png", "b.png", colour=colour, a="a dog", b="a dog")
    (tmp_path / "ours/dog/b.png").write_bytes(b"no picture")
    (tmp_path / "ours/cat/b.txt").unlink()
    for name in ("0.png", "1.png"):
        (tmp_path / "references/bird" / name).write_bytes(b"no picture")
    given = [
        "compare",
        "--references",
        str(tmp_path / "references"),
        "--clip",
        str(folders / "clip"),
        "--device",
        "cpu",
    ]
    assert cli.main([*given, "--pictures", f"ours={tmp_path / 'ours'}", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out/report.json").read_text())
    assert result["subjects"] == ["cat", "dog"]
    told = capsys.readouterr().out
    assert "Left out (5): " in told and len(result["left_out"]) == 5
    for each in ("b.png of ours: ", "0.png of the references: ", "bird: no picture of the references can be read",
                 "cat/b.png of ours: it has no prompt"):  # fmt: skip
        assert [line for line in result["left_out"] if each in line], each
    assert result["systems"]["ours"]["clip_i"]["mean"] == pytest.approx(1, abs=1e-5)  # they are plain pictures


def test_the_verb_calibrates_without_a_generator(folders, tmp_path, capsys):
    write(tmp_path / "references/dog", "0.png", "1.png")
    given = [
        "compare",
        "--references",
        str(tmp_path / "references"),
        "--dino",
        str(folders / "dino"),
        "--device",
        "cpu",
    ]
    assert cli.main([*given, "--out", str(tmp_path / "out")]) == 0
    assert "the papers have DINO 0.774" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/report.json").read_text())["real"]["dino"]["by_subject"].keys() == {"dog"}
