"""Twelve held-out subjects: fixed looks that pretraining never drew; references, and prompts in DreamBench's manner."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image

from . import world
from .captions import phrase_of
from .patterns import MARKS, UNUSUAL_PATTERNS, Paint
from .world import Scene

DYES = {
    "teal": (0, 150, 140),
    "maroon": (120, 10, 50),
    "gold": (214, 168, 20),
    "navy": (20, 30, 110),
    "salmon": (252, 128, 104),
    "olive": (112, 120, 20),
    "violet": (190, 110, 250),
    "mint": (140, 240, 190),
    "coral": (255, 84, 70),
    "cyan": (40, 214, 240),
    "magenta": (226, 10, 150),
    "lime": (160, 230, 20),
    "plum": (90, 20, 100),
    "ivory": (255, 250, 226),
    "slate": (64, 84, 104),
    "rust": (190, 70, 14),
}
"""Colours that no ordinary scene uses."""
PROPERTIES = ("red", "purple", "striped", "small", "dotted")
"""What the last prompts of a subject change in it."""


def random_look(rng: random.Random) -> Paint:
    """A look of the subjects' family (never one of theirs), on which the judges learn to tell individuals apart."""
    while True:
        dyes = rng.sample(sorted(DYES), 4)
        look = Paint(
            tuple(DYES[name] for name in dyes[:3]),
            rng.choice(("plain", *UNUSUAL_PATTERNS)),
            rng.choice((None, DYES[dyes[3]])),
            rng.choice((None, *MARKS)),
        )
        if (look.pattern, look.mark) != ("plain", None) and all(look != s.paint for s in SUBJECTS.values()):
            return look


@dataclass(frozen=True)
class Subject:
    """One held-out individual: `class_word` is a shape of the world, `surroundings` where its pictures were taken."""

    name: str
    class_word: str
    paint: Paint
    surroundings: tuple[str, ...]
    count: int

    @property
    def colour_word(self) -> str:
        """The first colour's name among `DYES`."""
        return next(name for name, value in DYES.items() if value == self.paint.colours[0])

    def scenes(self) -> list[Scene]:
        """The references' scenes: few surroundings, no accessory, position and size as a photographer varies them."""
        rng = random.Random(f"references of {self.name}")
        return [
            Scene(
                self.class_word,
                background=self.surroundings[i % len(self.surroundings)],
                position=rng.choice(world.POSITIONS),
                size=rng.choice(("medium", "large")),
                paint=self.paint,
                seed=rng.randrange(2**31),
            )
            for i in range(self.count)
        ]

    def references(self) -> list[Image.Image]:
        """4 to 6 reference pictures, RGB, 64 px."""
        return [world.draw(scene) for scene in self.scenes()]

    def prompt_scenes(self) -> list[Scene | None]:
        """What the first 20 prompts ask for (for the exact readers); None where a property is changed."""
        scenes: list[Scene | None] = [scene for scene, _ in self._prompts("{}")]
        return scenes[: -len(PROPERTIES)] + [None] * len(PROPERTIES)

    def drawn(self, seed: int = 0) -> list[Image.Image]:
        """What each of the 25 prompts asks for, RGB, 64 px; `seed` chooses what a prompt leaves open."""
        return [
            world.draw(replace(scene, seed=100 * seed + number))
            for number, (scene, _) in enumerate(self._prompts("{}"))
        ]

    def _changed(self, word: str) -> Scene:
        """The subject with a property changed, and nothing else: a colour is that in place of its first."""
        scene = Scene(self.class_word, paint=self.paint)
        if word in world.COLOURS:
            return replace(scene, paint=replace(self.paint, colours=(world.COLOURS[word], *self.paint.colours[1:])))
        if word in world.PATTERNS:
            return replace(scene, paint=replace(self.paint, pattern=word))
        return replace(scene, size=word)

    def prompts(self, token: str = "sks") -> list[str]:
        """25 prompts: 10 new surroundings, 10 accessories and neighbours, 5 changed properties, as in DreamBench."""
        return [text for _, text in self._prompts(token)]

    def _prompts(self, token: str) -> list[tuple[Scene, str]]:
        who = f"{token} {self.class_word}".strip()
        body = Scene(self.class_word, paint=self.paint)
        rng = random.Random(f"prompts of {self.name}")
        elsewhere = [name for name in world.BACKGROUNDS if name not in self.surroundings]
        rng.shuffle(elsewhere)
        prompts = []
        for place in elsewhere[:10]:
            scene = world.with_background(body, place)
            prompts.append((scene, f"a photo of a {who} {phrase_of(place)}"))
        kinds = ["hat"] * 4 + ["ball"] * 3 + ["box"] * 3
        for i, kind in enumerate(kinds):
            colour = world.ACCESSORY_COLOURS[i % len(world.ACCESSORY_COLOURS)]
            places = [
                name for name in elsewhere if world.contrast(world.COLOURS[colour], world.BACKGROUNDS[name]) > 120
            ]
            place = places[i % len(places)]
            scene = Scene(self.class_word, paint=self.paint, background=place, accessory=kind, accessory_colour=colour)
            with_what = f"wearing a {colour} hat" if kind == "hat" else f"next to a {colour} {kind}"
            prompts.append((scene, f"a photo of a {who} {with_what} {phrase_of(place)}"))
        for word in PROPERTIES:
            prompts.append((self._changed(word), f"a photo of a {word} {who}"))
        return prompts


def _subject(name, class_word, dyes, pattern, outline, mark, surroundings, count) -> Subject:
    paint = Paint(tuple(DYES[d] for d in dyes), pattern, DYES[outline] if outline else None, mark)
    return Subject(name, class_word, paint, surroundings, count)


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        _subject("pip", "star", ("teal", "gold", "navy"), "halves", "navy", "face", ("wood", "cream"), 5),
        _subject("momo", "heart", ("cyan", "magenta", "ivory"), "bullseye", None, None, ("grass", "white"), 5),
        _subject("bolt", "square", ("gold", "plum", "teal"), "zigzag", "plum", None, ("grey", "tiles"), 4),
        _subject("luna", "moon", ("violet", "mint", "navy"), "diagonal", "navy", None, ("night", "light blue"), 5),
        _subject("dot", "circle", ("salmon", "teal", "maroon"), "quarters", None, "eye", ("snow", "white"), 6),
        _subject("tri", "triangle", ("lime", "maroon", "navy"), "band", "maroon", "eye", ("sand", "cream"), 4),
        _subject("loop", "ring", ("magenta", "ivory", "cyan"), "quarters", "plum", None, ("water", "grey"), 5),
        _subject("plus", "cross", ("cyan", "navy", "coral"), "halves", "gold", "eye", ("bricks", "wood"), 4),
        _subject("rosie", "heart", ("maroon", "gold", "ivory"), "plain", "gold", "face", ("tiles", "white"), 6),
        _subject("captain", "circle", ("navy", "ivory", "coral"), "band", "cyan", "patch", ("water", "sand"), 5),
        _subject("ziggy", "star", ("magenta", "lime", "plum"), "zigzag", None, "patch", ("grey", "night"), 5),
        _subject("boxer", "square", ("olive", "salmon", "slate"), "plain", "ivory", "belt", ("grass", "wood"), 4),
    )
}


def names() -> list[str]:
    """The held-out subjects' names."""
    return list(SUBJECTS)


def get(name: str) -> Subject:
    """The subject of that name; ValueError lists the known ones."""
    if name not in SUBJECTS:
        raise ValueError(f"unknown subject {name!r}; known: {', '.join(SUBJECTS)}")
    return SUBJECTS[name]
