"""The table of all methods: its cells are made once, and what it says of them."""

from __future__ import annotations

import functools

import pytest

from anchor_core.bench import methods, personalise
from anchor_core.guidance import make_rule


@pytest.fixture
def small(monkeypatch):
    """The real model and judge, with short sampling and few probe points."""
    monkeypatch.setattr(personalise, "SAMPLING", {"steps": 3, "guidance": 4.0})
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
    assert len(files) == 4  # two cells, an adapter, and an early checkpoint of it
    assert made(tmp_path, rows) == first
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    (other,) = made(tmp_path, [methods.BASE], learning_rate=1e-2)
    assert other["options"]["learning_rate"] == 1e-2 and other["scores"] != first[1]["scores"]


def test_samplings_share_the_adapter_of_a_training(small, tmp_path):
    kinds = ("autoguidance, early checkpoint", "mixed", "prompt adjusted by token")
    rows = [methods.BASE, *(f"{methods.BASE} + {kind}" for kind in kinds)]
    first = made(tmp_path, rows, learning_rate=1e-2)
    assert [each["row"] for each in first] == rows
    assert len({each["scores"]["drift"] for each in first}) == 1  # it is the adapter's
    assert len({each["scores"]["subject_fidelity"] for each in first}) == len(rows)
    (file,) = (tmp_path / "cells").glob("*mixed*")
    file.unlink()
    assert made(tmp_path, rows, learning_rate=1e-2) == first  # by the adapter's file


def test_an_adjusted_token_drifts_less_or_more_and_is_itself_again(small, tmp_path):
    plain, adjusted = made(tmp_path, ["textual inversion", "textual inversion + token adjusted"])
    assert plain["options"]["initial"] == "square"  # bolt's class
    assert plain["scores"]["drift"] != adjusted["scores"]["drift"]


def test_an_unknown_row_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="methods is 'best', but it takes one of pretrained, class prompt"):
        methods.run(tmp_path / "out", ["pip"], [0], ["best"])
    assert not (tmp_path / "out").exists()


def test_every_row_has_options_that_a_training_or_a_rule_takes():
    for options in methods.SAMPLINGS.values():
        rule = {name: value for name, value in options.items() if name not in ("guidance", "adjust", "align")}
        if "rule" in rule:
            make_rule(rule.pop("rule"), **rule)
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
    assert text.count("Difference to") == 1
    assert f"| {methods.PRETRAINED} | 1 | 0.900 ± 0.000 |" in text and "|  |  |" in text
    # Behind in pictures, ahead in text, level in identity: 2, 1 and 1.5 against 1, 2 and 1.5; the tie by row order.
    assert f"| {methods.BASE} | 2 | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.354 | 1.00" in text
    assert text.count("| 1.50 | 1 |") == 1 and text.count("| 1.50 | 2 |") == 1
    assert "| anchored | 2 | 0.000 ± 0.354 | 0.250 ± 0.000 |" in text
    sampled = methods.markdown([*cells, cell("anchored + mixed", "pip", 0.4, 0.5, 0.5)])
    _, to_base, to_anchored = sampled.split("Difference to")
    assert "| anchored + mixed | 1 | 0.000 ± 0.000 | 0.250 ± 0.000 |" in to_base  # ID .5, text .25 -> .5
    assert "| anchored + mixed | 1 | 0.250 ± 0.000 | 0.000 ± 0.000 |" in to_anchored
