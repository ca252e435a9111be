"""A training's report holds what it takes to make its adapter again, in every bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from anchor_core import cli
from tests.commands.test_cli import PROMPTS, refused, trained

KEPT = "adapter.safetensors"


@pytest.fixture
def tiny(model_folders) -> list[str]:
    return ["--model", str(model_folders["epsilon"]), "--resolution", "32"]


def again(folder: Path, out: Path, *options: str) -> dict:
    assert cli.main(["train", "--from_report", str(folder / "report.json"), "--out", str(out), *options]) == 0
    return json.loads((out / "report.json").read_text())


def test_a_report_holds_versions_hashes_and_settings(references, tiny, tmp_path):
    report = trained(references, tmp_path, *tiny, "--objective", "prior_preservation", "--class_pictures", "2")
    made = report["made_with"]
    named = {
        "semantic-anchor",
        "python",
        "torch",
        "numpy",
        "safetensors",
        "pillow",
        "diffusers",
        "transformers",
        "peft",
    }
    assert named <= made["versions"].keys() and made["versions"]["torch"] == torch.__version__
    assert made["device"].startswith("cpu ") and made["dtype"] == "float32" and made["threads"] >= 1
    assert made["files"] == {KEPT: hashlib.sha256((tmp_path / KEPT).read_bytes()).hexdigest()}
    assert len(made["base_model"]) == 16 and report["settings"]["seed"] == 0
    hashes = [each["picture"] for each in made["pictures"]]
    assert [each["name"] for each in made["pictures"]] == report["references"] and len(set(hashes)) == len(hashes)
    assert made["class_pictures"]["count"] == 2 and set(made["prompts"]) >= {PROMPTS[1], PROMPTS[3]}


def test_a_training_is_made_again_from_its_report_alone(pip, tiny, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (96, 64), (64, 96)]):
        picture = Image.open(pip / f"{number}.png").convert("RGB").resize(size)
        picture.putalpha(Image.linear_gradient("L").resize(size))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a sks star, number {number}, in the snow")
    options = "--captions --masks --buckets --flip --shuffle --caption_dropout 0.2 --seed 5 --kind loha"
    options += " --schedule cosine --steps 6 --objective prior_preservation --class_pictures 2 --ema 0.9"
    trained(str(folder), tmp_path / "first", *tiny, *options.split())
    again(tmp_path / "first", tmp_path / "second")
    assert "the same as those of" in capsys.readouterr().out
    first, second = (tmp_path / name / KEPT for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    (folder / "1.txt").write_text("a sks star in the rain")
    arguments = ["train", "--from_report", str(tmp_path / "first/report.json"), "--out", str(tmp_path / "third")]
    assert "the caption of reference 1.png is not that of" in refused(capsys, arguments)
    shutil.copy(pip / "3.png", folder / "extra.png")
    assert refused(capsys, arguments) and not (tmp_path / "third").exists()


def test_a_training_that_was_stopped_or_kept_its_best_step(references, tiny, tmp_path, monkeypatch):
    from anchor_core.training.orders import Orders

    made = trained(references, tmp_path / "best", *tiny, "--steps", "6", "--probe_every", "2", "--keep", "best")
    assert again(tmp_path / "best", tmp_path / "best 2")["history"]["kept"] == made["history"]["kept"]
    steps = iter(range(100))
    monkeypatch.setattr(Orders, "goes_on", lambda orders, done, planned: next(steps) < 4)
    trained(references, tmp_path / "stopped", *tiny, "--steps", "9", "--schedule", "cosine")
    monkeypatch.undo()
    assert len(again(tmp_path / "stopped", tmp_path / "stopped 2")["history"]["losses"]) == 4
    for name in ("best", "stopped"):
        assert (tmp_path / name / KEPT).read_bytes() == (tmp_path / f"{name} 2" / KEPT).read_bytes()


def test_other_pictures_and_models_are_refused_and_other_seeds_told(references, tiny, tmp_path, capsys, model_folders):
    trained(references, tmp_path / "first", *tiny)
    repeat = ["train", "--from_report", str(tmp_path / "first/report.json"), "--out", str(tmp_path / "second")]
    mirrored = tmp_path / "mirrored"
    mirrored.mkdir()
    for file in Path(references).glob("*.png"):
        ImageOps.mirror(Image.open(file)).save(mirrored / file.name)
    assert "picture of reference 0.png is not that of" in refused(capsys, [*repeat, "--references", str(mirrored)])
    assert "--model: its weights are" in refused(capsys, [*repeat, "--model", str(model_folders["other"])])
    assert not (tmp_path / "second").exists()
    again(tmp_path / "first", tmp_path / "other", "--seed", "1")
    assert "not the same as those of" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"command": {}}', "[" * 100_000])
def test_what_is_no_report_is_refused(text, tmp_path, capsys):
    (tmp_path / "report.json").write_text(text)
    line = refused(capsys, ["train", "--from-report", str(tmp_path / "report.json"), "--out", str(tmp_path / "out")])
    assert "--from_report" in line and "give a report.json" in line
