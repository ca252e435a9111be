"""What a guidance rule is made of: branches, a table of them, and the prediction that a table gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PROMPTS = ("subject", "class", "null")
"""Of a branch: with the subject's token, the same prompt with the class word alone, and the empty or negative one."""


@dataclass(frozen=True)
class Branch:
    """One prediction: weights W + strength (W_adapted - W), and a prompt.

    Args:
        prompt: of `PROMPTS`.
        strength: of the adapter: 1 as it is applied, 0 the pretrained network.
        early: with an early checkpoint of the adapter in the adapter's place.
    """

    prompt: str
    strength: float = 1.0
    early: bool = False


SUBJECT, CLASS, NULL = (Branch(prompt) for prompt in PROMPTS)


Mix = Mapping[Branch, float]


@dataclass(frozen=True)
class Table:
    """What a rule says at one step: away + g (towards - away).

    Args:
        towards: branch -> share; the shares sum to 1.
        away: the branch that guidance leads away from.
        outside: `towards` outside of a mask over the picture; None if there is no mask. The mask is where the class
            branch looks at the class word: its cross-attention map, averaged over heads and layers, above `quantile`
            of its values (Beyond Fine-Tuning, masked sampling).
        quantile: share of the picture that is outside the mask.
    """

    towards: Mix
    away: Branch = NULL
    outside: Mix | None = None
    quantile: float = 0.0

    def branches(self, scale: float) -> list[Branch]:
        """Those that count at this scale, in a fixed order: the one to lead away from, where it counts, last."""
        mixes = (self.towards,) if self.outside is None else (self.towards, self.outside)
        counting = [] if scale == 0 else [branch for mix in mixes for branch, share in mix.items() if share]
        return list(dict.fromkeys(counting + ([self.away] if scale != 1 else [])))

    def coefficients(self, scale: float) -> dict[Branch, float]:
        """Branch -> coefficient, which sum to 1; of the inside where there is a mask."""
        table = {branch: scale * share for branch, share in self.towards.items()}
        table[self.away] = table.get(self.away, 0.0) + 1 - scale
        return {branch: coefficient for branch, coefficient in table.items() if coefficient}

    def conditional(self, predictions: Mapping[Branch, Tensor], mask: Tensor | None = None) -> Tensor:
        """The mix that guidance leads towards, of predictions (B, C, ...): a sampler's conditional prediction.

        Args:
            mask: (B, 1, h, w) in [0, 1], which broadcasts over the predictions; read where the table has one.
        """
        inside = _mix(self.towards, predictions)
        if self.outside is None:
            return inside
        if mask is None:
            raise ValueError("mask is None, but a table with an outside takes one of (B, 1, h, w)")
        return torch.lerp(_mix(self.outside, predictions), inside, mask.to(inside))


def _mix(mix: Mix, predictions: Mapping[Branch, Tensor]) -> Tensor:
    shares = {branch: share for branch, share in mix.items() if share}
    if len(shares) == 1:
        return predictions[next(iter(shares))]
    return sum(share * predictions[branch] for branch, share in shares.items())


def guide(table: Table, predictions: Mapping[Branch, Tensor], scale: float, mask: Tensor | None = None) -> Tensor:
    """away + scale (towards - away), of predictions (B, C, ...) of the branches that count at this scale."""
    if scale == 0:
        return predictions[table.away]
    conditional = table.conditional(predictions, mask)
    if scale == 1:
        return conditional
    away = predictions[table.away]
    return away + scale * (conditional - away)


def step_at(level: float, levels: Sequence[float]) -> int:
    """The step i whose interval [levels[i], levels[i + 1]) of a falling schedule a noise level lies in.

    Args:
        levels: sigmas or timesteps of N steps, and where the last of them ends: N + 1.
    """
    return max(min(sum(each >= level * (1 - 1e-5) for each in levels), len(levels) - 1) - 1, 0)
