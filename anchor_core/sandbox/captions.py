"""Captions of the world's scenes, in many phrasings."""

from __future__ import annotations

import random

from .rare_words import RARE_WORDS
from .world import Scene

OPENINGS = ("a photo of", "a picture of", "an image of", "a drawing of", "a close view of", "")
_PLACES = {
    "white": ("on a white background", "against a white wall"),
    "grey": ("on a grey background", "against a grey wall"),
    "light blue": ("on a light blue background", "against a light blue wall"),
    "cream": ("on a cream background", "against a cream wall"),
    "grass": ("in the grass", "on green grass", "on a lawn"),
    "sand": ("on the sand", "on the beach", "in the desert"),
    "snow": ("in the snow", "on snowy ground", "in a snowy field"),
    "bricks": ("in front of a brick wall", "against a brick wall"),
    "wood": ("on a wooden floor", "on a wooden table"),
    "night": ("under the night sky", "at night", "in front of a starry sky"),
    "water": ("on the water", "floating in the sea", "in the ocean"),
    "tiles": ("on a tiled floor", "on kitchen tiles"),
}
_PATTERN_WORDS = {
    "striped": ("striped", "with stripes"),
    "dotted": ("dotted", "spotted", "with dots"),
    "checked": ("checked", "with a checked pattern"),
}
_BESIDE = ("next to", "beside", "near")
_POSITION_WORDS = {
    "left": ("on the left", "to the left"),
    "right": ("on the right", "to the right"),
    "centre": ("in the middle",),
}


def article(phrase: str) -> str:
    """The phrase with `a` or `an` before it."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def nonsense(rng: random.Random) -> str:
    """A rare adjective, without meaning until `naming` gives it one; never `sks`."""
    return rng.choice(RARE_WORDS)


def caption(scene: Scene, rng: random.Random, *, complete: bool = False, rare: float = 0.15) -> str:
    """One of many phrasings of the scene.

    Args:
        scene: what is in the picture; its `paint` is not spoken of.
        rng: chooses the phrasing and what is left unsaid.
        complete: say shape, colour, pattern, background and accessory all.
        rare: probability of a nonsense adjective.
    """

    def said(probability: float) -> bool:
        return complete or rng.random() < probability

    before, after = [], []
    if rng.random() < rare:
        before.append(nonsense(rng))
    if scene.size != "medium" and rng.random() < 0.5:
        before.append({"small": rng.choice(("small", "little")), "large": rng.choice(("large", "big"))}[scene.size])
    if scene.paint is None:
        if said(0.75):
            before.append(scene.colour)
        if scene.pattern != "plain" and said(0.75):
            words = rng.choice(_PATTERN_WORDS[scene.pattern])
            (after if words.startswith("with") else before).append(words)
        if scene.outline != "none" and rng.random() < 0.6:
            after.append(f"with a {scene.outline} outline")
    subject = article(" ".join([*before, scene.shape]))
    if scene.accessory == "hat" and said(0.85):
        after.append(f"wearing {article(scene.accessory_colour + ' hat')}")
    elif scene.accessory != "none" and said(0.85):
        after.append(f"{rng.choice(_BESIDE)} {article(scene.accessory_colour + ' ' + scene.accessory)}")
    place = [rng.choice(_PLACES[scene.background])] if said(0.75) else []
    if rng.random() < 0.2:
        place.append(rng.choice(_POSITION_WORDS[scene.position]))
    opening = rng.choice(OPENINGS)
    return " ".join(part for part in (opening, subject, *after, *place) if part)


def phrase_of(background_name: str) -> str:
    """The first phrasing of a background, for prompts."""
    return _PLACES[background_name][0]
