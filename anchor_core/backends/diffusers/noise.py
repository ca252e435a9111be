"""The noise processes of diffusers' schedulers: z_t = alpha_t z_0 + sigma_t eps, and the way back when sampling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class NoiseProcess:
    """alpha_t and sigma_t of a schedule, and what follows from them for the `prediction_type` of its network."""

    prediction_type: str

    def timesteps(self, levels: Tensor) -> Tensor:
        """Levels in [0, 1) to timesteps, (B,)."""
        raise NotImplementedError

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, (B,) each."""
        raise NotImplementedError

    def snr(self, timesteps: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2, (B,)."""
        alpha, sigma = self.coefficients(timesteps)
        return (alpha / sigma).square()

    def _columns(self, timesteps: Tensor) -> Iterator[Tensor]:
        """alpha_t and sigma_t, (B, 1, 1, 1) each."""
        return (part.view(-1, 1, 1, 1) for part in self.coefficients(timesteps))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = alpha_t z_0 + sigma_t eps, (B, C, h, w)."""
        alpha, sigma = self._columns(timesteps)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """eps; v = alpha_t eps - sigma_t z_0; or the velocity eps - z_0 of a flow; (B, C, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "flow":
            return noise - latents
        alpha, sigma = self._columns(timesteps)
        return alpha * noise - sigma * latents

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        """1 for epsilon; alpha_t for v, as eps = sigma_t z_t + alpha_t v, and for flow, as eps = z_t + alpha_t u."""
        alpha, _ = self.coefficients(timesteps)
        return torch.ones_like(alpha) if self.prediction_type == "epsilon" else alpha

    def sampler(self, steps: int, tokens: int) -> Any:
        """A scheduler that goes from unit noise to a picture of so many image tokens in `steps`."""
        raise NotImplementedError


class Diffusion(NoiseProcess):
    """A discrete schedule: alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]), t an integer.

    Nothing is divided by alpha_t, which is 0 at the last timestep of a schedule with zero terminal SNR.
    """

    PREDICTION_TYPES = ("epsilon", "v_prediction")

    def __init__(self, scheduler: Any):
        kind = scheduler.config.get("prediction_type")
        if not hasattr(scheduler, "alphas_cumprod") or kind not in self.PREDICTION_TYPES:
            raise ValueError(
                f"the scheduler is a {type(scheduler).__name__} with prediction_type {kind!r}, "
                f"but it takes a discrete diffusion schedule with one of {', '.join(self.PREDICTION_TYPES)}"
            )
        if kind == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
            raise ValueError(
                "the scheduler has zero terminal SNR with prediction_type 'epsilon', which says nothing of z_0 there; "
                "set rescale_betas_zero_snr to false, or give a v_prediction model"
            )
        self.prediction_type = kind
        self._config = scheduler.config
        self._alphas_cumprod = scheduler.alphas_cumprod.double()  # (T,)

    def timesteps(self, levels: Tensor) -> Tensor:
        """Levels in [0, 1) to timesteps, (B,), int64."""
        return (levels.double() * len(self._alphas_cumprod)).long()

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, (B,) each."""
        cumulative = self._alphas_cumprod[timesteps.long().cpu()]
        return cumulative.sqrt().float().to(timesteps.device), (1 - cumulative).sqrt().float().to(timesteps.device)

    def sampler(self, steps: int, tokens: int) -> Any:
        """Deterministic DDIM with trailing timesteps."""
        from diffusers import DDIMScheduler

        # Latents are no pictures, so clipping them to [-1, 1], DDIMScheduler's own default, would be wrong.
        scheduler = DDIMScheduler.from_config(
            self._config, timestep_spacing="trailing", clip_sample=False, thresholding=False
        )
        scheduler.set_timesteps(steps)
        return scheduler


class Flow(NoiseProcess):
    """Rectified flow: alpha_t = 1 - sigma_t, timesteps 1000 sigma_t, the network's velocity eps - z_0."""

    TIMESTEPS = 1000
    prediction_type = "flow"

    def __init__(self, scheduler: Any):
        if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"the scheduler is a {type(scheduler).__name__}, but it takes a FlowMatchEulerDiscreteScheduler"
            )
        self._config = scheduler.config

    def timesteps(self, levels: Tensor) -> Tensor:
        """Levels in [0, 1) to timesteps, (B,), float32. The schedule's shift is not applied."""
        return (levels.double() * self.TIMESTEPS).float()

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """1 - sigma_t and sigma_t, (B,) each."""
        sigma = timesteps.double() / self.TIMESTEPS
        return (1 - sigma).float(), sigma.float()

    def sampler(self, steps: int, tokens: int) -> Any:
        """Euler steps with the scheduler's own shift, which may depend on the number of image tokens."""
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._config)
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(mu=mu, **self._spacing(steps))
        return scheduler

    def _spacing(self, steps: int) -> dict[str, Any]:
        return {"num_inference_steps": steps}


class FluxFlow(Flow):
    """Rectified flow whose sampler starts from evenly spaced sigmas, 1 ... 1 / steps, before the shift."""

    def _spacing(self, steps: int) -> dict[str, Any]:
        return {"sigmas": torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()}
