"""What happened in a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..drift import ProbeResult


@dataclass
class History:
    """What happened: a loss and its weighted terms for each step made, and the probes as (steps made, result).

    Attributes:
        kept: the step whose weights the adapter was left with.
        cancelled, stopped: the order that ended the training.
        over_budget: `stop_on_drift` ended it.
    """

    losses: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    probes: list[tuple[int, ProbeResult]] = field(default_factory=list)
    seconds: float = 0.0
    kept: int = 0
    cancelled: bool = False
    over_budget: bool = False
    stopped: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers that JSON holds."""
        return {
            **self.__dict__,
            "losses": list(self.losses),
            "terms": {name: list(values) for name, values in self.terms.items()},
            "probes": [{"step": step, **result.to_dict()} for step, result in self.probes],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> History:
        """What `to_dict` gave."""
        probes = [(probe["step"], ProbeResult.from_dict(probe)) for probe in values["probes"]]
        return cls(**{**values, "probes": probes})
