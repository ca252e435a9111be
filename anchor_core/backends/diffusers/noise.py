"""The noise processes of diffusers' schedulers: z_t = alpha_t z_0 + sigma_t eps, and the way back when sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Diffusion:
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
        self.prediction_type: str = kind
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


class Flow:
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
