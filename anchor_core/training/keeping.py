"""Which of the measured adapters a training keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

NEAR = 0.1
"""Share of the best measurement's gain that the kept one may miss."""


class Candidates:
    """The measured adapters that may still be kept.

    `last` keeps the last one. `best` goes by a score that falls while the training is worth its drift, and keeps the
    earliest measurement that gained, over the first one, at least 1 - `NEAR` of what the best one gained. The least
    score itself comes late: past the bend of the curve each step still fits the pictures a little better, while the
    subject and the text of new pictures get worse (docs/TRAINING.md).

    Args:
        keep: `best` or `last`.
    """

    def __init__(self, keep: str):
        self.keep = keep
        self._first: float | None = None
        self._held: list[dict[str, Any]] = []  # falling scores: a later one that is no better can never be kept

    def offer(self, step: int, score: float, weights: Callable[[], dict[str, Tensor]]) -> None:
        """A measurement after `step` steps; `weights` are asked for if it may be kept."""
        if self._first is None:
            self._first = score
        near: list[dict[str, Any]] = []
        if self.keep == "best":
            if self._held and score >= self._held[-1]["score"]:
                return
            limit = score + NEAR * (self._first - score)
            near = [held for held in self._held if held["score"] <= limit]
        self._held = [*near, {"step": step, "score": score, "weights": weights()}]

    @property
    def kept(self) -> dict[str, Any] | None:
        """`step` and `weights` of the one to keep; None before the first offer."""
        return self._held[0] if self._held else None

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "held": self._held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._held = state["first"], state["held"]
