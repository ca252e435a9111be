"""Checks of the objectives' losses and gradients, and of a training."""

from __future__ import annotations

import torch
from torch import Tensor

from anchor_core import objectives
from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.config import AdapterConfig
from anchor_core.denoiser import Denoiser
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

from .steps import CONCEPT, LAYERS, LEVELS, Shape, attached, draw, make_step


def _gradients(denoiser: Denoiser, shape: Shape, adapter: Adapter, objective, **options) -> tuple[float, list[Tensor]]:
    loss = sum(objective(make_step(denoiser, shape), **options).values())
    return loss.item(), list(torch.autograd.grad(loss, adapter.parameters(), materialize_grads=True))


def check_zero_weight_is_reconstruction(denoiser: Denoiser, shape: Shape, layers: str = LAYERS) -> None:
    """Eq. 5 at w = 0 has the loss and the gradient of Eq. 1, exactly."""
    with attached(denoiser, layers) as adapter:
        loss, gradients = _gradients(denoiser, shape, adapter, objectives.semantic_anchoring, w=0.0)
        plain_loss, plain = _gradients(denoiser, shape, adapter, objectives.reconstruction)
    assert loss == plain_loss, f"the loss at w = 0 is {loss}, but reconstruction's is {plain_loss}"
    assert all(map(torch.equal, gradients, plain)), "the gradient at w = 0 is not reconstruction's"


def check_anchor_gradient_is_blended(denoiser: Denoiser, shape: Shape, layers: str = LAYERS, w: float = 0.7) -> None:
    """The gradient of Eq. 5 is 1 + w times that of the blended target (Eq. 4)."""
    with attached(denoiser, layers) as adapter:
        _, anchored = _gradients(denoiser, shape, adapter, objectives.semantic_anchoring, w=w)
        _, blended = _gradients(denoiser, shape, adapter, objectives.blended_target, w=w)
    anchored, blended = (torch.cat([part.flatten().double() for part in parts]) for parts in (anchored, blended))
    off = ((anchored - (1 + w) * blended).norm() / anchored.norm()).item()
    assert anchored.norm() > 0, "the gradient of Eq. 5 is 0"
    assert off < 1e-3, f"the gradient of Eq. 5 is off 1 + w times the blended target's by {off:.2g} of its norm"


def check_objectives(denoiser: Denoiser, shape: Shape) -> None:
    """Every objective trains, or refuses the model before its first step."""
    latents = draw(denoiser, shape, 2, seed=5)
    text = bool(getattr(denoiser, "text_encoders", {}))
    for name in objectives.OBJECTIVES:
        needs_text, flow = name == "class_diffusion", denoiser.prediction_type == "flow"
        config = AdapterConfig(rank=2, layers="attention", text_encoder=needs_text and text)
        adapter = denoiser.attach(config, seed=1)
        before = adapter.state_dict()
        try:
            settings = TrainSettings(objective=name, steps=2, batch_size=2, learning_rate=1e-2)
            history = train(denoiser, adapter, latents, CONCEPT, settings, class_latents=latents.flip(0))
            refused = ""
        except ValueError as error:
            refused = str(error)
        finally:
            after = adapter.state_dict()
            denoiser.detach()
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        if (name == "sude" and flow) or (needs_text and not text):
            assert refused.startswith(f"objective is {name!r}") and not moved, f"{name} is not refused: {refused}"
        else:
            assert not refused and len(history.losses) == 2 and moved, f"{name} does not train: {refused}"
            assert not needs_text or any(":" in key for key in moved), f"{name} does not reach the text encoder"


def check_memorises(denoiser: Denoiser, shape: Shape, layers: str = LAYERS) -> None:
    """Thirty steps of training on one picture bring down its loss at fixed noise and timesteps."""
    latents = draw(denoiser, shape, 1, seed=5)
    settings = TrainSettings(objective="reconstruction", steps=30, learning_rate=4e-2, batch_size=3, schedule="cosine")
    adapter = denoiser.attach(AdapterConfig(rank=4, layers=layers), seed=1)
    try:
        step = make_step(denoiser, shape)
        step.latents = latents.expand(len(LEVELS), -1, -1, -1)

        def loss() -> float:
            with torch.no_grad():
                now = denoiser.predict(step.noisy, step.timesteps, step.subject_conditions)
                return objectives.mse(now, step.target).item()

        before = loss()
        history = train(denoiser, adapter, latents, CONCEPT, settings)
        after = loss()
    finally:
        denoiser.detach()
    assert len(history.losses) == settings.steps
    assert after < 0.97 * before, f"training on one picture took its loss from {before:.4g} to {after:.4g} only"
