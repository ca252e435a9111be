"""What the checks of the contract are made of: prompts, noise, a training step, and an adapter that has an effect."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.config import AdapterConfig
from anchor_core.concept import Concept
from anchor_core.denoiser import Denoiser, Step, Texts

CONCEPT = Concept("a photo of a sks dog", "a photo of a dog")
LEVELS = (0.1, 0.5, 0.9)
LAYERS = "all_linear"

Shape = tuple[int, int, int]


def outcome(check: Callable, *arguments, **options) -> str:
    """What is wrong, or "": for a script under another interpreter, whose checks a test reads one by one."""
    try:
        check(*arguments, **options)
    except Exception:  # what is wrong is what this is asked for
        return traceback.format_exc()[-3000:]
    return ""


def draw(denoiser: Denoiser, shape: Shape, rows: int = len(LEVELS), seed: int = 0) -> Tensor:
    """Unit noise (rows, C, h, w) on the denoiser's device."""
    return torch.randn((rows, *shape), generator=torch.Generator().manual_seed(seed)).to(denoiser.device)


def times(denoiser: Denoiser, levels: tuple[float, ...] = LEVELS) -> Tensor:
    return denoiser.timesteps(torch.tensor(levels, dtype=torch.float64)).to(denoiser.device)


def make_step(denoiser: Denoiser, shape: Shape) -> Step:
    """A training step on fixed latents, noise and timesteps."""
    rows = len(LEVELS)
    subject = [denoiser.encode_prompt(CONCEPT.subject_prompt)] * rows
    class_ = [denoiser.encode_prompt(CONCEPT.class_prompt)] * rows
    latents, noise = draw(denoiser, shape, seed=1), draw(denoiser, shape, seed=2)
    conditions = {prompt: denoiser.encode_prompt(prompt) for prompt in (CONCEPT.class_prompt, "")}
    texts = Texts(
        [CONCEPT.class_prompt] * rows, lambda prompts: [conditions[p] for p in prompts], CONCEPT.subject_prompt
    )
    return Step(denoiser, latents, noise, times(denoiser), subject, class_, texts=texts)


def stir(adapter: Adapter, size: float = 0.2) -> None:
    """Give every adapter parameter a seeded value, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


@contextmanager
def attached(denoiser: Denoiser, layers: str = LAYERS, **options) -> Iterator[Adapter]:
    """A stirred adapter of rank 2, taken off at the end."""
    adapter = denoiser.attach(AdapterConfig(rank=2, layers=layers, **options), seed=1)
    try:
        stir(adapter)
        yield adapter
    finally:
        denoiser.detach()
