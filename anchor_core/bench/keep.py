"""`semantic-anchor bench --keep`: whether `keep="best"` picks a better adapter than the last of a training too long."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..evaluation import report
from .personalise import ADAPTER, ANCHORED, DREAMBOOTH, SETTINGS, Personalisation, Scores

STEPS = 300
KEYS = {"subject_fidelity": "ID", "text_alignment": "text", "drift": "drift"}


def run(out: Path, subjects: Sequence[str], seeds: Sequence[int], **changes: Any) -> None:
    """Train each subject and seed with and without the anchor; score the last and the best adapter.

    `changes` are of the settings: the sandbox's own for 300 steps.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = replace(SETTINGS, **{"steps": STEPS, "probe_every": 20, "keep": "best", **changes})
    jobs = [(name, seed, method, settings) for name in subjects for seed in seeds for method in (DREAMBOOTH, ANCHORED)]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        rows = list(tqdm(pool.map(_one, jobs), total=len(jobs), desc="trainings"))
    report.write_json(out / "report.json", {"settings": asdict(settings), "rows": rows})
    text = markdown(rows)
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def _one(job) -> dict:
    from ..backends.diffusers.denoiser import DiffusersDenoiser
    from ..sandbox import model
    from ..sandbox import subjects as held_out
    from ..sandbox.judge import Judge

    name, seed, method, settings = job
    torch.set_num_threads(1)
    personalisation = Personalisation(
        DiffusersDenoiser.from_pretrained(model.WEIGHTS), Judge(), held_out.get(name), seed
    )
    last: dict[int, Scores] = {}
    history = personalisation.train(method, settings, ADAPTER, at=[settings.steps], on_scores=last.__setitem__)
    best = personalisation.score(personalisation.sample())
    return {
        "subject": name,
        "seed": seed,
        "method": method.name,
        "kept": history.kept,
        "last": asdict(last[settings.steps]),
        "best": asdict(best),
    }


def markdown(rows: Sequence[dict]) -> str:
    """A line for each training: last -> best."""
    lines = [
        "| method | subject | seed | kept step | "
        + " | ".join(f"{label}, last -> best" for label in KEYS.values())
        + " |"
    ]
    lines.append("|" + "---|" * (len(KEYS) + 4))
    for row in rows:
        cells = [f"{row['last'][key]:.3f} -> {row['best'][key]:.3f}" for key in KEYS]
        lines.append(
            f"| {row['method']} | {row['subject']} | {row['seed']} | {row['kept']} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)
