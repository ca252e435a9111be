"""What the passes of a training are computed in, and the scale of the loss that fp16 needs.

The mean over a latent makes gradients of 1e-5 and less. In fp16, whose least number is 6e-8, they would vanish on
their way back, without a NaN: wherever fp16 is computed in, the loss is multiplied first (Micikevicius et al. 2018).
bf16 has the range of fp32.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from .settings import TrainSettings

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOWEST_SCALE = 1.0
"""Of the loss: below, fp16 has less room than without a scale, so that the gradient itself overflows."""


def resolve(settings: TrainSettings, denoiser: Any) -> TrainSettings:
    """`settings` with a precision in the place of `auto`: that in which the network computes by itself.

    Raises:
        ValueError: for a precision of 16 bits on a network that computes in the other kind of 16 bits: its layers
            cast back to their own in the backward pass.
    """
    own = next((name for name, dtype in _DTYPES.items() if dtype == denoiser.compute_dtype), "fp32")
    if settings.precision == "auto":
        logger.info("precision: %s, in which the network computes", own)
        return replace(settings, precision=own)
    if {settings.precision, own} == {"fp16", "bf16"}:
        raise ValueError(
            f"precision is {settings.precision!r}, but the network computes in {own}, which does not mix with it; "
            "take auto"
        )
    return settings


def autocast_dtype(settings: TrainSettings, denoiser: Any) -> torch.dtype | None:
    """What the passes are cast to; None where the network computes as it is.

    A network in 16 bits is not cast once more: autocast would send its norms to fp32, for more memory, and the
    weights that ComfyUI casts at each use with them.
    """
    cast = settings.precision in ("fp16", "bf16") and denoiser.compute_dtype == torch.float32
    return _DTYPES[settings.precision] if cast else None


def make_scaler(settings: TrainSettings, denoiser: Any) -> torch.amp.GradScaler:
    """The scaler of the loss, on wherever the passes are computed in fp16, whatever `settings.precision` says."""
    fp16 = torch.float16 in (denoiser.compute_dtype, autocast_dtype(settings, denoiser))
    return torch.amp.GradScaler(denoiser.device.type, enabled=fp16)
