"""The one interface between the method and the models: a denoiser, and the training step made of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .adapter import Adapter

Condition = Any
"""One encoded prompt. Opaque: made by `Denoiser.encode_prompt`, read by `Denoiser.predict`."""


class Denoiser(Protocol):
    """A frozen network plus at most one adapter that can be switched.

    Everything is in the model's native prediction space (epsilon, v, or flow velocity) and in scaled
    latents. The pretrained anchor is the same network with the adapter off, never a second copy.
    """

    prediction_type: str
    """`epsilon`, `v_prediction` or `flow`."""

    adapter: Adapter | None

    @property
    def network(self) -> torch.nn.Module:
        """The denoising network, into which the adapter is injected."""

    @property
    def device(self) -> torch.device: ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pictures in [0, 1], shape (B, 3, H, W), to scaled latents (B, C, h, w)."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pictures in [0, 1], shape (B, 3, H, W)."""

    def encode_prompt(self, prompt: str, adapted: bool = False) -> Condition:
        """One prompt to one condition, by the pretrained text encoder; with its adapter and a graph if `adapted`."""

    def encode_prompts(self, prompts: Sequence[str], adapted: bool = False) -> list[Condition]:
        """`encode_prompt` of each, for no more than one change of the model that is loaded."""

    @property
    def token_limit(self) -> int | None:
        """Tokens of a prompt that are read; None if all are, however many."""

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, with those of its start and end; asked only where there is a limit."""

    def timesteps(self, levels: Tensor) -> Tensor:
        """Training timesteps (B,) at these shares of the schedule, (B,) in [0, 1), ascending in noise."""

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2, (B,)."""

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The network's blocks, whose activations gradient checkpointing computes again in the backward pass."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t from z_0 and the noise, all (B, C, h, w); timesteps (B,)."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` should return for this z_0 and noise, (B, C, h, w)."""

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        """Factor (B,) that turns a difference of native predictions at the same z_t into one of epsilon.

        epsilon: 1; v: alpha_t (v = alpha eps - sigma z_0); flow: 1 - sigma.
        """

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Native prediction (B, C, h, w) for z_t (B, C, h, w), timesteps (B,) and one condition a row."""

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """While it is open, `predict` is exactly the untouched network's."""

    def sample(
        self, conditions: Sequence[Condition], negative: Condition, noise: Tensor, *, steps: int, guidance: float
    ) -> Tensor:
        """Sampled latents (B, C, h, w) by classifier-free guidance from unit noise (B, C, h, w)."""


@dataclass
class PriorBatch:
    """Class pictures with noise and timesteps of their own (DreamBooth, Eq. 2): latents and noise (B, C, h, w).

    Their `conditions` are those of the step's class prompts, unless the text encoder is trained too.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor | None = None
    conditions: Sequence[Condition] | None = None


class Step:
    """One training step: predictions are computed when an objective first reads them, and once.

    Args:
        denoiser: the model, with its adapter attached.
        latents: z_0, shape (B, C, h, w).
        noise: epsilon, shape (B, C, h, w).
        timesteps: t, shape (B,).
        subject: one subject condition for each row.
        class_: one class condition for each row.
        prior: class pictures, for objectives that read `prior` or `prior_target`.
        weights: factor of each row's errors, (B,), the same for every term (min-SNR).
        masks: where errors count, (B, 1, h, w) in [0, 1]; each row's error is the mean over what its mask covers.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        subject: Sequence[Condition],
        class_: Sequence[Condition],
        prior: PriorBatch | None = None,
        weights: Tensor | None = None,
        masks: Tensor | None = None,
    ):
        self.denoiser = denoiser
        self.latents = latents
        self.noise = noise
        self.timesteps = timesteps
        self.subject_conditions = subject
        self.class_conditions = class_
        self._prior = prior
        self.weights = weights
        self.masks = masks

    @cached_property
    def noisy(self) -> Tensor:
        """z_t, (B, C, h, w), the same for every prediction of this step but the prior's."""
        return self.denoiser.add_noise(self.latents, self.noise, self.timesteps)

    @cached_property
    def target(self) -> Tensor:
        """The native training target, (B, C, h, w)."""
        return self.denoiser.target(self.latents, self.noise, self.timesteps)

    @cached_property
    def subject(self) -> Tensor:
        """Adapter on, subject prompt, with gradient: eps_theta(z_t, c_sbj, t)."""
        return self.denoiser.predict(self.noisy, self.timesteps, self.subject_conditions)

    @cached_property
    def anchor(self) -> Tensor:
        """Adapter off, class prompt, same z_t and t, no graph: eps_theta'(z_t, c_cls, t)."""
        with torch.no_grad(), self.denoiser.adapter_disabled():
            return self.denoiser.predict(self.noisy, self.timesteps, self.class_conditions)

    @cached_property
    def current_anchor(self) -> Tensor:
        """Adapter on, class prompt, no graph: the ablation of Fig. 6 and 7, eps_theta(z_t, c_cls, t)."""
        with torch.no_grad():
            return self.denoiser.predict(self.noisy, self.timesteps, self.class_conditions)

    @property
    def prior(self) -> PriorBatch:
        if self._prior is None:
            raise ValueError(
                "this objective reads class pictures, but the training was given none; pass class pictures"
            )
        return self._prior

    @cached_property
    def prior_prediction(self) -> Tensor:
        """Adapter on, class prompt, on class pictures, with gradient (Eq. 2)."""
        prior = self.prior
        noisy = self.denoiser.add_noise(prior.latents, prior.noise, prior.timesteps)
        return self.denoiser.predict(noisy, prior.timesteps, prior.conditions or self.class_conditions)

    @cached_property
    def prior_target(self) -> Tensor:
        """The native training target of the class pictures (Eq. 2)."""
        prior = self.prior
        return self.denoiser.target(prior.latents, prior.noise, prior.timesteps)
