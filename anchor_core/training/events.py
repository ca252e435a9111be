"""What a training tells while it goes on: one stream of plain events, each with a dict form that JSON takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..drift import ProbeResult
from .history import History

PHASES = ("preparing", "class_pictures", "measuring", "training", "paused", "saving")
"""Pictures and prompts are encoded; class pictures made; the probe's pretrained predictions; the loop; the file."""

ENDINGS = ("finished", "stopped", "cancelled", "over_budget", "diverged", "failed")


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    event: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """`event` and the fields, in lists, texts and numbers; NaN and infinity are null, as JSON has neither."""
        return {"event": self.event, **{each.name: _plain(getattr(self, each.name)) for each in fields(self)}}


@dataclass(frozen=True)
class PhaseBegun(Event):
    """`phase` of `PHASES` has begun; "training" again where a pause ends."""

    event = "phase"
    phase: str


@dataclass(frozen=True)
class Resumed(Event):
    """The training goes on after `step` steps of an earlier one, whose `history` is told before any new step."""

    event = "resumed"
    step: int
    history: History


@dataclass(frozen=True)
class Fitted(Event):
    """`settings` that were chosen otherwise than given, so that a step fits in the memory, by name."""

    event = "fitted"
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class StepMade(Event):
    """One finished step, counted from 1. `loss` is the sum of `terms`; `seconds` are those of the loop so far.

    `distances` are Fig. 8a (`reconstruction`) and 8b (`drift`) of the step's own predictions, where it has them.
    """

    event = "step"
    step: int
    steps: int
    loss: float
    terms: Mapping[str, float]
    seconds: float = 0.0
    distances: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured(Event):
    """The drift probe after `step` steps, 0 before the first."""

    event = "measured"
    step: int
    result: ProbeResult


@dataclass(frozen=True)
class PictureMade(Event):
    """A sample of `prompt` after `step` steps: `pixels`, (3, H, W) in [0, 1] on the CPU; as a dict their shape."""

    event = "picture"
    step: int
    prompt: str
    pixels: Tensor


@dataclass(frozen=True)
class Saved(Event):
    """The adapter of `step` steps is in `files`: its own, then that of its token vectors where it has them."""

    event = "saved"
    step: int
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Described(Event):
    """What made the adapter that was kept, and its files' hashes: `provenance`."""

    event = "described"
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Ended(Event):
    """The last event: how it ended (of `ENDINGS`), the step whose weights were kept, the steps made, and why."""

    event = "ended"
    how: str
    kept: int
    made: int
    reason: str = ""


Tell = Callable[[Event], None]
"""A listener. What it raises ends the training, which keeps the steps made, and is passed on."""


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, (ProbeResult, History)):
        return _plain(value.to_dict())
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
