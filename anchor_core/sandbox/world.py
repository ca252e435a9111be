"""The world that the embedded model is pretrained on: scenes and their pictures, drawn by code."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .model import PICTURE_SIZE
from .patterns import SUPERSAMPLING, Paint, draw_mark, fill_unusual, grid

SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "ring", "cross")
COLOURS = {
    "red": (214, 36, 40),
    "orange": (247, 146, 30),
    "yellow": (250, 226, 60),
    "green": (34, 150, 62),
    "blue": (40, 84, 214),
    "purple": (134, 52, 176),
    "pink": (247, 146, 196),
    "brown": (124, 76, 40),
    "white": (248, 248, 248),
    "black": (22, 22, 24),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
OUTLINES = ("none", "black", "white")
PLAIN_BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (150, 152, 156),
    "light blue": (170, 214, 246),
    "cream": (248, 234, 196),
}
TEXTURED_BACKGROUNDS = {
    "grass": (96, 178, 70),
    "sand": (226, 196, 132),
    "snow": (228, 238, 248),
    "bricks": (176, 92, 72),
    "wood": (174, 124, 74),
    "night": (24, 26, 70),
    "water": (60, 146, 196),
    "tiles": (196, 200, 204),
}
BACKGROUNDS = {**PLAIN_BACKGROUNDS, **TEXTURED_BACKGROUNDS}
ACCESSORIES = ("none", "hat", "ball", "box")
ACCESSORY_COLOURS = ("red", "yellow", "green", "blue", "purple")
POSITIONS = ("left", "centre", "right")
SIZES = ("small", "medium", "large")

_RADIUS = {"small": (12.0, 13.5), "medium": (14.0, 16.0), "large": (17.0, 19.0)}
_CENTRE = {"left": 23.0, "centre": 32.0, "right": 41.0}
_NEIGHBOUR_RADIUS = 6.5
_CONTRAST = 85.0
"""Least RGB distance between an object and what lies behind it."""


@dataclass(frozen=True)
class Scene:
    """Everything that a caption may say of a picture, and `seed` for what it may not.

    `paint` replaces the body's ordinary look (colour, pattern, outline) where it is given.
    """

    shape: str
    colour: str = "red"
    pattern: str = "plain"
    outline: str = "none"
    background: str = "white"
    accessory: str = "none"
    accessory_colour: str = "red"
    position: str = "centre"
    size: str = "medium"
    paint: Paint | None = None
    seed: int = 0


def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """RGB distance."""
    return math.dist(a, b)


def sample_scene(rng: random.Random) -> Scene:
    """A scene whose objects stand out from what lies behind them."""
    while True:
        scene = Scene(
            shape=rng.choice(SHAPES),
            colour=rng.choice(tuple(COLOURS)),
            pattern=rng.choice(("plain", "plain", *PATTERNS)),
            outline=rng.choice(("none", "none", "black", "white")),
            background=rng.choice(tuple(BACKGROUNDS)),
            accessory=rng.choice(("none", "none", "hat", "ball", "box")),
            accessory_colour=rng.choice(ACCESSORY_COLOURS),
            position=rng.choice(("left", "centre", "centre", "right")),
            size=rng.choice(("small", "medium", "medium", "large")),
            seed=rng.randrange(2**31),
        )
        if is_visible(scene):
            return scene


def is_visible(scene: Scene) -> bool:
    """Whether body, outline and accessory each differ enough from what lies behind them."""
    behind = BACKGROUNDS[scene.background]
    if scene.paint is None:
        body = COLOURS[scene.colour]
        if contrast(body, behind) < _CONTRAST:
            return False
        if scene.outline != "none" and (
            contrast(COLOURS[scene.outline], body) < _CONTRAST or contrast(COLOURS[scene.outline], behind) < 60
        ):
            return False
    if scene.accessory == "none":
        return True
    accessory = COLOURS[scene.accessory_colour]
    if contrast(accessory, behind) < _CONTRAST:
        return False
    return (
        scene.accessory != "hat" or scene.paint is not None or contrast(accessory, COLOURS[scene.colour]) >= _CONTRAST
    )


def ordinary_paint(scene: Scene) -> Paint:
    """The paint of the scene's colour, pattern and outline words."""
    second = COLOURS["black"] if scene.colour in ("white", "yellow", "pink") else COLOURS["white"]
    outline = None if scene.outline == "none" else COLOURS[scene.outline]
    return Paint((COLOURS[scene.colour], second), scene.pattern, outline)


# --- pictures -------------------------------------------------------------------------------------------------------


def draw(scene: Scene) -> Image.Image:
    """The scene's picture, RGB, `PICTURE_SIZE` square; the same scene always gives the same picture."""
    rng = random.Random(scene.seed)
    picture = background(scene.background, rng).resize((PICTURE_SIZE * SUPERSAMPLING,) * 2, Image.Resampling.NEAREST)
    cx, cy, radius, neighbour = _layout(scene, rng)
    paint_body(picture, scene.shape, cx, cy, radius, scene.paint or ordinary_paint(scene))
    if scene.accessory == "hat":
        _draw_hat(picture, scene.shape, cx, cy, radius, COLOURS[scene.accessory_colour])
    elif scene.accessory != "none":
        _draw_neighbour(picture, scene.accessory, *neighbour, COLOURS[scene.accessory_colour])
    return picture.resize((PICTURE_SIZE,) * 2, Image.Resampling.BOX)


def _layout(scene: Scene, rng: random.Random) -> tuple[float, float, float, tuple[float, float]]:
    """Centre, radius and the neighbour's centre, in pixels of the final picture."""
    radius = rng.uniform(*_RADIUS[scene.size])
    cx = _CENTRE[scene.position] + rng.uniform(-2.5, 2.5)
    cy = 32.0 + rng.uniform(-3.5, 3.5)
    margin = radius + 1.5
    if scene.accessory == "hat":
        cy = max(cy, radius * 1.75 + 2)
    cx, cy = min(max(cx, margin), 64 - margin), min(max(cy, margin), 64 - margin)
    side = 1 if scene.position == "left" or (scene.position == "centre" and rng.random() < 0.5) else -1
    reach = radius + _NEIGHBOUR_RADIUS + 1.0
    if scene.accessory in ("ball", "box"):  # make room for the neighbour
        limit = 64 - _NEIGHBOUR_RADIUS - 1
        cx = min(cx, limit - reach) if side > 0 else max(cx, reach + 64 - limit)
    neighbour = (
        cx + side * reach,
        min(cy + radius - _NEIGHBOUR_RADIUS + rng.uniform(0, 2), 64 - _NEIGHBOUR_RADIUS - 1),
    )
    return cx, cy, radius, neighbour


def _scaled(points) -> list[tuple[float, float]]:
    return [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]


def _polygon(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        s = r * 0.86
        return [(cx - s, cy - s), (cx + s, cy - s), (cx + s, cy + s), (cx - s, cy + s)]
    if shape == "triangle":
        return [(cx, cy - r), (cx + r, cy + r * 0.85), (cx - r, cy + r * 0.85)]
    if shape == "star":
        corners = []
        for i in range(10):
            radius = r * (1.08 if i % 2 == 0 else 0.48)
            angle = math.pi * (i / 5 - 0.5)
            corners.append((cx + radius * math.cos(angle), cy + radius * math.sin(angle)))
        return corners
    if shape == "heart":
        corners = []
        for i in range(60):
            a = 2 * math.pi * i / 60
            x = 16 * math.sin(a) ** 3
            y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
            corners.append((cx + x * r / 16, cy - (y + 2) * r / 15))
        return corners
    if shape == "cross":
        a, b = r * 0.36, r
        return [
            (cx - a, cy - b), (cx + a, cy - b), (cx + a, cy - a), (cx + b, cy - a), (cx + b, cy + a), (cx + a, cy + a),
            (cx + a, cy + b), (cx - a, cy + b), (cx - a, cy + a), (cx - b, cy + a), (cx - b, cy - a), (cx - a, cy - a),
        ]  # fmt: skip
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _disc(draw: ImageDraw.ImageDraw, cx: float, cy: float, r: float, fill) -> None:
    k = SUPERSAMPLING
    draw.ellipse(((cx - r) * k, (cy - r) * k, (cx + r) * k, (cy + r) * k), fill=fill)


def body_mask(shape: str, cx: float, cy: float, r: float) -> Image.Image:
    """Where the body is, mode L, at the supersampled size."""
    mask = Image.new("L", (PICTURE_SIZE * SUPERSAMPLING,) * 2, 0)
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        _disc(pen, cx, cy, r, 255)
    elif shape == "ring":
        _disc(pen, cx, cy, r, 255)
        _disc(pen, cx, cy, r * 0.48, 0)
    elif shape == "moon":
        _disc(pen, cx, cy, r, 255)
        _disc(pen, cx + r * 0.55, cy - r * 0.1, r * 0.78, 0)
    else:
        pen.polygon(_scaled(_polygon(shape, cx, cy, r)), fill=255)
    return mask


def paint_body(picture: Image.Image, shape: str, cx: float, cy: float, r: float, paint: Paint) -> None:
    """Draw a body into the supersampled picture."""
    mask = body_mask(shape, cx, cy, r)
    if paint.outline is not None:
        thickness = 1.9
        outer = _dilated(mask, thickness)
        picture.paste(paint.outline, mask=outer)
    fill = _fill(picture.size, paint, cx, cy) if paint.pattern in PATTERNS else fill_unusual(paint, cx, cy, r)
    if paint.mark is not None:
        fill = draw_mark(fill, paint, cx, cy, r)
    picture.paste(fill, mask=mask)


def _dilated(mask: Image.Image, thickness: float) -> Image.Image:
    """The mask grown by `thickness` pixels of the final picture, as the union of shifted copies."""
    grown = np.asarray(mask)
    result = grown.copy()
    reach = thickness * SUPERSAMPLING
    for i in range(16):
        dx, dy = round(reach * math.cos(i * math.pi / 8)), round(reach * math.sin(i * math.pi / 8))
        np.maximum(result, np.roll(grown, (dy, dx), (0, 1)), out=result)
    return Image.fromarray(result)


def _fill(size: tuple[int, int], paint: Paint, cx: float, cy: float) -> Image.Image:
    """An ordinary pattern, centred on the body."""
    fill = Image.new("RGB", size, paint.colours[0])
    if paint.pattern == "plain":
        return fill
    x, y = grid(cx, cy)
    if paint.pattern == "striped":
        second = (y + 2.0) % 8.0 < 4.0
    elif paint.pattern == "dotted":
        second = ((x + 4.0) % 8.0 - 4.0) ** 2 + ((y + 4.0) % 8.0 - 4.0) ** 2 < 2.3**2
    else:
        second = ((x // 5.5) + (y // 5.5)) % 2 == 0
    fill.paste(paint.colours[1], mask=Image.fromarray(np.where(second, 255, 0).astype(np.uint8)))
    return fill


def _draw_hat(picture: Image.Image, shape: str, cx: float, cy: float, r: float, colour) -> None:
    top = cy - r * {"square": 0.86, "heart": 0.62, "star": 0.9}.get(shape, 0.96)
    pen = ImageDraw.Draw(picture)
    w = r * 0.52
    dark = tuple(int(c * 0.55) for c in colour)
    height = max(r * 0.62, 6.0)
    pen.rectangle(_box(cx - w, top - height, cx + w, top + 1.0), fill=colour)
    pen.rectangle(_box(cx - w, top - 2.6, cx + w, top - 0.4), fill=dark)
    pen.rectangle(_box(cx - w * 1.75, top - 0.6, cx + w * 1.75, top + 2.2), fill=colour)


def _box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
    k = SUPERSAMPLING
    return x0 * k, y0 * k, x1 * k, y1 * k


def _draw_neighbour(picture: Image.Image, kind: str, x: float, y: float, colour) -> None:
    pen = ImageDraw.Draw(picture)
    r = _NEIGHBOUR_RADIUS
    light = tuple(min(255, int(c * 0.5 + 128)) for c in colour)
    dark = tuple(int(c * 0.5) for c in colour)
    if kind == "ball":
        _disc(pen, x, y, r - 0.3, colour)
        _disc(pen, x - 2.0, y - 2.2, 1.9, light)
    else:
        s = r - 0.6
        pen.rectangle(_box(x - s, y - s, x + s, y + s), fill=colour)
        pen.rectangle(_box(x - s, y - 1.1, x + s, y + 1.1), fill=dark)
        pen.rectangle(_box(x - 1.1, y - s, x + 1.1, y + s), fill=dark)


def background(name: str, rng: random.Random) -> Image.Image:
    """A background of `PICTURE_SIZE`, RGB; `rng` shifts textures and varies the brightness a little."""
    shade = rng.uniform(0.96, 1.03)
    if name in PLAIN_BACKGROUNDS:
        colour = tuple(min(255, int(c * shade)) for c in PLAIN_BACKGROUNDS[name])
        return Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), colour)
    bank = _texture_bank(name)
    sheet = bank[rng.randrange(len(bank))]
    y, x = rng.randrange(PICTURE_SIZE), rng.randrange(PICTURE_SIZE)
    crop = sheet[y : y + PICTURE_SIZE, x : x + PICTURE_SIZE]
    return Image.fromarray(np.clip(crop * shade, 0, 255).astype(np.uint8))


@cache
def _texture_bank(name: str) -> list[np.ndarray]:
    """Eight sheets of twice the picture's size, drawn once: a texture differs by sheet and by crop."""
    return [_texture(name, np.random.default_rng([seed, sum(map(ord, name))])) for seed in range(8)]


def _texture(name: str, rng: np.random.Generator) -> np.ndarray:
    size = 2 * PICTURE_SIZE
    sheet = np.empty((size, size, 3), np.float32)
    sheet[:] = TEXTURED_BACKGROUNDS[name]
    rows, columns = np.mgrid[0:size, 0:size]
    if name == "grass":
        for _ in range(size * 6):
            y, x, length = rng.integers(0, size - 6), rng.integers(0, size), rng.integers(3, 6)
            sheet[y : y + length, x] *= rng.uniform(0.7, 1.15)
    elif name == "sand":
        sheet += rng.choice([-26, 0, 0, 0, 14], (size, size, 1))
    elif name == "snow":
        for _ in range(size * 2):
            y, x = rng.integers(0, size - 2, 2)
            sheet[y : y + 2, x : x + 2] = (190, 210, 236) if rng.random() < 0.5 else (255, 255, 255)
    elif name == "bricks":
        course = rows // 8
        mortar = (rows % 8 < 1) | ((columns + 8 * (course % 2)) % 16 < 1)
        tint = np.random.default_rng(1).uniform(0.88, 1.08, (size // 8 + 1, size // 16 + 2))
        sheet *= tint[course, (columns + 8 * (course % 2)) // 16][..., None]
        sheet[mortar] = (218, 206, 196)
    elif name == "wood":
        board = rows // 10
        sheet *= np.array([1.0, 0.9, 1.06, 0.95])[board % 4][..., None]
        sheet *= (1 + 0.04 * np.sin(columns / 5.0 + board * 2.1))[..., None]
        sheet[rows % 10 < 1] *= 0.6
    elif name == "night":
        for _ in range(size):
            y, x = rng.integers(0, size, 2)
            sheet[y, x] = (236, 236, 200)
    elif name == "water":
        wave = np.sin(rows / 1.9 + 1.6 * np.sin(columns / 6.0 + rng.uniform(0, 6)))
        sheet *= (1 + 0.16 * wave)[..., None]
    elif name == "tiles":
        dark = ((rows // 16) + (columns // 16)) % 2 == 0
        sheet[dark] *= 0.82
        sheet[(rows % 16 < 1) | (columns % 16 < 1)] = (244, 246, 248)
    return sheet


def with_background(scene: Scene, name: str) -> Scene:
    return replace(scene, background=name)
