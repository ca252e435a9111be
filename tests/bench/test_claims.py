"""Claims against cells of known values."""

from __future__ import annotations

import numpy as np
import pytest

from anchor_core.bench import claims, figures, results
from anchor_core.bench.cells import Cells
from anchor_core.bench.claims import NOT_SHOWN, OPPOSITE, SHOWN, UNKNOWN, at_equal, judge, read_claims
from anchor_core.evaluation.intervals import bootstrap

ROWS = ["a", "b", "c"]
SUBJECTS = ["pip", "momo", "bolt", "luna"]
LIFT = {"pip": 0.0, "momo": 0.1, "bolt": 0.2, "luna": 0.3}


def cells(of, seeds=(0, 1)) -> Cells:
    """Cells whose scores are `of(row, subject, seed)`, {step: scores}."""
    made = [
        {"row": row, "subject": subject, "seed": seed, "scores": of(row, subject, seed)}
        for row in ROWS for subject in SUBJECTS for seed in seeds
    ]  # fmt: skip
    return Cells(ROWS, SUBJECTS, seeds, made)


def claim(**given):
    (made,) = read_claims([{"name": "n", "score": "text_alignment", **given}], ROWS)
    return made


def test_an_interval_is_that_of_resampled_subjects():
    values = {"a": [1.0, 3.0], "b": [4.0], "c": [6.0, 6.0, 6.0]}
    found = bootstrap(values)
    # All 27 equally likely resamples of the means 2, 4 and 6, in full.
    means = [np.mean([x, y, z]) for x in (2, 4, 6) for y in (2, 4, 6) for z in (2, 4, 6)]
    assert found.mean == 4 and (found.subjects, found.runs) == (3, 6)
    assert (found.low, found.high) == tuple(np.quantile(means, [0.025, 0.975], method="inverted_cdf"))
    assert bootstrap(values) == found != bootstrap(values, seed=3, resamples=50)
    assert bootstrap({"a": [1.0, 2.0]}).low is None
    with pytest.raises(ValueError, match="values holds none"):
        bootstrap({"a": []})


@pytest.mark.parametrize(
    ("difference", "expect", "verdict"),
    [(0.1, "higher", SHOWN), (-0.1, "higher", OPPOSITE), (0.1, "lower", OPPOSITE), (-0.1, "lower", SHOWN)],
)
def test_pairs_are_compared_run_by_run(difference, expect, verdict):
    # Subjects differ by more than the rows do.
    found = judge(
        claim(of="a", against="b", expect=expect),
        cells(lambda row, subject, seed: {"9": {"text_alignment": LIFT[subject] + difference * (row == "a")}}),
    )
    assert found.verdict == verdict and found.left_out == 0
    assert found.interval.mean == pytest.approx(difference) and found.interval.low == pytest.approx(difference)


def test_what_differs_from_subject_to_subject_is_not_shown():
    sign = {"pip": 1, "momo": -1, "bolt": 1, "luna": -1}
    found = cells(lambda row, subject, seed: {"9": {"text_alignment": 0.1 * sign[subject] * (row == "a")}})
    assert judge(claim(of="a", against="b", expect="higher"), found).verdict == NOT_SHOWN
    assert judge(claim(of="a", against="b", expect="same", margin=0.2), found).verdict == SHOWN
    assert judge(claim(of="a", against="b", expect="same", margin=0.05), found).verdict == NOT_SHOWN
    away = cells(lambda row, subject, seed: {"9": {"text_alignment": 0.5 * (row == "a")}})
    assert judge(claim(of="a", against="b", expect="same", margin=0.05), away).verdict == OPPOSITE


def test_a_score_along_rows_is_its_fitted_change():
    # a, b, c at 0, 1 and 5: the fitted line rises by 5 from end to end.
    values = {"a": 0.0, "b": 1.0, "c": 5.0}
    found = cells(lambda row, subject, seed: {"9": {"text_alignment": values[row] + LIFT[subject]}})
    risen = judge(claim(of=ROWS, expect="rises"), found)
    assert risen.verdict == SHOWN and risen.interval.mean == pytest.approx(5)
    assert judge(claim(of=ROWS, expect="falls"), found).verdict == OPPOSITE


def test_lines_are_compared_where_they_are_equal():
    ours, theirs = [(0.0, 1.0), (2.0, 3.0)], [(1.0, 1.0), (3.0, 2.0)]
    # Both are at x = 1 (2 against 1) and at x = 2 (3 against 1.5).
    assert at_equal(ours, theirs) == pytest.approx(((2 - 1) + (3 - 1.5)) / 2)
    assert at_equal(theirs, ours) == pytest.approx(-1.25)
    assert at_equal([(0.0, 1.0)], theirs) is None

    def of(row, subject, seed):
        # Over its steps each row drifts; at equal drift, a has 0.2 more text than b, at equal steps less.
        speed = {"a": 2.0, "b": 1.0, "c": 1.0}[row]
        return {
            str(step): {"drift": speed * step, "text_alignment": 1 - 0.1 * speed * step + 0.2 * (row == "a")}
            for step in (1, 2, 4)
        }

    equal = judge(claim(of="a", against="b", expect="higher", equal="drift"), cells(of))
    assert equal.verdict == SHOWN and equal.interval.mean == pytest.approx(0.2)
    assert judge(claim(of="a", against="b", expect="lower"), cells(of)).verdict == SHOWN
    assert judge(claim(of="a", against="b", expect="higher", at=1), cells(of)).verdict == SHOWN


def test_a_course_rises_falls_or_settles():
    def with_curve(values) -> Cells:
        found = cells(lambda row, subject, seed: {"9": {"text_alignment": 0.0}})
        for cell in found.by_key.values():
            cell["curve"] = [{"step": step, "drift": value} for step, value in enumerate(values)]
        return found

    def read(expect):
        return read_claims([{"name": "n", "of": "a", "curve": "drift", "expect": expect}], ROWS)[0]

    growing = with_curve([0, 3, 5, 5.5, 5.6])
    assert judge(read("rises"), growing).verdict == SHOWN and judge(read("falls"), growing).verdict == OPPOSITE
    settled = judge(read("settles"), growing)
    assert settled.verdict == SHOWN and settled.interval.mean == pytest.approx(0.6 - 5)
    assert judge(read("settles"), with_curve([0, 1, 2, 4, 8])).verdict == OPPOSITE
    assert judge(read("rises"), with_curve([0, 1])).verdict == UNKNOWN


def test_runs_without_a_cell_are_counted_and_left_out():
    found = cells(lambda row, subject, seed: {"9": {"text_alignment": float(row == "a")}})
    del found.by_key["a", "pip", 0]
    found.failed.append({"row": "b", "subject": "momo", "seed": 1, "failed": "the loss is NaN"})
    del found.by_key["b", "momo", 1]
    told = judge(claim(of="a", against="b", expect="higher"), found)
    assert told.verdict == SHOWN and told.left_out == 2 and told.interval.runs == 6
    assert found.missing == ["a, pip, seed 0"]
    assert "| 6 of 4 subjects, 2 left out | shown |" in claims.markdown([told])
    assert judge(claim(of="a", against="b", expect="higher"), Cells(ROWS, SUBJECTS, [0], [])).verdict == UNKNOWN


def test_a_figure_has_a_point_for_each_step_or_row():
    found = cells(lambda row, subject, seed: {str(n): {"drift": n + LIFT[subject]} for n in (1, 2, 4)})
    over_steps = figures.points(("a",), found)
    assert [point["drift"].mean for point in over_steps] == pytest.approx([1.15, 2.15, 4.15])
    over_rows = figures.points(("a", "b"), found)
    assert [point["drift"].mean for point in over_rows] == pytest.approx([4.15, 4.15])


def test_a_table_says_mean_and_interval():
    assert results.cell(bootstrap({"a": [0.25], "b": [0.75]}), "shape") == "0.500 [0.250, 0.750]"
    assert results.cell(bootstrap({"a": [0.25]}), "drift", "+") == "+0.25"
    assert results.cell(None, "drift") == "n/a"
