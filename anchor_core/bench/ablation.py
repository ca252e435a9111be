"""`semantic-anchor bench`: the three methods, w from 0 to 1, the matched learning rate, over subjects and seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..evaluation import report
from ..training.settings import TrainSettings
from .personalise import (
    ADAPTER,
    DREAMBOOTH,
    PRIOR_PRESERVATION,
    SETTINGS,
    TABLE_SUBJECTS,
    TUNING_SUBJECTS,
    Method,
    Personalisation,
    Scores,
)

__all__ = ["METHODS", "SETTINGS", "TABLE_SUBJECTS", "TUNING_SUBJECTS", "markdown", "run"]

WEIGHTS = (0.25, 0.5, 0.75, 1.0)
METHODS = (
    DREAMBOOTH,  # which is w = 0
    PRIOR_PRESERVATION,
    *(Method(f"w = {w:g}", "anchor", w=w) for w in WEIGHTS),
    Method("DreamBooth, rate x 1.5", "reconstruction", w=0.5, matched=True),
)
COLUMNS = {
    "subject_fidelity": ("ID", 3),
    "picture_similarity": ("picture", 3),
    "text_alignment": ("text", 3),
    "shape": ("shape", 2),
    "background": ("background", 2),
    "accessory": ("accessory", 2),
    "drift": ("drift, references", 2),
    "drift_class": ("drift, class", 2),
}


def run(
    out: Path, subjects: Sequence[str], seeds: Sequence[int], at: Sequence[int], settings: TrainSettings = SETTINGS
) -> None:
    """Train and score every method; write `report.json` and `report.md` into `out`.

    Cells that `out/cells` holds already are not computed again, so that a long run can be continued.
    """
    cells = out / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    settings = replace(settings, steps=max(at), probe_every=max(at))  # the scores measure the drift
    jobs = [(cells, name, seed, tuple(at), settings) for name in subjects for seed in seeds]
    # One thread each: two runs side by side are faster than one run on two cores.
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        list(tqdm(pool.map(_subject_and_seed, jobs), total=len(jobs), desc="subject x seed"))
    rows = [json.loads(path.read_text()) for path in sorted(cells.glob("*.json"))]
    wanted = {(name, seed) for name in subjects for seed in seeds}
    rows = [row for row in rows if (row["subject"], row["seed"]) in wanted and row["rate"] == settings.learning_rate]
    result = {"subjects": list(subjects), "seeds": list(seeds), "settings": asdict(settings), "cells": rows}
    report.write_json(out / "report.json", result)
    (out / "report.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


def _subject_and_seed(job) -> None:
    from ..backends.diffusers.denoiser import DiffusersDenoiser
    from ..sandbox import model
    from ..sandbox import subjects as held_out
    from ..sandbox.judge import Judge

    cells, name, seed, at, settings = job
    torch.set_num_threads(1)
    personalisation = None
    for method in METHODS:
        path = cells / f"{name}-{seed}-{settings.learning_rate:g}-{method.name.replace(' ', '_')}.json"
        if path.exists():
            continue
        if personalisation is None:
            denoiser = DiffusersDenoiser.from_pretrained(model.WEIGHTS)
            personalisation = Personalisation(denoiser, Judge(), held_out.get(name), seed)
            _pretrained(cells / f"{name}-{seed}-{settings.learning_rate:g}-pretrained.json", personalisation, settings)
        scores: dict[int, Scores] = {}
        try:
            history = personalisation.train(method, settings, ADAPTER, at=at, on_scores=scores.__setitem__)
        finally:
            denoiser.detach()
        _write(path, personalisation, method.name, settings, scores, history.seconds)


def _pretrained(path: Path, personalisation: Personalisation, settings: TrainSettings) -> None:
    """The model as it is, asked for the class: what text alignment is without a subject."""
    pictures = personalisation.sample(personalisation.subject.prompts(""))
    _write(path, personalisation, "pretrained, class prompt", settings, {0: personalisation.score(pictures)}, 0.0)


def _write(path: Path, personalisation, method: str, settings: TrainSettings, scores, seconds: float) -> None:
    row = {
        "subject": personalisation.subject.name,
        "seed": personalisation.seed,
        "rate": settings.learning_rate,
        "method": method,
        "seconds": round(seconds, 1),
        "scores": {str(step): asdict(score) for step, score in scores.items()},
    }
    report.write_json(path, row)


def markdown(rows: Sequence[dict]) -> str:
    """One table for each step count: mean over subjects and seeds, and the spread (standard deviation) of the cells."""
    order = ["pretrained, class prompt", *(method.name for method in METHODS)]
    steps = sorted({int(step) for row in rows for step in row["scores"]})
    lines = []
    for step in [s for s in steps if s > 0]:
        lines += [f"### After {step} steps", ""]
        lines.append("| method | cells | " + " | ".join(label for label, _ in COLUMNS.values()) + " |")
        lines.append("|" + "---|" * (len(COLUMNS) + 2))
        for method in order:
            scores = [row["scores"].get(str(step), row["scores"].get("0")) for row in rows if row["method"] == method]
            scores = [score for score in scores if score is not None]
            if scores:
                lines.append(f"| {method} | {len(scores)} | " + " | ".join(cell(scores, key) for key in COLUMNS) + " |")
        lines += ["", f"Difference to dreambooth after {step} steps, run by run:", "", *_paired(rows, str(step)), ""]
    return "\n".join(lines)


def _paired(rows: Sequence[dict], step: str) -> list[str]:
    scores = {(row["method"], row["subject"], row["seed"]): row["scores"].get(step) for row in rows}
    return paired(scores, [method.name for method in METHODS[1:]], DREAMBOOTH.name)


def paired(scores: Mapping[tuple, Mapping[str, float] | None], methods: Sequence[str], base: str) -> list[str]:
    """The same subject and seed under each method and under `base`: subjects differ more than methods do.

    `scores` is by (method, subject, seed); gives the lines of a table of the differences.
    """
    keys = ("subject_fidelity", "text_alignment", "drift", "drift_class")
    lines = ["| method | runs | " + " | ".join(COLUMNS[key][0] for key in keys) + " |", "|" + "---|" * (len(keys) + 2)]
    for method in methods:
        pairs = [(found, scores.get((base, *run))) for (name, *run), found in scores.items() if name == method]
        differences = [{key: ours[key] - theirs[key] for key in keys} for ours, theirs in pairs if ours and theirs]
        if differences:
            cells = " | ".join(cell(differences, key) for key in keys)
            lines.append(f"| {method} | {len(differences)} | {cells} |")
    return lines


def cell(scores: Sequence[Mapping[str, float]], key: str) -> str:
    """Mean ± standard deviation."""
    digits = COLUMNS[key][1]
    values = np.array([score[key] for score in scores])
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():.{digits}f} ± {spread:.{digits}f}"
