"""diffusers' autoencoders: pictures in [0, 1] to scaled latents and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def downscale(vae: nn.Module) -> int:
    """Pixels of a picture to one of its latents, along an edge."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Pictures in [0, 1], (B, 3, H, W), to scaled latents (B, C, h, w) in float32: the posterior's mode."""
    encoded = vae.encode(pixels.to(vae.dtype) * 2 - 1)
    # AutoencoderTiny has no posterior.
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents.float() - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) to pictures in [0, 1], (B, 3, H, W), in float32."""
    latents = latents / vae.config.scaling_factor + _shift(vae)
    return (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


def _shift(vae: nn.Module) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0
