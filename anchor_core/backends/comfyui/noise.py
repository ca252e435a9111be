"""The noise process of ComfyUI's models, as training draws from it."""

from __future__ import annotations

import comfy.model_sampling
import torch
from torch import Tensor


class NoiseProcess:
    """z_t = alpha_t z_0 + sigma_t epsilon: what a denoiser says of it, by the `model_sampling` of its MODEL."""

    prediction_type: str
    device: torch.device

    @property
    def _sampling(self):
        return self.model.model.model_sampling

    def _coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_t, sigma_t of z_t = alpha_t z_0 + sigma_t epsilon, and ComfyUI's sigma, each (B,)."""
        timesteps = timesteps.to(self.device)
        if self.prediction_type == "flow":
            sigma = timesteps.float() / 1000
            alpha = 1 - sigma
            return alpha, sigma, sigma if self._keeps_scale else sigma / alpha.clamp_min(1e-6)
        sigma = self._sampling.sigma(timesteps)
        alpha = (1 + sigma**2).rsqrt()
        return alpha, sigma * alpha, sigma

    @property
    def _keeps_scale(self) -> bool:
        """Whether ComfyUI's x is z_t itself instead of z_t / alpha_t: for all flow models but Cosmos."""
        return isinstance(self._sampling, comfy.model_sampling.CONST)

    def _as_comfy(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """ComfyUI's x and sigma (B,) of z_t."""
        alpha, _, sigma = self._coefficients(timesteps)
        return noisy if self._keeps_scale else noisy / column(alpha.clamp_min(1e-6), noisy), sigma

    def timesteps(self, levels: Tensor) -> Tensor:
        if self.prediction_type == "flow":
            return (1000 * levels.double()).float()
        return (levels.double() * self._sampling.num_timesteps).long()

    def snr(self, timesteps: Tensor) -> Tensor:
        alpha, sigma, _ = self._coefficients(timesteps)
        return (alpha / sigma).square()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma, _ = (column(c, latents) for c in self._coefficients(timesteps))
        return alpha * latents.to(self.device) + sigma * noise.to(self.device)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        latents, noise = latents.to(self.device), noise.to(self.device)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "flow":
            return noise - latents
        alpha, sigma, _ = (column(c, latents) for c in self._coefficients(timesteps))
        return alpha * noise - sigma * latents

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        alpha, _, _ = self._coefficients(timesteps)
        return torch.ones_like(alpha) if self.prediction_type == "epsilon" else alpha


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1), to multiply latents with."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
