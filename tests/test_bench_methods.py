"""The table of all methods: its cells are made once, and what it says of them."""

from __future__ import annotations

import functools
import math

import pytest

from anchor_core.bench import methods, personalise


@pytest.fixture
def small(monkeypatch):
    """The real model and judge, with short sampling and few probe points."""
    monkeypatch.setattr(personalise, "SAMPLING", {"steps": 1, "guidance": 4.0})
    monkeypatch.setattr(personalise, "CLASS_PICTURES", 6)
    monkeypatch.setattr(personalise, "DriftProbe", functools.partial(personalise.DriftProbe, timesteps=1))


def made(out, rows, **options) -> list[dict]:
    for folder in ("cells", "adapters"):
        (out / folder).mkdir(exist_ok=True)
    return list(methods._Run(out, "bolt", 1).cells(rows, {"steps": 1, **options}))


def test_cells_are_made_once_for_their_options(small, tmp_path):
    rows = [methods.PRETRAINED, methods.BASE]
    first = made(tmp_path, rows)
    assert [each["row"] for each in first] == rows
    assert {"subject_fidelity", "text_alignment", "drift"} <= set(first[1]["scores"])
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert len(files) == 3  # two cells and an adapter
    assert made(tmp_path, rows) == first
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    (other,) = made(tmp_path, [methods.BASE], learning_rate=1e-2)
    assert other["options"]["learning_rate"] == 1e-2 and other["scores"] != first[1]["scores"]


def test_every_row_runs_end_to_end(small, tmp_path):
    cells = {each["row"]: each["scores"] for each in made(tmp_path, methods.names())}
    assert list(cells) and set(cells) == set(methods.names())
    for row, scores in cells.items():
        assert all(math.isfinite(value) for value in scores.values()), row
    plain = cells[methods.BASE]
    for sampling in methods.samplings_of(methods.BASE):
        scores = cells[f"{methods.BASE} + {sampling}"]
        assert scores["drift"] == plain["drift"], sampling  # it is the adapter's
        assert scores["subject_fidelity"] != plain["subject_fidelity"], sampling


def test_samplings_go_on_from_the_files_of_a_training(small, tmp_path):
    row = f"{methods.BASE} + switching"
    first = made(tmp_path, [row])
    assert [each["row"] for each in first] == [row]
    (file,) = (tmp_path / "cells").glob("*switching*")
    file.unlink()
    assert made(tmp_path, [row]) == first


def test_an_unknown_row_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="methods is 'best', but it takes one of pretrained, class prompt"):
        methods.run(tmp_path / "out", ["pip"], [0], ["best"])
    assert not (tmp_path / "out").exists()


def test_every_row_has_options_that_a_training_takes():
    for options in methods.TRAININGS.values():
        settings, config = methods._settings(options)
        for name, value in options.items():
            assert getattr(settings, name, None) == value or getattr(config, name, None) == value


def test_the_table_ranks_methods_and_compares_them_run_by_run():
    def cell(row, subject, picture, text, identity):
        scores = {"picture_similarity": picture, "text_alignment": text, "subject_fidelity": identity}
        scores |= {"drift": 1.0, "drift_class": 2.0}
        return {"row": row, "subject": subject, "seed": 0, "scores": scores}

    cells = [cell(methods.PRETRAINED, "pip", 0.9, 0.9, 0.9)]
    cells += [cell(methods.BASE, "pip", 0.5, 0.25, 0.5), cell(methods.BASE, "momo", 0.5, 0.75, 0.5)]
    cells += [cell("anchored", "pip", 0.4, 0.5, 0.25), cell("anchored", "momo", 0.4, 1.0, 0.75)]
    text = methods.markdown(cells)
    assert f"| {methods.PRETRAINED} | 1 | 0.900 ± 0.000 |" in text and "|  |  |" in text
    # Behind in pictures, ahead in text, level in identity: 2, 1 and 1.5 against 1, 2 and 1.5; the tie by row order.
    assert f"| {methods.BASE} | 2 | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.354 | 1.00" in text
    assert text.count("| 1.50 | 1 |") == 1 and text.count("| 1.50 | 2 |") == 1
    assert "| anchored | 2 | 0.000 ± 0.354 | 0.250 ± 0.000 |" in text
