"""The verb `sweep`: one prompt at several strengths, or by several adapters, as a grid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from anchor_core import cli
from anchor_core.evaluation.sweep import Column, best, parse_values, told
from anchor_core.sandbox import subjects


@pytest.fixture(scope="module")
def trained(tmp_path_factory, weights):
    """The folder of pictures of a subject, and two adapters of it that differ in w."""
    folder = tmp_path_factory.mktemp("trained")
    pictures = folder / "pip"
    pictures.mkdir()
    for i, picture in enumerate(subjects.get("pip").references()):
        picture.save(pictures / f"{i}.png")
    files = []
    for w in ("0", "1"):
        out = folder / f"w{w}"
        words = ["--subject", "a photo of a sks star", "--class", "a photo of a star", "--learning_rate", "2e-2"]
        given = ["train", "--model", str(weights), "--references", str(pictures), *words, "--steps", "3", "--w", w]
        assert cli.main([*given, "--device", "cpu", "--out", str(out)]) == 0
        files.append(str(out / "adapter.safetensors"))
    return pictures, files


def sweep(out: Path, weights, *options: str) -> int:
    usual = ["--steps", "2", "--resolution", "64", "--device", "cpu"]
    return cli.main(["sweep", "--model", str(weights), "--out", str(out), *usual, *options])


def test_strengths_of_one_adapter(tmp_path, weights, trained, capsys):
    pictures, (_, file) = trained
    judged = ["--references", str(pictures), "--judge", "sandbox"]
    assert sweep(tmp_path, weights, "--adapter", file, "--strength", "0, 1", *judged) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["what"], [each["value"] for each in report["values"]]) == ("strength", ["0", "1"])
    assert all(len(each["scores"]) == 2 and "clip_t" in each["means"] for each in report["values"])
    assert report["prompts"] == ["a photo of a sks star"] and "| 0" in capsys.readouterr().out
    made = {file.name: Image.open(file).tobytes() for file in tmp_path.glob("strength-*.png")}
    assert set(made) == {f"strength-{value}-{i:03}.png" for value in (0, 1) for i in (0, 1)}
    assert len(set(made.values())) == 4
    assert Image.open(tmp_path / "report.png").width > 300


def test_several_adapters_are_called_by_what_they_differ_in(tmp_path, weights, trained):
    _, files = trained
    assert sweep(tmp_path, weights, "--adapter", *files, "--by", "w", "--count", "1") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["value"] for each in report["values"]] == ["0.0", "1.0"] and report["best"] is None


@pytest.mark.parametrize(
    "options, said",
    [
        (["--strength", "x"], "--strength: strength is 'x', but it takes numbers with commas between"),
        (["--judge", "sandbox"], "--references: scores take the real pictures"),
        (["--strength", "0, 1", "--adapter", "one", "two"], "--strength: one thing is varied"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path, weights, capsys, options, said):
    given = options if "--adapter" in options else ["--adapter", "one", *options]
    assert sweep(tmp_path, weights, *given) == 2
    assert said in capsys.readouterr().err


def test_values_are_numbers_in_order_each_once():
    assert parse_values("1, 0;0.5, 1,") == [0, 0.5, 1]
    for wrong in ("", ",", "a", "nan", "1 2", ",".join(map(str, range(25)))):
        with pytest.raises(ValueError, match="but it takes"):
            parse_values(wrong)


def test_the_best_column_has_the_first_place_over_all_metrics():
    columns = [Column(str(i), []) for i in range(3)]
    for column, (clip, dino) in zip(columns, ((0.9, 0.2), (0.8, 0.8), (0.1, 0.7))):
        column.scores.append({"clip_i": clip, "dino": dino})
    assert best(columns) == 1 and best([Column("0", [])]) is None
    assert told({"clip_i": 0.91234, "dino": 0.5}) == "CLIP-I 0.912\nDINO 0.500"
