"""How the bench's settings are chosen: candidates on the tuning subjects, which the tables leave out.

    python -m anchor_core.bench.tune OUT [CANDIDATE ...]

A training is plain DreamBooth. Besides the scores it is asked whether the rare word carries the subject: what the class
prompt draws under the adapter, which should be near what the untouched model draws.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.config import AdapterConfig
from ..evaluation import report
from ..evaluation.metrics import mean_pairwise_cosine
from ..sandbox import subjects
from ..training.events import Event
from ..training.settings import TrainSettings
from .personalise import ADAPTER, DREAMBOOTH, SAMPLING, SETTINGS, TUNING_SUBJECTS, Personalisation

UNTOUCHED = "untouched model"
CANDIDATES: dict[str, dict[str, Any]] = {}
"""Name -> what it changes in `SETTINGS` and `ADAPTER`, and `guidance` in `SAMPLING`."""


def run(
    out: Path,
    candidates: Mapping[str, Mapping[str, Any]],
    at: Sequence[int],
    names: Iterable[str] = TUNING_SUBJECTS,
    seed: int = 0,
) -> list[dict]:
    """Train and score every candidate at the step counts `at`; gives the rows, one a file of `out/cells`.

    What is there already, with the same options, is not made again.
    """
    cells, rows = out / "cells", []
    cells.mkdir(parents=True, exist_ok=True)
    for subject in names:
        opened: list[Personalisation] = []
        for name, options in {UNTOUCHED: {}, **candidates}.items():
            path = cells / f"{subject}-{seed}-{name.replace(' ', '_').replace(',', '')}.json"
            told = {"options": dict(options), "at": list(at)}
            held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if {key: held.get(key) for key in told} != told:
                if not opened:
                    opened.append(_open(subject, seed))
                held = {"candidate": name, "subject": subject, "seed": seed, **told}
                held["scores"] = _untouched(opened[0]) if name == UNTOUCHED else _scores(opened[0], options, at)
                report.write_json(path, held)
            rows.append(held)
    return rows


def _open(subject: str, seed: int) -> Personalisation:
    from ..backends.diffusers.denoiser import DiffusersDenoiser
    from ..sandbox import model
    from ..sandbox.judge import Judge

    return Personalisation(DiffusersDenoiser.from_pretrained(model.WEIGHTS), Judge(), subjects.get(subject), seed)


def _untouched(run: Personalisation) -> dict[str, dict[str, float]]:
    pictures = run.sample(run.subject.prompts(""))
    return {"0": {**asdict(run.score(pictures)), "class_identity": _identity(run, pictures)}}


def _identity(run: Personalisation, pictures: torch.Tensor) -> float:
    return mean_pairwise_cosine(run.judge.identity(pictures), run.judge.identity(run.references))


def _scores(run: Personalisation, options: Mapping[str, Any], at: Sequence[int]) -> dict[str, dict[str, float]]:
    options = dict(options)
    sampling = {"guidance": options.pop("guidance", SAMPLING["guidance"])}

    def of(kind: type) -> dict[str, Any]:
        return {each.name: options.pop(each.name) for each in fields(kind) if each.name in options}

    settings = DREAMBOOTH.settings(replace(SETTINGS, steps=max(at), probe_every=max(at), **of(TrainSettings)))
    adapter, found = replace(ADAPTER, **of(AdapterConfig)), {}
    if options:
        raise ValueError(f"{', '.join(options)} is no option of a training; take one of the settings' names")

    def after(event: Event) -> None:
        if event.event == "step" and event.step in at:
            probed = run.probe.measure()
            scores = run.score(run.sample(**sampling))
            of_class = run.sample(run.subject.prompts("")[1::3], **sampling)
            found[str(event.step)] = {
                **asdict(scores), "class_identity": _identity(run, of_class), "words": probed.subject,
            }  # fmt: skip

    try:
        run.fit(settings, adapter, after)
    finally:
        run.denoiser.detach()
    return found


_COLUMNS = {
    "subject_fidelity": "ID", "text_alignment": "text", "class_identity": "ID of the class prompt", "drift": "drift",
    "words": "what the subject's words do",
}  # fmt: skip


def markdown(rows: Sequence[dict]) -> str:
    """A line for each candidate and step count: the mean over subjects, and each subject's own."""
    lines = ["| candidate | steps | " + " | ".join(_COLUMNS.values()) + " |", "|" + "---|" * (len(_COLUMNS) + 2)]
    for name in dict.fromkeys(row["candidate"] for row in rows):
        own = [row["scores"] for row in rows if row["candidate"] == name]
        for step in own[0]:
            scores = [each[step] for each in own if step in each]
            lines.append(f"| {name} | {step} | " + " | ".join(_cell(scores, key) for key in _COLUMNS) + " |")
    return "\n".join(lines)


def _cell(scores: Sequence[Mapping[str, float]], key: str) -> str:
    values = [score[key] for score in scores if key in score]
    return f"{sum(values) / len(values):.3f} ({', '.join(f'{value:.2f}' for value in values)})" if values else ""


def main(arguments: Sequence[str], tell: Callable[[str], None] = print) -> None:
    out, chosen = Path(arguments[0]), arguments[1:] or list(CANDIDATES)
    torch.set_num_threads(1)
    tell(markdown(run(out, {name: CANDIDATES[name] for name in chosen}, at=(100, 200))))


if __name__ == "__main__":
    main(sys.argv[1:])
