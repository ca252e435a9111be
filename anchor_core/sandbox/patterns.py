"""How a body is painted: its look, and the patterns and marks that pretraining never drew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .model import PICTURE_SIZE

SUPERSAMPLING = 4


@dataclass(frozen=True)
class Paint:
    """How a body is filled.

    Attributes:
        colours: RGB triples; pretraining uses one colour of `world.COLOURS`, and white or black as the second.
        pattern: one of `world.PATTERNS`, or one of `UNUSUAL_PATTERNS`.
        outline: RGB of the outline, or None.
        mark: None, or one of `MARKS`, drawn over the pattern.
    """

    colours: tuple[tuple[int, int, int], ...]
    pattern: str = "plain"
    outline: tuple[int, int, int] | None = None
    mark: str | None = None


def grid(cx: float, cy: float) -> tuple[np.ndarray, np.ndarray]:
    """Supersampled pixel coordinates relative to (cx, cy), in pixels of the final picture."""
    axis = (np.arange(PICTURE_SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    x, y = np.meshgrid(axis - cx, axis - cy)
    return x, y


UNUSUAL_PATTERNS = ("halves", "quarters", "bullseye", "zigzag", "diagonal", "band")


MARKS = ("face", "eye", "patch", "belt")


def fill_unusual(paint: Paint, cx: float, cy: float, r: float) -> Image.Image:
    """A held-out pattern, centred on a body of radius `r` pixels."""
    first, second, *_ = paint.colours
    x, y = (axis / r for axis in grid(cx, cy))
    where = {
        "halves": x > 0,
        "quarters": (x > 0) ^ (y > 0),
        "bullseye": (np.hypot(x, y) % 0.56) > 0.28,
        "zigzag": ((y + 0.5 * np.abs((x * 2.0) % 2.0 - 1.0)) % 0.66) > 0.33,
        "diagonal": ((x + y) % 0.8) > 0.4,
        "band": np.abs(y) < 0.3,
    }.get(paint.pattern)
    if where is None:
        raise ValueError(f"unknown pattern {paint.pattern!r}; known: {', '.join(UNUSUAL_PATTERNS)}")
    return Image.fromarray(np.where(where[..., None], np.uint8(second), np.uint8(first)))


def draw_mark(picture: Image.Image, paint: Paint, cx: float, cy: float, r: float) -> Image.Image:
    """A body's fill with the paint's mark over it, in the third colour or black."""
    fill, mark = np.array(picture), paint.mark
    colour = paint.colours[2] if len(paint.colours) > 2 else (0, 0, 0)
    x, y = (axis / r for axis in grid(cx, cy))

    def disc(cx: float, cy: float, radius: float) -> np.ndarray:
        return np.hypot(x - cx, y - cy) < radius

    if mark == "face":
        for side in (-0.34, 0.34):
            fill[disc(side, -0.16, 0.22)] = (255, 255, 255)
            fill[disc(side, -0.12, 0.11)] = colour
        smile = (np.abs(np.hypot(x, y - 0.05) - 0.42) < 0.08) & (y > 0.22)
        fill[smile] = colour
    elif mark == "eye":
        fill[disc(0, 0, 0.42)] = (255, 255, 255)
        fill[disc(0, 0, 0.22)] = colour
    elif mark == "patch":
        fill[disc(0.42, -0.3, 0.4)] = colour
    elif mark == "belt":
        fill[np.abs(y - 0.2) < 0.17] = colour
        fill[(np.abs(y - 0.2) < 0.11) & (np.abs(x) < 0.18)] = (255, 255, 255)
    else:
        raise ValueError(f"unknown mark {mark!r}; known: {', '.join(MARKS)}")
    return Image.fromarray(fill)
