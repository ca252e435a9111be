"""The one interface between the method and the models: a denoiser, and the training step made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

Condition = Any
"""One encoded prompt. Opaque: made by `Denoiser.encode_prompt`, read by `Denoiser.predict`."""


class AttachedAdapter(Protocol):
    """What the method asks of an `Adapter`: whether prompts are encoded otherwise with it (`config.trains_text`)."""

    config: Any


class Denoiser(Protocol):
    """A frozen network plus at most one adapter that can be switched.

    Everything is in the model's native prediction space (epsilon, v, or flow velocity) and in scaled
    latents. The pretrained anchor is the same network with the adapter off, never a second copy.
    """

    prediction_type: str
    """`epsilon`, `v_prediction` or `flow`."""

    adapter: AttachedAdapter | None

    @property
    def network(self) -> torch.nn.Module:
        """The denoising network, into which the adapter is injected."""

    @property
    def device(self) -> torch.device: ...

    @property
    def family(self) -> str:
        """Of `families.FAMILIES`, or empty."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the network computes in by itself, without autocast, whatever its weights are stored in."""

    def make_room(self, needed: int) -> int:
        """Bytes free on the device, after models of others have made way if less than `needed` were."""

    def encoding(self) -> AbstractContextManager[None]:
        """While it is open, pictures and prompts are encoded, for one change of the model that is loaded; nothing is
        predicted."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pictures in [0, 1], shape (B, 3, H, W), to scaled latents (B, C, h, w)."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pictures in [0, 1], shape (B, 3, H, W)."""

    def encode_prompt(self, prompt: str, adapted: bool = False) -> Condition:
        """One prompt to one condition, by the pretrained text encoder; with its adapter and a graph if `adapted`."""

    def encode_prompts(self, prompts: Sequence[str], adapted: bool = False) -> list[Condition]:
        """`encode_prompt` of each, for no more than one change of the model that is loaded."""

    def encode_pooled(self, prompts: Sequence[str], adapted: bool = False) -> Tensor:
        """The pooled output of each prompt, (N, D).

        It is every CLIP's (its last layer at the end token) at length 1, side by side, so that the cosine of two rows
        is the mean of the CLIPs' own. Adapter and graph are as in `encode_prompt`.
        """

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

    @property
    def can_checkpoint(self) -> bool:
        """Whether the blocks are known."""

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


@dataclass
class Texts:
    """What a step says in words, for objectives that need more than the conditions of its rows.

    Args:
        class_prompts: one for each row.
        encode: a condition a prompt, by the text encoder as it is trained; the empty prompt is one that it takes.
        subject_prompt: of the concept.
        class_pooled: `Denoiser.encode_pooled` of the concept's class prompt by the pretrained encoder, (1, D).
    """

    class_prompts: Sequence[str]
    encode: Callable[[Sequence[str]], Sequence[Condition]]
    subject_prompt: str
    class_pooled: Tensor | None = None


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
        texts: for objectives that read `class_prediction`, `current_anchor`, `unconditional` or `text_distance`.
        known: gives the anchor from elsewhere, equal in every bit to what `pretrained` computes.
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
        texts: Texts | None = None,
        known: Callable[[Step], Tensor] | None = None,
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
        self._texts = texts
        self._known = known

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
        return self.pretrained() if self._known is None else self._known(self)

    @torch.no_grad()
    def pretrained(self) -> Tensor:
        """The anchor by a pass of the network."""
        with self.denoiser.adapter_disabled():
            return self.denoiser.predict(self.noisy, self.timesteps, self.class_conditions)

    @cached_property
    def class_prediction(self) -> Tensor:
        """Adapter on, class prompt by the text encoder as it is trained, with gradient: eps_theta(z_t, c_cls, t)."""
        return self.denoiser.predict(self.noisy, self.timesteps, self.texts.encode(self.texts.class_prompts))

    @cached_property
    def current_anchor(self) -> Tensor:
        """Adapter on, class prompt, no graph: eps_theta(z_t, c_cls, t), the ablation of Fig. 6 and 7.

        All of theta is the current one, so the class prompt is encoded by the text encoder as it is trained.
        """
        return self._current(self.texts.class_prompts)

    @cached_property
    def unconditional(self) -> Tensor:
        """Adapter on, empty prompt, no graph: eps_theta(z_t, "", t)."""
        return self._current([""] * len(self.latents))

    @torch.no_grad()
    def _current(self, prompts: Sequence[str]) -> Tensor:
        return self.denoiser.predict(self.noisy, self.timesteps, self.texts.encode(prompts))

    @property
    def texts(self) -> Texts:
        if self._texts is None:
            raise ValueError("this objective reads prompts, but the step was given none; pass texts")
        return self._texts

    @cached_property
    def text_distance(self) -> Tensor:
        """1 - cos(e(subject prompt), e(class prompt)), a scalar; e is the pooled output of the text encoder.

        The subject's is that of the encoder as it is trained, with a graph; the class's that of the pretrained one.
        """
        subject = self.denoiser.encode_pooled([self.texts.subject_prompt], adapted=True)
        return 1 - torch.cosine_similarity(subject, self.texts.class_pooled.to(subject)).mean()

    @cached_property
    def alpha_bars(self) -> tuple[Tensor, Tensor]:
        """abar_t and abar_{t-1} of an epsilon or v model, (B,) each, in float64 on the CPU; before t = 0 it is 1."""
        times = torch.stack([self.timesteps, (self.timesteps - 1).clamp(min=0)])
        snr = self.denoiser.snr(times.flatten()).cpu().double().view(2, -1)
        now, before = snr / (1 + snr)
        return now, torch.where(self.timesteps.cpu() > 0, before, 1.0)

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
