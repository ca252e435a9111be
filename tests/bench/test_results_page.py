"""docs/RESULTS.md, README.md and a help page against the cells that are kept beside them."""

from __future__ import annotations

import re
import runpy
from decimal import Decimal
from pathlib import Path

import pytest

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
    ("file", "heading"),
    [
        ("README.md", "## What it measured"),
        ("docs/RESULTS.md", "## What shows"),
        *((f"web/docs/AnchorGuidance{page}.md", "# ") for page in ("", "/ja", "/ko", "/zh")),
    ],
)
def test_every_interval_in_the_sentences_is_one_of_the_report(report, file, heading):
    """Said as "0.13 [0.07, 0.19] less", it is the table's -0.129 [-0.192, -0.073]."""
    held = triples(IN_TABLES, report)
    held += [(-mean, -high, -low) for mean, low, high in held]
    text = (ROOT / file).read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    text = " ".join(re.search(rf"^{heading}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[0].split())
    said = triples(IN_SENTENCES, text)
    assert said
    assert [each for each in said if not any(all(map(near, each, other)) for other in held)] == []
