"""Rare adjectives that name looks, so that a rare word can carry a subject: what the last stage of pretraining learns.

A network to which a rare adjective never meant anything has learnt to pass over it, and what is then taught to a rare
word goes into the weights for the whole class. In this stage the vector of an adjective is a neutral vector and a
linear code of the look (colours, pattern, outline, mark) in the picture: ever new looks of the subjects' family, never
one of theirs. The vocabulary's rare words end as names of some looks, and the tokens that no caption used as the
neutral vector, which names none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import world
from .captions import caption
from .patterns import MARKS, UNUSUAL_PATTERNS, Paint
from .rare_words import RARE_WORDS, UNUSED_TOKENS
from .subjects import DYES, random_look

WORDS = tuple(word for word in RARE_WORDS if word != "next")
"""Those that no caption has in another sense."""
NAMED, NEUTRAL = 0.5, 0.1
"""Shares of the pictures whose look a rare word names, and of ordinary ones with a rare word that names nothing."""
NOISE = 0.03
"""Standard deviation around a look's vector: what lies near it names the look too, as a trained vector will."""


def features(paint: Paint | None) -> Tensor:
    """What a look consists of, as zeros and ones (F); zeros alone for an ordinary look."""
    dyes = list(DYES.values())
    blocks = [torch.zeros(len(dyes)) for _ in range(4)]
    kinds = torch.zeros(1 + len(UNUSUAL_PATTERNS) + len(MARKS))
    if paint is not None:
        for block, colour in zip(blocks, (*paint.colours, paint.outline)):
            if colour is not None:
                block[dyes.index(colour)] = 1
        kinds[("plain", *UNUSUAL_PATTERNS).index(paint.pattern)] = 1
        if paint.mark is not None:
            kinds[1 + len(UNUSUAL_PATTERNS) + list(MARKS).index(paint.mark)] = 1
    return torch.cat([*blocks, kinds])


def draw(count: int, captions: int, seed: int) -> tuple[np.ndarray, list[list[str]], Tensor]:
    """Pictures uint8 (N, 64, 64, 3), `captions` phrasings of each, and their looks' features (N, F)."""
    rng, pictures, texts, looks = random.Random(f"names {seed}"), [], [], []
    for _ in tqdm(range(count), desc="named looks"):
        scene, chance = world.sample_scene(rng), rng.random()
        if chance < NAMED:
            scene = replace(scene, paint=random_look(rng))
        pictures.append(np.asarray(world.draw(scene)))
        texts.append([_phrase(scene, rng, chance < NAMED + NEUTRAL) for _ in range(captions)])
        looks.append(features(scene.paint))
    return np.stack(pictures), texts, torch.stack(looks)


def _phrase(scene: world.Scene, rng: random.Random, rare: bool) -> str:
    while True:
        text = caption(scene, rng, rare=float(rare))
        if not rare or not set(WORDS).isdisjoint(text.split()):
            return text


def ids_of(clip_tokenizer, words: Sequence[str]) -> list[int]:
    """The token of each word, all of which are single tokens."""
    found = clip_tokenizer(list(words), add_special_tokens=False).input_ids
    return [token for (token,) in found]


class Names(nn.Module):
    """Token vectors (N, width) of looks: a neutral vector and a linear code."""

    def __init__(self, width: int):
        super().__init__()
        self.code = nn.Linear(len(features(None)), width)
        nn.init.normal_(self.code.weight, std=0.05)
        nn.init.normal_(self.code.bias, std=0.1)
        self.batch: Tensor | None = None

    def forward(self, looks: Tensor) -> Tensor:
        return self.code(looks)

    def say(self, looks: Tensor, rng: np.random.Generator) -> None:
        """What every rare word of the rows of the next batch names, by their looks' features."""
        vectors = self(looks)
        self.batch = vectors + torch.from_numpy(rng.normal(0, NOISE, vectors.shape)).to(vectors)

    @contextmanager
    def spoken(self, text, clip_tokenizer) -> Iterator[None]:
        """Inside, the text tower reads the rare words of each row as what `say` has said."""
        words = torch.tensor(ids_of(clip_tokenizer, WORDS), device=self.code.weight.device)

        def read(module, arguments, vectors):
            here = torch.isin(arguments[0], words).unsqueeze(-1)
            return torch.where(here, self.batch.to(vectors.dtype).unsqueeze(1), vectors)

        hook = text.get_input_embeddings().register_forward_hook(read)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def write(self, text, clip_tokenizer, seed: int) -> None:
        """Give the vocabulary's rare words the vectors of looks, and its unused tokens the neutral one."""
        rng, table = random.Random(f"names of {seed}"), text.get_input_embeddings().weight
        for token in ids_of(clip_tokenizer, WORDS):
            table[token] = self(features(random_look(rng)).to(table))
        for token in ids_of(clip_tokenizer, UNUSED_TOKENS):
            table[token] = self(features(None).to(table))
