"""`semantic-anchor bench --methods`: every method end to end, trained or sampled, in one table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..adapters.config import AdapterConfig
from ..adapters.embedding_file import adjust_embedding
from ..adapters.tokens import from_embedding, to_embedding
from ..backends.diffusers.adjust import word_rows
from ..checks import check_choice
from ..embeddings import NORM_MIX, Adjustment
from ..evaluation import report
from ..evaluation.metrics import rank
from ..guidance import make_rule
from ..objectives import matched_learning_rate
from ..sandbox import subjects
from ..training.events import Event
from ..training.methods import method_options
from ..training.settings import TrainSettings
from ..writing import whole
from .ablation import COLUMNS, cell, paired
from .personalise import ADAPTER, SETTINGS, Personalisation

BASE = "dreambooth lora"
"""The row that the others are compared with, run by run."""
PRETRAINED = "pretrained, class prompt"
EARLY = 3
"""Autoguidance's early checkpoint is of this part of the steps: a third."""

_SCALE = {"learning_rate", "steps", "batch_size", "accumulation", "rank", "guidance", "class_pictures", "flip"}
"""Options of a published method that belong to the size of its model and data: here they are `SETTINGS`'s."""


def _published(method: str) -> dict[str, Any]:
    return {name: value for name, value in method_options(method).items() if name not in _SCALE}


_ANCHOR = {"objective": "anchor", "w": 0.5}

TRAININGS: dict[str, dict[str, Any]] = {
    BASE: {"objective": "reconstruction"},
    "dreambooth lora, matched rate": {
        "objective": "reconstruction", "learning_rate": matched_learning_rate(SETTINGS.learning_rate, _ANCHOR["w"]),
    },
    "dreambooth lora, prior preservation": _published("dreambooth_lora"),
    "dreambooth": {**_published("dreambooth"), "objective": "reconstruction", "learning_rate": 2e-4},
    "dreambooth, prior preservation": {**_published("dreambooth"), "learning_rate": 2e-4},
    "dreambooth, anchored": {**_published("dreambooth"), **_ANCHOR, "learning_rate": 2e-4},
    "textual inversion": {**_published("textual_inversion"), "initial": "{class}", "learning_rate": 1e-2},
    "textual inversion, 4 vectors": {
        **_published("textual_inversion"), "initial": "{class}", "vectors": 4, "learning_rate": 1e-2,
    },
    "textual inversion, anchored": {
        **_published("textual_inversion"), **_ANCHOR, "initial": "{class}", "learning_rate": 1e-2,
    },
    "custom diffusion": {**_published("custom_diffusion"), "learning_rate": 2e-3},
    "custom diffusion, anchored": {**_published("custom_diffusion"), **_ANCHOR, "learning_rate": 2e-3},
    "svdiff": {**_published("svdiff"), "learning_rate": 5e-2},
    "oft": _published("oft"),
    "sude": {**_published("sude"), "learning_rate": 2e-4},
    "class diffusion": {**_published("class_diffusion"), "learning_rate": 2e-3},
    "anchored": _published("semantic_anchoring"),
    "anchored, blended target": {**_published("semantic_anchoring"), "objective": "blended_target"},
    "anchored, current anchor": {**_published("semantic_anchoring"), "anchor": "current"},
}  # fmt: skip
"""Row -> what it changes in `SETTINGS` and `ADAPTER`. Learning rates were chosen on rosie, a tuning subject,
of two or three for each kind of layers, by the sum of subject fidelity and text alignment."""

CLASS_PROMPT_SAMPLINGS: dict[str, dict[str, Any]] = {
    "rare-to-frequent": {"rule": "rare_to_frequent"},
    "score blend": {"rule": "score_blend"},
    "switching": {"rule": "switching"},
    "mixed": {"rule": "mixed"},
    "multi-stage": {"rule": "multi_stage"},
    "masked": {"rule": "masked"},
    "prompt adjusted": {"adjust": {"norm_mix": NORM_MIX}},
    "prompt adjusted by token": {"adjust": {"norm_mix": NORM_MIX}, "align": "token"},
}
"""Row -> its rule, or its adjustment: those that set the subject's prompt against the class's."""

SAMPLINGS: dict[str, dict[str, Any]] = {
    "guidance interval": {"rule": "cfg", "start": 0.2, "stop": 0.8},
    "autoguidance": {"rule": "autoguidance", "guidance": 2.0},
    "autoguidance, early checkpoint": {"rule": "autoguidance", "early": True, "guidance": 2.0},
    "unconditional priors": {"rule": "unconditional_priors"},
    "personalization, 0.25": {"rule": "personalization", "weak": 0.25},
    "personalization, 0.5": {"rule": "personalization", "weak": 0.5},
    "personalization, 0.75": {"rule": "personalization", "weak": 0.75},
    **CLASS_PROMPT_SAMPLINGS,
}
"""Row -> its rule and the rule's options; and `guidance` where it is not that of `SAMPLING`.

Personalization guidance at weak 0 is unconditional priors, at 1 the training's own row, as is every training's cfg.
"""

SAMPLED: dict[str, dict[str, dict[str, Any]]] = {
    BASE: SAMPLINGS,
    "textual inversion": {"token adjusted": {"adjust_token": {}}},
    "custom diffusion": CLASS_PROMPT_SAMPLINGS,
    "anchored": SAMPLINGS,
}
"""Training -> the ways in which its adapter is sampled, besides plainly.

Custom Diffusion is there because a trained word carries its subject, while class pictures hold the class in its place:
a LoRA of the embedded model moves the class as far as the subject, so that their prompts differ in next to nothing.
"""

_RANKED = ("picture_similarity", "text_alignment", "subject_fidelity")  # the roles of CLIP-I, CLIP-T and DINO
_SHOWN = ("subject_fidelity", "picture_similarity", "text_alignment", "drift", "drift_class")


def names() -> list[str]:
    """Every row, in the order of the table."""
    sampled = [f"{training} + {way}" for training in TRAININGS for way in SAMPLED.get(training, ())]
    return [PRETRAINED, *TRAININGS, *sampled]


def run(
    out: Path, subjects: Sequence[str], seeds: Sequence[int], rows: Sequence[str] = (), jobs: int | None = None,
    **overrides: Any,
) -> str:  # fmt: skip
    """Train, sample and score every row; write `report.json` and `report.md` into `out`, and give the table.

    Cells and adapters that `out` holds already are not made again, unless their options have changed; so a long run
    can be continued. The adapter of a training serves all of its samplings.

    Args:
        rows: of `names()`; none for all.
        jobs: processes, each of one thread with a subject and a seed at a time; as many as there are cores by default.
        overrides: options in place of every training's own, such as `steps` or `learning_rate`.

    Raises:
        ValueError: for a row that there is not.
    """
    rows = [check_choice("methods", row, names()) for row in rows] or names()
    for folder in ("cells", "adapters"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    runs = [(subject, seed) for subject in subjects for seed in seeds]
    with ProcessPoolExecutor(min(len(runs), jobs or os.cpu_count() or 1)) as pool:
        made = pool.map(partial(_subject_and_seed, out, rows, overrides), *zip(*runs))
        cells = [each for found in tqdm(made, total=len(runs), desc="subject x seed") for each in found]
    report.write_json(out / "report.json", {"subjects": list(subjects), "seeds": list(seeds), "cells": cells})
    table = markdown(cells)
    (out / "report.md").write_text(table + "\n", encoding="utf-8")
    return table


def _settings(options: Mapping[str, Any]) -> tuple[TrainSettings, AdapterConfig]:
    """`SETTINGS` and `ADAPTER` with these options of either."""

    def own(kind: type) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name in {field.name for field in fields(kind)}}

    settings = replace(SETTINGS, **own(TrainSettings))
    return replace(settings, probe_every=settings.steps), replace(ADAPTER, **own(AdapterConfig))


def _subject_and_seed(out: Path, rows: Sequence[str], overrides: dict[str, Any], subject: str, seed: int) -> list[dict]:
    """The cells of these rows, from files where they are there."""
    torch.set_num_threads(1)
    return list(_Run(out, subject, seed).cells(rows, overrides))


class _Run:
    """One subject and seed: its model, and its files in `out`."""

    def __init__(self, out: Path, subject: str, seed: int):
        self.out, self.subject, self.seed = out, subject, seed
        self._opened: Personalisation | None = None

    @property
    def personalisation(self) -> Personalisation:
        """Opened when a cell is missing."""
        if self._opened is None:
            from ..backends.diffusers.denoiser import DiffusersDenoiser
            from ..sandbox import model
            from ..sandbox.judge import Judge

            denoiser = DiffusersDenoiser.from_pretrained(model.WEIGHTS)
            self._opened = Personalisation(denoiser, Judge(), subjects.get(self.subject), self.seed)
        return self._opened

    def cells(self, rows: Sequence[str], overrides: dict[str, Any]) -> Iterator[dict]:
        if PRETRAINED in rows:
            yield self._held(PRETRAINED, {}) or self._pretrained()
        for training, options in TRAININGS.items():
            ways = {f"{training} + {way}": given for way, given in SAMPLED.get(training, {}).items()}
            samplings = {row: given for row, given in ways.items() if row in rows}
            if training in rows or samplings:
                yield from self._training(training, {**options, **overrides}, samplings, training in rows)

    def _pretrained(self) -> dict:
        """The model as it is, asked for the class: what text alignment is without a subject."""
        run = self.personalisation
        return self._write(PRETRAINED, {}, run.score(run.sample(run.subject.prompts(""))), 0.0)

    def _training(
        self, name: str, options: dict[str, Any], samplings: Mapping[str, dict], shown: bool
    ) -> Iterator[dict]:
        settings, config = _settings(options)
        config = replace(config, initial=config.initial.replace("{class}", subjects.get(self.subject).class_word))
        trained = {**asdict(settings), **asdict(config), "seed": self.seed}
        found = self._held(name, trained)
        try:
            if found is None:
                early = max(1, settings.steps // EARLY)
                history = self.personalisation.fit(settings, config, lambda event: self._early(event, name, early))
                self._save(name)
                found = self._write(name, trained, self._score(), history.seconds)
            if shown:
                yield found
            drifts = {key: found["scores"][key] for key in ("drift", "drift_class")}
            for row, sampling in samplings.items():
                sampled = {**trained, "sampling": sampling}
                yield self._held(row, sampled) or self._sampling(row, sampled, name, config, drifts)
        finally:
            if self._opened is not None:
                self._opened.denoiser.detach()

    def _early(self, event: Event, name: str, early: int) -> None:
        if event.event == "step" and event.step == early:
            self._save(f"{name}, early")

    def _sampling(self, row: str, options: dict[str, Any], name: str, config: AdapterConfig, drifts: dict) -> dict:
        denoiser = self.personalisation.denoiser
        if denoiser.adapter is None:
            denoiser.attach(config, seed=self.seed).load_state_dict(self._load(name))
        given = dict(options["sampling"])
        kept = {option: given.pop(option) for option in ("guidance", "adjust", "align") if option in given}
        if "adjust_token" in given:
            return self._write(row, options, self._with_token(Adjustment(**given["adjust_token"])), 0.0)
        if given.get("early"):
            denoiser.adapter.hold_early(self._load(f"{name}, early"))
        if "rule" in given:
            kept["rule"] = make_rule(given.pop("rule"), **given)
        return self._write(row, options, self._score(drifts, **kept), 0.0)

    def _with_token(self, adjustment: Adjustment):
        """Scores with the token's vectors adjusted, which are then as they were; the adjustment changes the drift."""
        run = self.personalisation
        tokens, word = run.denoiser.adapter.tokens, run.subject.class_word
        before = tokens.state_dict()
        adjusted = adjust_embedding(to_embedding(tokens), word, word_rows(run.denoiser, word), adjustment)
        tokens.load_state_dict(
            {
                f"{prefix}:tokens": each
                for prefix, each in from_embedding(adjusted, self.personalisation.denoiser.text_encoders).items()
            }
        )
        try:
            return self._score()
        finally:
            tokens.load_state_dict(before)

    def _score(self, drifts: dict | None = None, **options: Any):
        return self.personalisation.score(self.personalisation.sample(**options), drifts)

    # Files

    def _file(self, folder: str, row: str, ending: str) -> Path:
        return self.out / folder / f"{self.subject}-{self.seed}-{row.replace(', ', '-').replace(' ', '_')}{ending}"

    def _held(self, row: str, options: dict[str, Any]) -> dict | None:
        """The cell of a row, if it was made with these options."""
        file = self._file("cells", row, ".json")
        held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        return held if held is not None and held["options"] == options else None

    def _write(self, row: str, options: dict[str, Any], scores, seconds: float) -> dict:
        made = {
            "row": row, "subject": self.subject, "seed": self.seed, "options": options, "seconds": round(seconds, 1),
            "scores": asdict(scores),
        }  # fmt: skip
        report.write_json(self._file("cells", row, ".json"), made)
        return made

    def _save(self, name: str) -> None:
        from safetensors.torch import save_file

        file = self._file("adapters", name, ".safetensors")
        with whole(file) as part:
            save_file(self.personalisation.denoiser.adapter.state_dict(), part)

    def _load(self, name: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self._file("adapters", name, ".safetensors"))


def markdown(cells: Sequence[dict]) -> str:
    """Mean ± standard deviation over subjects and seeds, with the mean rank; then differences, run by run.

    These are of every row to `BASE`, and of each way of sampling to its training's own row. The rank
    of a row is over picture similarity, text alignment and subject fidelity, as in the paper's tables.
    """
    by_row = {row: [each["scores"] for each in cells if each["row"] == row] for row in names()}
    methods = {row: scores for row, scores in by_row.items() if scores and row != PRETRAINED}
    table = [[sum(score[key] for score in scores) / len(scores) for key in _RANKED] for scores in methods.values()]
    ranks = dict(zip(methods, zip(*rank(table)))) if table else {}
    head = ["method", "runs", *(COLUMNS[key][0] for key in _SHOWN), "mean rank", "place"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, scores in by_row.items():
        if scores:
            last = [f"{ranks[row][0]:.2f}", str(ranks[row][1])] if row in ranks else ["", ""]
            shown = [row, str(len(scores)), *(cell(scores, key) for key in _SHOWN), *last]
            lines.append("| " + " | ".join(shown) + " |")
    scores = {(each["row"], each["subject"], each["seed"]): each["scores"] for each in cells}
    for base in SAMPLED:
        others = [row for row in methods if row != base and (base == BASE or row.startswith(f"{base} + "))]
        if others and base in methods:
            lines += ["", f"Difference to {base}, run by run:", "", *paired(scores, others, base)]
    return "\n".join(lines)
