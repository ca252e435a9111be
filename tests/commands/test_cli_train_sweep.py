"""`train --sweep`, and `bench speed` on the embedded model."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from torch import equal

from anchor_core import cli
from anchor_core.bench import speed
from anchor_core.commands import train_sweep
from tests.commands.test_cli import PROMPTS, refused

QUICK = ["train", "--model", "sandbox", "--steps", "2", "--batch_size", "2", "--rank", "2", *PROMPTS]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(train_sweep, "PICTURES", 1)
    monkeypatch.setattr(train_sweep, "SAMPLING_STEPS", 2)


def test_a_sweep_trains_each_as_alone_on_anchors_that_are_computed_once(references, tmp_path, capsys):
    given = [*QUICK, "--references", references]
    assert cli.main([*given, "--sweep", "w=0,.5,1", "--out", str(tmp_path / "swept")]) == 0
    report = json.loads((tmp_path / "swept" / "report.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["w=0", "w=0.5", "w=1"]
    assert report["bank"] == {"computed": 2, "found": 2} and (tmp_path / "swept" / "report.png").exists()
    assert "| w=0.5 |" in capsys.readouterr().out
    assert cli.main([*given, "--w", "1", "--out", str(tmp_path / "alone"), "--cache", str(tmp_path / "cache")]) == 0
    alone = load_file(tmp_path / "alone" / "adapter.safetensors")
    swept = load_file(tmp_path / "swept" / "w=1" / "adapter.safetensors")
    assert alone.keys() == swept.keys() and all(equal(alone[key], swept[key]) for key in alone)
    assert len(list((tmp_path / "cache").glob("anchors-*"))) == 2


def test_strengths_are_one_training(references, tmp_path):
    given = [*QUICK, "--references", references, "--learning_rate", "0.05"]
    assert cli.main([*given, "--sweep", "strength=0,.5,1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["adapter"] for row in rows} == {"adapter.safetensors"}
    assert len({row["drift"] for row in rows}) == 3


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("w", "--sweep: sweep is 'w', but w takes numbers with commas between"),
        ("w=0.5", "it takes two different values at least; give one as --w"),
        ("objective=1,2", "it takes NAME=VALUE,VALUE with one of w, "),
        ("w=0,-1", "--w: w is -1.0, but it takes a finite number of at least 0"),
        ("rank=4,many", "rank takes numbers with commas between"),
    ],
)
def test_a_sweep_of_something_else_is_refused_before_anything_is_written(tmp_path, capsys, sweep, message):
    given = [*QUICK, "--references", "nowhere", "--sweep", sweep, "--out", str(tmp_path / "out")]
    assert message in refused(capsys, given)
    assert not (tmp_path / "out").exists()


def test_a_sweep_and_checkpoints_are_refused_together(tmp_path, capsys):
    given = [*QUICK, "--references", "nowhere", "--sweep", "w=0,1", "--checkpoint_every", "1", "--out", str(tmp_path)]
    assert "--sweep: sweep writes no checkpoints" in refused(capsys, given)


def test_speed_keeps_each_round_and_says_why_a_figure_is_missing(tmp_path, capsys):
    given = ["bench", "speed", "--steps", "1", "--batch_size", "1", "--out", str(tmp_path), "--methods"]
    assert cli.main([*given, "plain", "parts", "--rounds", "1"]) == 0
    first = (tmp_path / "rounds.jsonl").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["methods"]) == {"plain", "parts"}
    assert report["ratios"]["bank_over_plain"] is None and report["reasons"]["bank_over_plain"]
    assert "give --comfyui" in report["reasons"]["ours_over_stock"]
    assert cli.main([*given, "plain", "anchored", "--rounds", "1"]) == 0
    assert (tmp_path / "rounds.jsonl").read_text().startswith(first)  # what was measured is not measured again
    report = json.loads((tmp_path / "report.json").read_text())
    plain, anchored = (report["methods"][name]["seconds per step"] for name in ("plain", "anchored"))
    assert report["ratios"]["anchored_over_plain"] == pytest.approx(anchored / plain, rel=0.05)
    assert report["spread"]["anchored_over_parts"][0] <= report["ratios"]["anchored_over_parts"]
    with pytest.raises(ValueError, match="holds measurements of"):
        speed.run(tmp_path, speed.Spec(rank=3))
