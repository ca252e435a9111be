"""What happened in a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..drift import LEVELS, ProbeResult


@dataclass
class History:
    """What happened: a loss and its weighted terms for each step made, and the probes as (steps made, result).

    Attributes:
        kept: the step whose weights the adapter was left with.
        cancelled, stopped: the order that ended the training.
        over_budget: `stop_on_drift` ended it.
        distances: by step, from its own predictions (`drift.tally`): `reconstruction` (Fig. 8a) and, where the
            objective has the pretrained anchor, `drift` (Fig. 8b), the means over its rows. Fig. 8c is `losses`.
        levels: the same by timestep: of each tenth of 0 ... 1000 how many rows there were in all steps, and the sums of
            the two distances over them.
    """

    losses: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    probes: list[tuple[int, ProbeResult]] = field(default_factory=list)
    seconds: float = 0.0
    kept: int = 0
    cancelled: bool = False
    over_budget: bool = False
    stopped: bool = False
    distances: dict[str, list[float]] = field(default_factory=dict)
    levels: list[list[float]] = field(default_factory=lambda: [[0.0] * 3 for _ in range(LEVELS)])

    def add(self, terms: Mapping[str, float], tallied: Sequence[float]) -> dict[str, float]:
        """One step more: its terms, and the 3 LEVELS numbers of its tally; gives its distances."""
        counts, *sums = (tallied[i : i + LEVELS] for i in range(0, 3 * LEVELS, LEVELS))
        self.losses.append(sum(terms.values()))
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value)
        means = {name: sum(each) / sum(counts) for name, each in zip(("reconstruction", "drift"), sums)}
        means = {name: value for name, value in means.items() if math.isfinite(value)}
        for name, value in means.items():
            self.distances.setdefault(name, []).append(value)
        for level, own in zip(self.levels, zip(counts, *sums)):
            for i, value in enumerate(own):
                level[i] += value if math.isfinite(value) else 0.0
        return means

    def by_timestep(self) -> list[tuple[float, float, float | None]]:
        """(middle of a tenth of the timesteps, reconstruction, drift) over all steps so far, where there were rows."""
        width, has_drift = 1000 / LEVELS, "drift" in self.distances
        return [
            ((i + 0.5) * width, eight_a / count, eight_b / count if has_drift else None)
            for i, (count, eight_a, eight_b) in enumerate(self.levels)
            if count
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers that JSON holds."""
        return {
            **self.__dict__,
            "losses": list(self.losses),
            "terms": {name: list(values) for name, values in self.terms.items()},
            "distances": {name: list(values) for name, values in self.distances.items()},
            "levels": [list(level) for level in self.levels],
            "probes": [{"step": step, **result.to_dict()} for step, result in self.probes],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> History:
        """What `to_dict` gave."""
        probes = [(probe["step"], ProbeResult.from_dict(probe)) for probe in values["probes"]]
        return cls(**{**values, "probes": probes})
