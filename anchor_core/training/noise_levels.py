"""Which noise levels a training sees, and how much each counts."""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import TrainSettings


def sample_levels(count: int, generator: torch.Generator, settings: TrainSettings) -> Tensor:
    """`count` noise levels in [timestep_min, timestep_max), (count,), float64 on the CPU.

    `uniform`; `logit_normal`, u = sigmoid(n), n ~ N(mean, std^2) (Esser et al. 2024, Eq. 19); `shifted`,
    s u / (1 + (s - 1) u) of a uniform u (Eq. 23).
    """
    if settings.timestep_sampling == "logit_normal":
        return _levels(torch.randn(count, generator=generator, dtype=torch.float64), settings)
    return _levels(torch.rand(count, generator=generator, dtype=torch.float64), settings)


def level_at(shares: Tensor, settings: TrainSettings) -> Tensor:
    """The levels below which these shares of all samples lie, (B,) in (0, 1): quantiles of `sample_levels`."""
    return _levels(torch.special.ndtri(shares) if settings.timestep_sampling == "logit_normal" else shares, settings)


def _levels(drawn: Tensor, settings: TrainSettings) -> Tensor:
    """From standard normal values for `logit_normal`, else from uniform ones."""
    levels = drawn
    if settings.timestep_sampling == "logit_normal":
        levels = torch.sigmoid(settings.timestep_mean + settings.timestep_std * drawn)
    elif settings.timestep_sampling == "shifted":
        levels = settings.timestep_shift * drawn / (1 + (settings.timestep_shift - 1) * drawn)
    low, high = settings.timestep_min, settings.timestep_max
    # A sigmoid may round to 1, which is past the schedule's end.
    return (low + (high - low) * levels).clamp(max=high - 1e-9)


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight (B,) of each row's native error: min-SNR-gamma (Hang et al. 2023, Eq. 8) for epsilon and v.

    On z_0 the weight is min(SNR, gamma); epsilon's error is SNR times smaller than z_0's, v's SNR + 1 times.
    """
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)
