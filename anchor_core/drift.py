"""The drift diagnostics: how far predictions have moved, in epsilon, on fixed points (Fig. 2, 8a to 8c) and by steps.

Distances are L2 norms over C, h, w, averaged over points. At one z_t a difference of native predictions is one of
epsilon times `Denoiser.epsilon_scale`. At any z_t of known latents and noise

    eps_theta(z_t, c, t) = eps + epsilon_scale(t) (prediction - target),

for epsilon, v and flow alike, since the native prediction is affine in epsilon at fixed z_t; so the readings of Fig. 2
whose two predictions are of different z_t are in epsilon too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .checks import check_choice, check_count
from .concept import Concept
from .denoiser import Denoiser

CHUNK = 32
"""The most rows of one forward pass, so that a probe never needs more memory than a small batch."""

_CHUNK_AREA = 8 * 64 * 64  # latents of a pass, over h w: 8 pictures of 512 x 512, 2 of 1024 x 1024

LEVELS = 10
"""Into how many equal parts of 0 ... 1000 the timesteps of a training's own steps are counted."""

QUANTITIES = ("reconstruction", "drift", "subject", "class_drift", "paired", "independent")


@dataclass(frozen=True)
class ProbeResult:
    """Distances in epsilon space: the L2 norm over C, h, w of each probe point, averaged over the points.

    Attributes:
        reconstruction: |eps - eps_theta(z_t, c_sbj, t)| (Fig. 8a).
        drift: |eps_theta(z_t, c_sbj, t) - eps_theta'(z_t, c_cls, t)|, the same z_t in both (Fig. 8b; Fig. 2, A).
        drift_rms: drift / sqrt(C h w), which compares between latent sizes.
        subject: |eps_theta(z_t, c_sbj, t) - eps_theta(z_t, c_cls, t)|, what the subject's own words do.
        class_drift: |eps_theta(z_t, c_cls, t) - eps_theta'(z_t, c_cls, t)|, how far the class itself has moved.
        reconstruction_mse, drift_mse: mean squares over all elements, the two terms of Eq. 5 without w.
        by_timestep: (timestep, drift, reconstruction) for each timestep of the grid.
        latents_are: `references` or `class`, what z_t was made from.
        paired: |eps_theta(z_t, c_sbj, t) - eps_theta'(z_t^cls, c_cls, t)|, z_t^cls of a class sample with the same eps
            and t (Fig. 2, reading B); None without class samples.
        independent: the same with an eps of its own for z_t^cls (Fig. 2 read literally, C), which the two noises rule.
        curves: by name of each distance above, and of both mean squares, its mean at each timestep of the grid.
    """

    reconstruction: float
    drift: float
    drift_rms: float
    subject: float
    class_drift: float
    reconstruction_mse: float
    drift_mse: float
    by_timestep: list[tuple[float, float, float]]
    latents_are: str = "references"
    paired: float | None = None
    independent: float | None = None
    curves: dict[str, list[float]] = field(default_factory=dict)

    def objective(self, w: float) -> float:
        """Eq. 5 on the probe's points, in epsilon (Fig. 8c)."""
        return self.reconstruction_mse + w * self.drift_mse

    def objective_by_timestep(self, w: float) -> list[float]:
        """`objective` at each timestep of the grid."""
        return [one + w * other for one, other in zip(self.curves["reconstruction_mse"], self.curves["drift_mse"])]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ProbeResult:
        """What `to_dict` gave, beside which `values` may hold more; of an older version, less."""
        own = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        return cls(**{**own, "by_timestep": [tuple(row) for row in own["by_timestep"]]})


Rows = tuple[Tensor, Tensor, Tensor]
"""Latents (B, C, h, w), noise (B, C, h, w) and timesteps (B,)."""


class ProbePoints:
    """Every latent x timestep x noise, timestep by timestep, as rows of small passes.

    Args:
        latents: (N, C, h, w).
        timesteps: how many, T, spread evenly over the schedule.
        noises: how many, M, shared by all latents and timesteps, drawn from `seed` on the CPU.

    Attributes:
        grid: the timesteps, (T,).
    """

    def __init__(self, denoiser: Denoiser, latents: Tensor, timesteps: int, noises: int, seed: int):
        check_count("timesteps", timesteps)
        check_count("noises", noises)
        check_count("seed", seed, minimum=0)
        if latents.ndim != 4 or not len(latents):
            raise ValueError(f"latents is {tuple(latents.shape)}, but it takes (N, C, h, w) with at least one")
        self.denoiser = denoiser
        middles = (torch.arange(timesteps, dtype=torch.float64) + 0.5) / timesteps
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False), torch.no_grad():
            self.grid = denoiser.timesteps(middles).to(denoiser.device)
            self._latents = latents.detach().to(denoiser.device, torch.float32, copy=True)
            self._noises = torch.randn((noises, *latents.shape[1:]), generator=generator).to(denoiser.device)

    def __len__(self) -> int:
        """T N M."""
        return len(self.grid) * len(self._latents) * len(self._noises)

    @property
    def size(self) -> int:
        """C h w."""
        return self._latents[0].numel()

    def __iter__(self) -> Iterator[Rows]:
        n, m = len(self._latents), len(self._noises)
        height, width = self._latents.shape[-2:]
        for part in torch.arange(len(self)).split(max(1, min(CHUNK, _CHUNK_AREA // (height * width)))):
            part = part.to(self.grid.device)
            yield self._latents[part // m % n], self._noises[part % m], self.grid[part // (n * m)]

    @torch.no_grad()
    def errors(self, rows: Rows, condition: Any) -> Tensor:
        """eps_theta(z_t, c, t) - eps of these rows, (B, C, h, w), of the network as it is."""
        latents, noise, timesteps = rows
        denoiser = self.denoiser
        noisy = denoiser.add_noise(latents, noise, timesteps)
        prediction = denoiser.predict(noisy, timesteps, [condition] * len(latents)).float()
        scale = denoiser.epsilon_scale(timesteps).view(-1, 1, 1, 1)
        return scale * (prediction - denoiser.target(latents, noise, timesteps))

    def by_timestep(self, values: Tensor) -> list[float]:
        """The mean at each timestep of a value a point, (T N M,)."""
        return values.double().cpu().reshape(len(self.grid), -1).mean(dim=1).tolist()


class DriftProbe:
    """A fixed set of probe points, every latent x timestep x noise, with the pretrained predictions made once.

    Measuring draws no random number and builds no graph, so that a training goes on as if it had not been measured.
    The readings of Fig. 2 with class samples are against further pretrained predictions made once, so that they add
    no pass to a measurement.

    Args:
        denoiser: with or without an adapter; the anchor is made with the adapter off.
        latents: (N, C, h, w), of the references, or of class pictures.
        concept: the two prompts.
        timesteps: how many, spread evenly over the schedule.
        noises: how many, shared by all latents and timesteps.
        seed: of the noises.
        latents_are: `references` or `class`, carried to the results.
        class_latents: (K, C, h, w), samples of the pretrained model for the class prompt, taken in turn for z_t^cls.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        concept: Concept,
        *,
        timesteps: int = 10,
        noises: int = 4,
        seed: int = 0,
        latents_are: str = "references",
        class_latents: Tensor | None = None,
    ):
        self.latents_are = check_choice("latents_are", latents_are, ("references", "class"))
        self.denoiser = denoiser
        self._points = ProbePoints(denoiser, latents, timesteps, noises, seed)
        classes = {}
        if class_latents is not None:
            if class_latents.shape[1:] != latents.shape[1:] or not len(class_latents):
                raise ValueError(
                    f"class_latents is {tuple(class_latents.shape)}, but it takes one at least, each of the size of "
                    f"latents, which is {tuple(latents.shape)}"
                )
            turns = class_latents[torch.arange(len(latents), device=class_latents.device) % len(class_latents)]
            classes = {
                name: ProbePoints(denoiser, turns, timesteps, noises, own)
                for name, own in (("paired", seed), ("independent", seed + 1))
            }
        with torch.inference_mode(False), torch.no_grad(), denoiser.adapter_disabled():
            self._prompts = (concept.subject_prompt, concept.class_prompt)
            self._conditions = [denoiser.encode_prompt(prompt) for prompt in self._prompts]
            class_ = self._conditions[1]
            self._anchors = [self._points.errors(rows, class_) for rows in self._points]
            # eps_theta' itself, as these points have noise of their own.
            self._class_anchors = {
                name: [rows[1] + points.errors(rows, class_) for rows in points] for name, points in classes.items()
            }

    @torch.no_grad()
    def measure(self) -> ProbeResult:
        """The distances of the network as it is now, adapter included."""
        conditions, points = self._encoded(2), self._points
        norms = []
        for rows, anchor, *others in zip(points, self._anchors, *self._class_anchors.values(), strict=True):
            subject, class_ = (points.errors(rows, condition) for condition in conditions)
            differences = [subject, subject - anchor, subject - class_, class_ - anchor]
            differences += [rows[1] + subject - other for other in others]
            norms.append(torch.stack([_norm(difference) for difference in differences]))
        measured = dict(zip(QUANTITIES, torch.cat(norms, dim=1).double().cpu()))
        squares = {f"{name}_mse": measured[name].square() / points.size for name in ("reconstruction", "drift")}
        means = {name: values.mean().item() for name, values in (measured | squares).items()}
        curves = {name: points.by_timestep(values) for name, values in (measured | squares).items()}
        grid = points.grid.double().tolist()
        return ProbeResult(
            **means,
            drift_rms=means["drift"] / points.size**0.5,
            by_timestep=list(zip(grid, curves["drift"], curves["reconstruction"], strict=True)),
            latents_are=self.latents_are,
            curves=curves,
        )

    @torch.no_grad()
    def drift(self) -> float:
        """`measure().drift`, from half its passes."""
        (condition,), points = self._encoded(1), self._points
        norms = [
            _norm(points.errors(rows, condition) - anchor) for rows, anchor in zip(points, self._anchors, strict=True)
        ]
        return torch.cat(norms).double().cpu().mean().item()

    def _encoded(self, count: int) -> list[Any]:
        """The first of the two prompts or both, by the text encoder as it is now where the adapter changes it."""
        adapter = self.denoiser.adapter
        if adapter is None or not adapter.config.trains_text:
            return self._conditions[:count]
        return [self.denoiser.encode_prompt(prompt, adapted=True) for prompt in self._prompts[:count]]


def _norm(difference: Tensor) -> Tensor:
    return difference.float().flatten(1).norm(dim=1)


# --- of the steps of a training -----------------------------------------------------------------------------------


@torch.no_grad()
def tally(step: Any) -> Tensor:
    """Fig. 8a and 8b of a training step, from the predictions that it has made already: no pass is made for them.

    Args:
        step: a `denoiser.Step` whose objective has been computed.

    Returns:
        (3, LEVELS) float32 on the step's device: by tenth of the timesteps how many rows there were, and the sums over
        them of |eps - eps_theta(z_t, c_sbj, t)| and of |eps_theta(z_t, c_sbj, t) - eps_theta'(z_t, c_cls, t)|, L2 over
        C, h, w in epsilon. The last are NaN where the objective reads no pretrained anchor.
    """
    scale = step.denoiser.epsilon_scale(step.timesteps).abs()
    made = vars(step)  # a cached property is there once it has been read
    subject = step.subject.float()
    rows = [torch.ones_like(scale), scale * _norm(subject - step.target)]
    rows.append(scale * _norm(subject - step.anchor) if "anchor" in made else torch.full_like(scale, torch.nan))
    level = (step.timesteps * LEVELS / 1000).long().clamp(0, LEVELS - 1)
    return torch.stack(rows).float() @ torch.nn.functional.one_hot(level, LEVELS).to(scale.device, torch.float32)
