"""docs/RESULTS.md and README.md against the cells that are kept beside them."""

from __future__ import annotations

import re
import runpy
from decimal import Decimal
from pathlib import Path

import pytest

from anchor_core.bench import results
from anchor_core.bench.cells import Cells
from anchor_core.bench.claims import judge

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"[+-]?\d+\.\d+"
IN_TABLES = re.compile(rf"({NUMBER})(?: \[| \| )({NUMBER})(?:, | to )({NUMBER})")
IN_SENTENCES = re.compile(rf"({NUMBER})(?: of \w+)? \[({NUMBER}), ({NUMBER})\]")


@pytest.fixture(scope="module")
def made():
    return runpy.run_path(str(ROOT / "docs/results.py"))


@pytest.fixture(scope="module")
def report(made):
    return made["report"]()


def test_the_tables_are_those_of_the_report(made, report):
    page = made["PAGE"].read_text(encoding="utf-8")
    assert made["with_tables"](page, report) == page


def near(said: Decimal, held: Decimal) -> bool:
    """Whether a figure is another one, rounded."""
    return abs(said - held) <= Decimal(5).scaleb(said.as_tuple().exponent - 1)


def triples(pattern: re.Pattern[str], text: str) -> list[tuple[Decimal, ...]]:
    """Each mean, low and high."""
    return [tuple(map(Decimal, each)) for each in pattern.findall(text)]


@pytest.mark.parametrize(
    ("file", "heading"), [("README.md", "## What it measured"), ("docs/RESULTS.md", "## What shows")]
)
def test_every_interval_in_the_sentences_is_one_of_the_report(report, file, heading):
    """Said as "0.13 [0.07, 0.19] less", it is the table's -0.129 [-0.192, -0.073]."""
    held = triples(IN_TABLES, report)
    held += [(-mean, -high, -low) for mean, low, high in held]
    text = (ROOT / file).read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    text = " ".join(re.search(rf"^{heading}.*?(?=^## )", text, re.MULTILINE | re.DOTALL)[0].split())
    said = triples(IN_SENTENCES, text)
    assert said
    assert [each for each in said if not any(all(map(near, each, other)) for other in held)] == []


def test_what_is_said_of_the_cells_that_are_made_anew():
    """Seed 0 of both, behind the former decoder and that of now."""
    found, verdicts = [], []
    for name in ("claims", "claims_now"):
        config, cells = results.read(ROOT / "docs/cells" / name)
        found.append(Cells(cells.rows, cells.subjects, [0], list(cells.by_key.values())))
        assert not found[-1].missing
        verdicts.append([judge(claim, found[-1]).verdict for claim in config.claims])

    def higher(score, subjects=found[0].subjects, at=0):
        """By how much each row of each subject is, behind the decoder of now."""
        values = [[cells.value(row, subject, 0, score, at) for row in cells.rows for subject in subjects]
                  for cells in found]  # fmt: skip
        return [new - old for old, new in zip(*values) if old is not None]

    def mean(values):
        return round(sum(values) / len(values), 3)

    page = " ".join((ROOT / "docs/RESULTS.md").read_text(encoding="utf-8").split())
    by_subject = {subject: mean(higher("subject_fidelity", [subject])) for subject in found[0].subjects}
    same, all_ = sum(one == other for one, other in zip(*verdicts)), len(verdicts[0])
    assert f"**{same} of the {all_} claims have the verdict that seed 0 has here**" in page
    assert (
        f"ID is higher by {mean(higher('subject_fidelity'))} in the mean (luna {by_subject.pop('luna')}, momo " in page
    )
    assert f"momo {by_subject.pop('momo')}, bolt {by_subject.pop('bolt')}, loop {by_subject.pop('loop')}, the " in page
    assert max(by_subject.values()) == 0.008
    assert f"text by {mean(higher('text_alignment'))}," in page
    assert max(map(abs, higher("drift", at=50) + higher("drift_class", at=50))) < 0.0015
    apart = {}
    for row, subject in ((row, subject) for row in config.trainings for subject in found[0].subjects):
        old, new = (cells.scores(row, subject, 0) for cells in found)
        apart[row, subject] = max(abs(new[score] - old[score]) for score in ("drift", "drift_class"))
    far = sorted(row for (row, _), by in apart.items() if by > 0.01)
    assert (far, len(apart)) == (["class diffusion", "custom diffusion", "custom diffusion", "w = 0.25"], 160)
    assert max(apart, key=apart.get)[0] == "w = 0.25" and round(max(apart.values()), 2) == 0.35
