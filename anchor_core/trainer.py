"""The training loop: an objective, an adapter, and a history."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .checks import check_choice, check_count, check_number
from .data import Concept
from .denoiser import Denoiser, PriorBatch, Step
from .drift import DriftProbe, ProbeResult
from .objectives import ANCHORS, OBJECTIVES, Objective, make_objective, option_names

logger = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite. The adapter still holds its last finite weights."""


@dataclass(frozen=True)
class TrainSettings:
    """Everything that a training depends on besides the model, the adapter's config and the pictures.

    Args:
        objective: a name of `OBJECTIVES`.
        w: weight of the anchor term (Eq. 5); lambda = 1 / (1 + w).
        anchor: `pretrained`, or `current` for the ablation.
        prior_weight: weight of prior preservation (Eq. 2).
        steps: optimiser steps.
        learning_rate: of AdamW, constant.
        batch_size: rows of a step, drawn from shuffled epochs of the references.
        weight_decay: of AdamW.
        betas: of AdamW, each in [0, 1).
        grad_clip: largest norm of the whole gradient; 0 for no clipping.
        seed: of every draw of the training.
        probe_every: steps between two measurements of the drift probe, if one is given.
    """

    objective: str = "anchor"
    w: float = 0.5
    anchor: str = "pretrained"
    prior_weight: float = 1.0
    steps: int = 300
    learning_rate: float = 1e-3
    batch_size: int = 4
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    seed: int = 0
    probe_every: int = 50

    def __post_init__(self):
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("anchor", self.anchor, ANCHORS)
        for name in ("w", "prior_weight", "weight_decay", "grad_clip"):
            check_number(name, getattr(self, name), minimum=0)
        check_number("learning_rate", self.learning_rate, above=0)
        for name in ("steps", "batch_size", "probe_every"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, minimum=0)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas!r}, but it takes two numbers from 0 to below 1")
        for beta in self.betas:
            if check_number("betas", beta, minimum=0) >= 1:
                raise ValueError(f"betas is {self.betas!r}, but it takes two numbers from 0 to below 1")

    def make_objective(self) -> Objective:
        """The objective with those of these settings that it takes."""
        options = {"w": self.w, "anchor": self.anchor, "weight": self.prior_weight}
        return make_objective(self.objective, **{name: options[name] for name in option_names(self.objective)})


@dataclass(frozen=True)
class StepReport:
    """One finished step, counted from 1. `loss` is the sum of `terms`; `drift` is set when the probe has just run."""

    step: int
    steps: int
    loss: float
    terms: dict[str, float]
    drift: float | None = None


@dataclass
class History:
    """What happened: a loss and its weighted terms for each step made, and the probes as (steps made, result)."""

    losses: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    probes: list[tuple[int, ProbeResult]] = field(default_factory=list)
    seconds: float = 0.0
    cancelled: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers that JSON holds."""
        return {
            "losses": list(self.losses),
            "terms": {name: list(values) for name, values in self.terms.items()},
            "probes": [{"step": step, **result.to_dict()} for step, result in self.probes],
            "seconds": self.seconds,
            "cancelled": self.cancelled,
        }


def train(
    denoiser: Denoiser,
    adapter: Adapter,
    references_latents: Tensor,
    concept: Concept,
    settings: TrainSettings,
    *,
    class_latents: Tensor | None = None,
    probe: DriftProbe | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> History:
    """Train `adapter`, which is attached to `denoiser`, in place.

    Every draw comes from one CPU generator in a fixed order (references, timesteps, noise; then, for an objective
    that reads class pictures, the same three for those), so that two backends see the same training. The global
    random state is left as it was.

    Args:
        references_latents: (N, C, h, w), scaled latents of the references.
        class_latents: (M, C, h, w), for prior preservation.
        probe: measured before the first step, every `settings.probe_every` steps, and after the last.
        on_step: called after each step; what it raises ends the training and is passed on.
        should_stop: asked before each step; True ends the training with what has been learnt.

    Raises:
        TrainingDiverged: if the loss or its gradient is not finite; the weights stay as they were before that step.
        ValueError: for latents of a wrong shape, or an objective whose class pictures are missing.
    """
    objective = settings.make_objective()
    _check_latents("references_latents", references_latents)
    if objective.reads_class_pictures:
        if class_latents is None:
            raise ValueError(f"objective {objective.name!r} reads class pictures, but class_latents is None; pass them")
        _check_latents("class_latents", class_latents)
    history, started = History(), time.perf_counter()
    # ComfyUI runs nodes in inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad(), _own_random_state(denoiser.device, settings.seed):
        draw = _Draw(denoiser, references_latents, class_latents if objective.reads_class_pictures else None, settings)
        subject = [denoiser.encode_prompt(concept.subject_prompt)] * settings.batch_size
        class_ = [denoiser.encode_prompt(concept.class_prompt)] * settings.batch_size
        optimiser = torch.optim.AdamW(
            adapter.parameters(),
            lr=settings.learning_rate,
            betas=tuple(settings.betas),
            weight_decay=settings.weight_decay,
        )
        if probe is not None:
            history.probes.append((0, probe.measure()))
        for number in range(1, settings.steps + 1):
            if should_stop is not None and should_stop():
                history.cancelled = True
                break
            latents, noise, timesteps = draw.references()
            step = Step(denoiser, latents, noise, timesteps, subject, class_, draw.prior())
            with adapter.dropout():
                terms = objective(step)
                loss = sum(terms.values())
                _update(loss, adapter, optimiser, settings, number)
            _record(history, loss, terms)
            measured = probe is not None and (number % settings.probe_every == 0 or number == settings.steps)
            if measured:
                history.probes.append((number, probe.measure()))
            history.seconds = time.perf_counter() - started
            if on_step is not None:
                drift = history.probes[-1][1].drift if measured else None
                on_step(StepReport(number, settings.steps, history.losses[-1], _last(history.terms), drift))
        made = len(history.losses)
        if probe is not None and history.probes[-1][0] != made:
            history.probes.append((made, probe.measure()))
    history.seconds = time.perf_counter() - started
    logger.info("trained %d of %d steps in %.1f s", made, settings.steps, history.seconds)
    return history


class _Draw:
    """The random part of a step, always drawn in float32 on the CPU."""

    def __init__(self, denoiser: Denoiser, references: Tensor, class_: Tensor | None, settings: TrainSettings):
        self.denoiser = denoiser
        self.batch = settings.batch_size
        self.generator = torch.Generator().manual_seed(settings.seed)
        # A copy made here is a normal tensor, even where the latents are inference tensors.
        self._references = (references.detach().to(denoiser.device, torch.float32, copy=True), [])
        self._class = None if class_ is None else (class_.detach().to(denoiser.device, torch.float32, copy=True), [])

    def _rows(self, latents: Tensor, deck: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        while len(deck) < self.batch:
            deck += torch.randperm(len(latents), generator=self.generator).tolist()
        rows = latents[torch.tensor([deck.pop(0) for _ in range(self.batch)], device=latents.device)]
        timesteps = self.denoiser.timesteps(torch.rand(self.batch, generator=self.generator, dtype=torch.float64))
        noise = torch.randn(rows.shape, generator=self.generator)
        return rows, noise.to(rows.device), timesteps.to(rows.device)

    def references(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and noise (B, C, h, w), timesteps (B,)."""
        return self._rows(*self._references)

    def prior(self) -> PriorBatch | None:
        if self._class is None:
            return None
        latents, noise, timesteps = self._rows(*self._class)
        return PriorBatch(latents, noise, timesteps)


def _update(
    loss: Tensor, adapter: Adapter, optimiser: torch.optim.Optimizer, settings: TrainSettings, number: int
) -> None:
    value = loss.item()
    if not math.isfinite(value):
        raise _diverged("loss", value, number, settings)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), settings.grad_clip or math.inf).item()
    if not math.isfinite(norm):
        raise _diverged("gradient", norm, number, settings)
    optimiser.step()


def _diverged(what: str, value: float, number: int, settings: TrainSettings) -> TrainingDiverged:
    return TrainingDiverged(
        f"the {what} became {value} at step {number} of {settings.steps}; "
        f"take a learning_rate below {settings.learning_rate:g}, and pictures and latents without NaN"
    )


def _record(history: History, loss: Tensor, terms: dict[str, Tensor]) -> None:
    history.losses.append(loss.item())
    for name, term in terms.items():
        history.terms.setdefault(name, []).append(term.item())


def _last(terms: dict[str, list[float]]) -> dict[str, float]:
    return {name: values[-1] for name, values in terms.items()}


def _check_latents(name: str, latents: Tensor) -> None:
    if latents.ndim != 4 or not len(latents):
        raise ValueError(f"{name} is {tuple(latents.shape)}, but it takes (N, C, h, w) with at least one picture")


@contextmanager
def _own_random_state(device: torch.device, seed: int) -> Iterator[None]:
    """A random state of the training's own, which only dropout uses."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
