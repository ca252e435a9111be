"""How published methods vary what a picture says and how large its subject is."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a photo of my {}",
    "a photo of one {}",
    "a picture of a {}",
    "a picture of the {}",
    "a drawing of a {}",
    "a depiction of the {}",
    "a good photo of a {}",
    "a good photo of the {}",
    "a bad photo of a {}",
    "a bright photo of the {}",
    "a dark photo of a {}",
    "a sharp photo of the {}",
    "a blurry photo of a {}",
    "a grainy photo of the {}",
    "a close photo of a {}",
    "a close photo of the {}",
    "a cut-off photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a photo of a large {}",
    "a photo of a small {}",
    "a photo of a nice {}",
    "a photo of a strange {}",
    "a photo of the cool {}",
    "a photo of the odd {}",
)
"""27 neutral prompts in the form of Textual Inversion's (arXiv 2208.01618), of which one is drawn each time."""

SMALLER = 0.66
"""Share of the resized pictures that are made smaller; the others are enlarged and cut."""
FAR, NEAR = ("a far away", "very small"), ("zoomed in", "close up")
_FAR_BELOW = 0.6


def resized(
    picture: Tensor, mask: Tensor | None, prompts: Sequence[str], count: int, chance: random.Random
) -> list[tuple[Tensor, Tensor, list[str]]]:
    """Custom Diffusion's resizing (arXiv 2212.04488): pictures of other sizes, each with its mask and prompts.

    Of `SMALLER` of them the picture has a side of 1/3 to 1 of its own, and lies anywhere on grey, where no loss counts,
    nor along its edge; the others are enlarged 1.2 to 1.4 times and cut anywhere. Prompts of those below 0.6 of the
    size begin with one of `FAR`, of enlarged ones with one of `NEAR`. The published code draws anew in every step,
    this `count` times for a picture.

    Args:
        picture: (3, H, W) in [0, 1].
        mask: where its loss counts, (1, H, W); None for everywhere.
    """
    height, width = picture.shape[1:]
    whole = torch.ones(1, height, width) if mask is None else mask
    made = []
    for _ in range(count):
        smaller = chance.random() < SMALLER
        scale = chance.uniform(1 / 3, 1) if smaller else chance.uniform(1.2, 1.4)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        small, seen = (_resize(each, size) for each in (picture, whole))
        top, left = (chance.randint(0, abs(outer - inner)) for outer, inner in zip((height, width), size))
        if smaller:
            edge = round(min(height, width) / 64)  # a latent of a picture of 512
            inner = (slice(top, top + size[0]), slice(left, left + size[1]))
            canvas, counts = torch.full_like(picture, 0.5), torch.zeros_like(whole)
            canvas[:, inner[0], inner[1]] = small
            seen[:, :edge] = seen[:, size[0] - edge :] = seen[:, :, :edge] = seen[:, :, size[1] - edge :] = 0
            counts[:, inner[0], inner[1]] = seen
        else:
            canvas, counts = (each[:, top : top + height, left : left + width] for each in (small, seen))
        words = FAR if scale < _FAR_BELOW else NEAR if not smaller else ()
        word = chance.choice(words) if words else ""
        made.append((canvas, counts, [_with(word, prompt) for prompt in prompts]))
    return made


def _resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def _with(words: str, prompt: str) -> str:
    """A photo of a dog as a far away photo of a dog."""
    return f"{words} {re.sub(r'^(a|an|the) ', '', prompt, flags=re.IGNORECASE)}" if words else prompt
