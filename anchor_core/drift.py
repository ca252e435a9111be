"""The drift probe: how far the subject's prediction has moved from the pretrained class prediction (Fig. 2 and 8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .checks import check_choice, check_count
from .concept import Concept
from .denoiser import Denoiser

CHUNK = 32
"""Rows of one forward pass, so that a probe never needs more memory than a small batch."""


@dataclass(frozen=True)
class ProbeResult:
    """Distances in epsilon space: the L2 norm over C, h, w of each probe point, averaged over the points.

    Attributes:
        reconstruction: |eps - eps_theta(z_t, c_sbj, t)| (Fig. 8a).
        drift: |eps_theta(z_t, c_sbj, t) - eps_theta'(z_t, c_cls, t)|, the same z_t in both (Fig. 8b).
        drift_rms: drift / sqrt(C h w), which compares between latent sizes.
        subject: |eps_theta(z_t, c_sbj, t) - eps_theta(z_t, c_cls, t)|, what the subject's own words do.
        class_drift: |eps_theta(z_t, c_cls, t) - eps_theta'(z_t, c_cls, t)|, how far the class itself has moved.
        reconstruction_mse, drift_mse: mean squares over all elements, the two terms of Eq. 5 without w.
        by_timestep: (timestep, drift, reconstruction) for each timestep of the grid.
        latents_are: `references` or `class`, what z_t was made from.
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

    def objective(self, w: float) -> float:
        """Eq. 5 on the probe's points, in epsilon."""
        return self.reconstruction_mse + w * self.drift_mse

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ProbeResult:
        """What `to_dict` gave, beside which `values` may hold more."""
        own = {each.name: values[each.name] for each in fields(cls)}
        return cls(**{**own, "by_timestep": [tuple(row) for row in own["by_timestep"]]})


class DriftProbe:
    """A fixed set of probe points, every latent x timestep x noise, with the pretrained predictions made once.

    Measuring draws no random number and builds no graph, so that a training goes on as if it had not been measured.

    Args:
        denoiser: with or without an adapter; the anchor is made with the adapter off.
        latents: (N, C, h, w), of the references, or of class pictures.
        concept: the two prompts.
        timesteps: how many, spread evenly over the schedule.
        noises: how many, shared by all latents and timesteps.
        seed: of the noises.
        latents_are: `references` or `class`, carried to the results.
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
    ):
        check_count("timesteps", timesteps)
        check_count("noises", noises)
        check_count("seed", seed, minimum=0)
        self.latents_are = check_choice("latents_are", latents_are, ("references", "class"))
        if latents.ndim != 4 or not len(latents):
            raise ValueError(f"latents is {tuple(latents.shape)}, but it takes (N, C, h, w) with at least one")
        self.denoiser = denoiser
        middles = (torch.arange(timesteps, dtype=torch.float64) + 0.5) / timesteps
        grid = denoiser.timesteps(middles).to(denoiser.device)  # (T,)
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False), torch.no_grad():
            self._latents = latents.detach().to(denoiser.device, torch.float32, copy=True)
            self._noises = torch.randn((noises, *latents.shape[1:]), generator=generator).to(denoiser.device)
            self._prompts = (concept.subject_prompt, concept.class_prompt)
            self._conditions = [denoiser.encode_prompt(prompt) for prompt in self._prompts]
            self._grid = grid
            with denoiser.adapter_disabled():
                self._anchors = [self._predict(rows, self._conditions[1]) for rows in self._chunks()]

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(latents, noise, timesteps) of the probe points in chunks, timestep by timestep."""
        n, m = len(self._latents), len(self._noises)
        points = torch.arange(len(self._grid) * n * m, device=self._grid.device)
        for part in points.split(CHUNK):
            yield self._latents[part // m % n], self._noises[part % m], self._grid[part // (n * m)]

    def _predict(self, rows: tuple[Tensor, Tensor, Tensor], condition: Any) -> Tensor:
        latents, noise, timesteps = rows
        noisy = self.denoiser.add_noise(latents, noise, timesteps)
        return self.denoiser.predict(noisy, timesteps, [condition] * len(latents)).float()

    @torch.no_grad()
    def measure(self) -> ProbeResult:
        """The distances of the network as it is now, adapter included."""
        conditions, adapter = self._conditions, self.denoiser.adapter
        if adapter is not None and adapter.config.trains_text:
            conditions = [self.denoiser.encode_prompt(prompt, adapted=True) for prompt in self._prompts]
        norms = []
        for rows, anchor in zip(self._chunks(), self._anchors, strict=True):
            latents, noise, timesteps = rows
            subject, class_ = (self._predict(rows, condition) for condition in conditions)
            target = self.denoiser.target(latents, noise, timesteps)
            differences = (subject - target, subject - anchor, subject - class_, class_ - anchor)
            scale = self.denoiser.epsilon_scale(timesteps).abs()
            norms.append(torch.stack([scale * _norm(difference) for difference in differences]))
        reconstruction, drift, subject, class_drift = torch.cat(norms, dim=1).double().cpu()
        size = self._latents[0].numel()
        rows = (part.reshape(len(self._grid), -1).mean(dim=1).tolist() for part in (drift, reconstruction))
        return ProbeResult(
            reconstruction=reconstruction.mean().item(),
            drift=drift.mean().item(),
            drift_rms=drift.mean().item() / size**0.5,
            subject=subject.mean().item(),
            class_drift=class_drift.mean().item(),
            reconstruction_mse=reconstruction.square().mean().item() / size,
            drift_mse=drift.square().mean().item() / size,
            by_timestep=list(zip(self._grid.double().tolist(), *rows, strict=True)),
            latents_are=self.latents_are,
        )


def _norm(difference: Tensor) -> Tensor:
    return difference.float().flatten(1).norm(dim=1)
