"""Writes the tables of docs/RESULTS.md: what `semantic-anchor bench report docs/cells/claims` prints of them.

Usage: python docs/results.py. The sentences around the tables are written by hand; tests/bench/test_results_page.py
holds the intervals in them, and those of README.md and the help, to the tables.
"""

from __future__ import annotations

import re
from pathlib import Path

from anchor_core.bench import results
from anchor_core.bench.claims import judge

ROOT = Path(__file__).resolve().parents[1]
PAGE, CELLS = ROOT / "docs/RESULTS.md", ROOT / "docs/cells/claims"
FIRST, AFTER = "### After 50 steps", "## What shows, and what does not"


def report() -> str:
    """What the command prints of the cells that are kept here, without its plots."""
    config, cells = results.read(CELLS)
    return results.markdown(config, cells, [judge(claim, cells) for claim in config.claims])


def section(text: str, heading: str) -> str:
    """What stands under a heading of the report."""
    found = re.search(rf"^## {re.escape(heading)}\n\n(.*?)\s*(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"the report has no heading {heading!r}")
    return found[1]


def with_tables(page: str, text: str) -> str:
    """The page with the tables of a report in place of those that it has; the table of 25 steps is left out."""
    before, _, rest = page.partition(FIRST)
    after = rest[rest.index(AFTER) :]
    tables = [
        *(FIRST, section(text, "After 50 steps")),
        *("### After 80 steps", section(text, "At the end of each training")),
        *("## The claims", section(text, "Claims")),
    ]
    return before + "\n\n".join(tables) + "\n\n" + after


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_tables(page, report()), encoding="utf-8")
