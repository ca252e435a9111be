"""The cells of a benchmark: a file for each subject, seed and row, written once."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.folder import read_text
from ..evaluation.report import write_json

SCORES = {
    "subject_fidelity": "ID",
    "picture_similarity": "picture",
    "text_alignment": "text",
    "shape": "shape",
    "background": "background",
    "accessory": "accessory",
    "drift": "drift, references",
    "drift_class": "drift, class",
}
"""Each score and its column. The first three are DINO, CLIP-I and CLIP-T, or the sandbox's judge in their roles."""

CURVES = {
    "reconstruction": "error on the pictures (Fig. 8a)",
    "drift": "drift (Fig. 8b)",
    "objective": "Eq. 5 (Fig. 8c)",
    "class_drift": "drift of the class prompt",
    "subject": "what the subject's words do",
}
"""What is measured in a training every `probe_every` steps."""

MAX_BYTES = 2**24


def slug(row: str) -> str:
    """A row as the name of a folder on any system: its letters, and what tells it from others of the same letters."""
    letters = re.sub(r"[^a-z0-9.=]+", "_", row.lower()).strip("_.")[:60]
    return f"{letters}-{hashlib.sha256(row.encode()).hexdigest()[:6]}"


def cell_file(out: Path, row: str, subject: str, seed: int) -> Path:
    return out / "cells" / slug(row) / f"{subject}-{seed}.json"


def read_cell(out: Path, row: str, subject: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The cell, if it was made with these options; None if there is none.

    Raises:
        ValueError: if its file cannot be read.
    """
    file = cell_file(out, row, subject, seed)
    if not file.is_file():
        return None
    try:
        held = json.loads(read_text(file, MAX_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it, and its cell is made again") from error
    return held if isinstance(held, dict) and held.get("options") == json.loads(json.dumps(options)) else None


def write_cell(out: Path, cell: Mapping[str, Any]) -> None:
    file = cell_file(out, cell["row"], cell["subject"], cell["seed"])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, cell)


class Cells:
    """Cells that are there, by row, subject and seed.

    Args:
        rows: in the order of the tables.
        cells: those found; one with `failed` has no scores.
    """

    def __init__(self, rows: Sequence[str], subjects: Sequence[str], seeds: Sequence[int], cells: Sequence[dict]):
        self.rows, self.subjects, self.seeds = list(rows), list(subjects), list(seeds)
        self.by_key = {(cell["row"], cell["subject"], cell["seed"]): cell for cell in cells if "failed" not in cell}
        self.failed = [cell for cell in cells if "failed" in cell]

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Every subject and seed that was asked for."""
        return [(subject, seed) for subject in self.subjects for seed in self.seeds]

    @property
    def missing(self) -> list[str]:
        """What was asked for and is not there, each by its name."""
        keys = [(row, *run) for row in self.rows for run in self.runs]
        failed = {(cell["row"], cell["subject"], cell["seed"]) for cell in self.failed}
        return [f"{row}, {subject}, seed {seed}" for row, subject, seed in keys
                if (row, subject, seed) not in self.by_key and (row, subject, seed) not in failed]  # fmt: skip

    @cached_property
    def steps(self) -> list[int]:
        """Every step count at which some training was scored."""
        return sorted({int(step) for cell in self.by_key.values() for step in cell["scores"]} - {0})

    def scores(self, row: str, subject: str, seed: int, at: int = 0) -> Mapping[str, float] | None:
        """The scores of a run after `at` steps, or at its end; None without them. The model alone has one for all."""
        cell = self.by_key.get((row, subject, seed))
        if cell is None:
            return None
        scores = cell["scores"]
        if "0" in scores or not at:
            return scores[max(scores, key=int)]
        return scores.get(str(at))

    def value(self, row: str, subject: str, seed: int, score: str, at: int = 0) -> float | None:
        return (self.scores(row, subject, seed, at) or {}).get(score)

    def values(self, row: str, score: str, at: int = 0) -> dict[str, list[float]]:
        """By subject, one a seed that has it."""
        found: dict[str, list[float]] = {}
        for subject, seed in self.runs:
            value = self.value(row, subject, seed, score, at)
            if value is not None:
                found.setdefault(subject, []).append(value)
        return found

    def line(
        self, rows: Sequence[str], subject: str, seed: int, across: str, up: str
    ) -> list[tuple[float, float]] | None:
        """Points of two scores: of one training over its step counts, or of several rows at their ends."""
        if len(rows) == 1:
            cell = self.by_key.get((rows[0], subject, seed))
            found = [] if cell is None else [cell["scores"][step] for step in sorted(cell["scores"], key=int)]
        else:
            found = [self.scores(row, subject, seed) for row in rows]
        if not found or any(each is None or across not in each or up not in each for each in found):
            return None
        return [(each[across], each[up]) for each in found]

    def curve(self, row: str, subject: str, seed: int, quantity: str) -> list[tuple[int, float]] | None:
        """(step, value) of what a training measured as it went."""
        cell = self.by_key.get((row, subject, seed))
        found = None if cell is None else cell.get("curve")
        return [(point["step"], point[quantity]) for point in found] if found else None
