"""The check-up of an adapter: what it does to a model with and without its word, where, and how much of it is good.

One function, `check_up`, for the node and the verb. All distances are of predictions at the same z_t, in epsilon
(`drift`), with the adapter and without; nothing but the adapter is taken from its file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.changes import Change, changes, place
from ..adapters.metadata import recommended_guidance
from ..adapters.stated import Prompts
from ..checks import shown
from ..data.prepare import sample_latents
from ..denoiser import Denoiser
from ..drift import ProbePoints
from .settings import CheckupSettings
from .verdict import words

HIGHEST = 2.0
"""The highest strength that is tried."""

HALVINGS = 6
"""Of an interval of strengths of length 1: to 1/64."""

WEAKS = (0.0, 0.25, 0.5, 0.75, 1.0)

Tick = Callable[[int, int], None]
"""Told how much of the work is done, and of how much; what it raises ends the check-up."""


def check_up(
    denoiser: Denoiser,
    attach: Callable[[], Adapter],
    metadata: Mapping[str, str],
    prompts: Prompts,
    *,
    latents: Tensor | None,
    shape: tuple[int, int, int],
    settings: CheckupSettings | None = None,
    tick: Tick = lambda done, of: None,
) -> dict[str, Any]:
    """Measure an adapter on a denoiser that has none; it has none afterwards.

    Args:
        attach: puts the adapter into `denoiser`: `attach_file` or `attach_tensors`.
        metadata: of its file, for the guidance scale that it recommends.
        prompts: `stated.prompts_of` the file; without a subject prompt nothing is said of the trigger word.
        latents: (N, C, h, w) to measure on, of references or class pictures; None for class pictures that the untouched
            model makes, of `shape`, (C, h, w).

    Returns:
        the report, in lists, texts and numbers that JSON takes. Distances are means over the points of L2 norms over
        C, h, w in epsilon; `of_prompt` is such a distance over `prompt_effect`, that between the untouched model's
        predictions for the class prompt and for the empty one.

    Raises:
        ValueError: what `attach` refuses.
    """
    settings = settings or CheckupSettings()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        measured = "given pictures" if latents is not None else "class pictures made by the untouched model"
        adapter = attach()
        stack.callback(denoiser.detach)
        if latents is None:
            options = {"seed": settings.seed, "steps": settings.steps, "batch_size": 1, "gap": lambda: tick(0, 1)}
            latents = sample_latents(denoiser, prompts.class_prompt, settings.count, shape, **options)
        points = ProbePoints(denoiser, latents, settings.timesteps, settings.noises, settings.seed)
        work = _Work(denoiser, adapter, points, prompts, tick)
        report = {
            "prompts": asdict(prompts),
            "measured_on": {"latents": measured, "pictures": len(latents), **asdict(settings)},
            **_predictions(work),
            "weights": _weights(list(work.changes())),
        }
        report["strength"] = _strength(work, settings.budget, report["without_trigger"]["class"]["of_prompt"])
        report["suggested"] = _suggested(work, report["strength"], metadata, settings.budget)
        work.finish()
    return {**report, "verdict": words(report)}


def about_file(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a report says of the file itself, fit to be shown: `adapter`, its name, and `metadata`."""
    said = {shown(key): shown(value, 1000) for key, value in sorted(metadata.items())[:200]}
    return {"adapter": shown(name), "metadata": said}


class _Work:
    """An adapter's predictions on the points, as errors in epsilon on the CPU, (P, C, h, w), and how much is left."""

    def __init__(self, denoiser: Denoiser, adapter: Adapter, points: ProbePoints, prompts: Prompts, tick: Tick):
        self.denoiser, self.adapter, self.points, self.tick = denoiser, adapter, points, tick
        self.prompts = {"class": prompts.class_prompt, "empty": ""}
        if prompts.subject:
            self.prompts["subject"] = prompts.subject
        self.conditions = dict(zip(self.prompts, denoiser.encode_prompts(list(self.prompts.values()))))
        passes = 2 * len(self.prompts) + HALVINGS + 2 + len(WEAKS)
        self.done, self.all = 0, passes * len(list(points)) + len(adapter.module_names)
        self.untouched = {name: self.errors(name, 0.0) for name in self.prompts}
        self.prompt_effect = _mean(self.untouched["class"] - self.untouched["empty"])

    def errors(self, name: str, strength: float) -> Tensor:
        """eps_theta(z_t, c, t) - eps of one prompt at this strength of the adapter; 0 is the untouched network."""
        with ExitStack() as stack:
            if strength == 0:
                stack.enter_context(self.denoiser.adapter_disabled())
            elif strength != 1:
                stack.enter_context(self.adapter.scaled(strength))
            condition = self.conditions[name]
            if strength and self.adapter.config.trains_text:
                condition = self.denoiser.encode_prompt(self.prompts[name], adapted=True)
            parts = []
            for rows in self.points:
                self._one_more()
                parts.append(self.points.errors(rows, condition).cpu())
        return torch.cat(parts)

    def of_prompt(self, difference: Tensor) -> float:
        """The mean norm of a difference over that of the prompt's own effect."""
        return _mean(difference) / max(self.prompt_effect, 1e-12)

    def changes(self) -> Iterator[Change]:
        for change in changes(self.adapter, self.denoiser.file_keys(), self.denoiser.weight_of):
            self._one_more()
            yield change

    def _one_more(self) -> None:
        self.tick(min(self.done, self.all - 1), self.all)
        self.done += 1

    def finish(self) -> None:
        self.tick(self.all, self.all)


def _norms(difference: Tensor) -> Tensor:
    return difference.flatten(1).norm(dim=1).double()


def _mean(difference: Tensor) -> float:
    return _norms(difference).mean().item()


# --- what it does to predictions ----------------------------------------------------------------------------------


def _predictions(work: _Work) -> dict[str, Any]:
    """The changes of each prompt's prediction at strength 1, in all and by timestep."""
    untouched, points = work.untouched, work.points
    adapted = {name: work.errors(name, 1.0) for name in work.prompts}
    work.adapted = adapted
    noise = torch.cat([rows[1].cpu() for rows in points])
    moved = {name: adapted[name] - untouched[name] for name in work.prompts}
    trigger = _mean(moved["subject"]) if "subject" in moved else None

    def told(name: str) -> dict[str, float | None]:
        change = _mean(moved[name])
        return {
            "change": change,
            "of_prediction": change / _mean(noise + untouched[name]),
            "of_prompt": work.of_prompt(moved[name]),
            "of_trigger": change / trigger if trigger else None,
        }

    curves = {f"{name}_change": _norms(difference) for name, difference in moved.items()}
    curves["prompt_effect"] = _norms(untouched["class"] - untouched["empty"])
    if trigger is not None:
        curves["drift"] = _norms(adapted["subject"] - untouched["class"])  # Fig. 8b
        curves["drift_without"] = _norms(untouched["subject"] - untouched["class"])
    return {
        "prompt_effect": work.prompt_effect,
        "without_trigger": {"class": told("class"), "empty": told("empty")},
        "with_trigger": None if trigger is None else told("subject"),
        "by_timestep": {
            "timestep": points.grid.double().tolist(),
            **{name: points.by_timestep(values) for name, values in curves.items()},
        },
    }


# --- what it does to weights --------------------------------------------------------------------------------------


def _weights(layers: Sequence[Change]) -> dict[str, Any]:
    """Each layer's and each block's share of the squared Frobenius norm of the whole change, and effective ranks."""
    layers = sorted(layers, key=lambda change: place(change.layer))
    total = sum(change.norm**2 for change in layers)
    blocks: dict[str, float] = {}
    for change in layers:
        blocks[change.block] = blocks.get(change.block, 0.0) + change.norm**2
    ranks = [change.effective_rank for change in layers]
    return {
        "norm": total**0.5,
        "effective_rank": {"median": median(ranks), "least": min(ranks), "most": max(ranks)} if ranks else None,
        "blocks": [{"block": name, "share": square / total if total else 0.0} for name, square in blocks.items()],
        "layers": [{**asdict(change), "share": change.norm**2 / total if total else 0.0} for change in layers],
    }


# --- how much of it is good ---------------------------------------------------------------------------------------


def _strength(work: _Work, budget: float, at_one: float) -> dict[str, Any]:
    """Where the class prompt's change passes the budget, by halving the interval of strengths with real predictions."""
    tried = {0.0: 0.0, 1.0: at_one}

    def change(strength: float) -> float:
        tried[strength] = work.of_prompt(work.errors("class", strength) - work.untouched["class"])
        return tried[strength]

    low, high = (0.0, 1.0) if at_one > budget else (1.0, HIGHEST)
    passed = at_one > budget or change(HIGHEST) > budget
    for _ in range(HALVINGS if passed else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if change(middle) > budget else (middle, high)
    return {"budget": budget, "passes_at": high if passed else None, "within": low if passed else HIGHEST,
            "tried": sorted(map(list, tried.items()))}  # fmt: skip


def _suggested(work: _Work, strength: dict[str, Any], metadata: Mapping[str, str], budget: float) -> dict[str, Any]:
    """A strength, and a `weak` of personalization guidance: the lowest that keeps the guided class within the budget.

    Guided by g away from the weak model's empty prompt, the class prompt's prediction changes by
    g (eps_theta(c) - eps_theta'(c)) - (g - 1) (eps_weak(null) - eps_theta'(null)), all of real predictions.
    """
    chosen = min(1.0, int(20 * strength["within"]) / 20) or strength["within"]
    guidance = recommended_guidance(metadata)
    if work.denoiser.family in ("flux", "flux2"):  # the scale is told to the network, which makes one prediction
        return {"strength": chosen, "weak": None, "guidance": None, "tried": []}
    full = work.errors("class", chosen) - work.untouched["class"]
    tried = []
    for weak in WEAKS:
        empty = work.errors("empty", weak * chosen) - work.untouched["empty"] if weak else torch.zeros_like(full)
        tried.append([weak, work.of_prompt(guidance * full - (guidance - 1) * empty)])
    within = [weak for weak, change in tried if change <= budget]
    weak = within[0] if within else min(tried, key=lambda each: each[1])[0]
    return {"strength": chosen, "weak": weak, "guidance": guidance, "tried": tried}
