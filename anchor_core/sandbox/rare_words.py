"""Words of the vocabulary that no ordinary caption needs."""

from __future__ import annotations

import random

CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


def _rare_words() -> tuple[str, ...]:
    """160 meaningless words, half without a vowel as `sks` is; `sks` itself is not among them."""
    rng = random.Random(0)
    words: set[str] = set()
    while len(words) < 160:
        c = rng.choices(CONSONANTS, k=3)
        word = c[0] + c[1] + c[2] if len(words) % 2 else c[0] + rng.choice(VOWELS) + c[1] + c[2]
        if word != "sks":
            words.add(word)
    return tuple(sorted(words))


RARE_WORDS = _rare_words()


UNUSED_TOKENS = ("sks", "ohwx", "zwx", "qwe")
"""Single tokens of the vocabulary that no caption ever uses, for naming a subject."""
