"""What is said of the pictures: the two prompts of the concept, captions, and their variants."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path

from ..checks import shown
from ..concept import Concept, check_template, plain_text
from .folder import read_text

ORDERS = 8
"""How many orders of its tags a shuffled caption is seen in, so that the set of prompts stays finite."""
_FEW = 3  # tags, which have 3! = 6 orders
MAX_BYTES = 2**14
"""Of a caption's file; T5, which reads the longest, takes 512 tokens."""


def read_caption(picture: Path) -> str:
    """The text of the .txt file beside a picture, by `plain_text`; ValueError, naming the file, if there is none."""
    file = picture.with_suffix(".txt")
    try:
        text = plain_text(read_text(file, MAX_BYTES))
    except FileNotFoundError as error:
        told = f"picture {shown(picture)} has no caption; write one into {shown(file.name)} beside it"
        raise ValueError(told) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"caption {shown(file)} cannot be read ({reason}); write it again as UTF-8 text") from error
    if not text:
        raise ValueError(f"caption {shown(file)} is empty; write what the picture shows, with the subject's words")
    return text


def check_captions(captions: Mapping[str, str], count_tokens: Callable[[str], int], limit: int) -> None:
    """Check that no caption is longer than the text encoder reads.

    Args:
        captions: name (a file, or `subject_prompt`) to text.
        count_tokens: tokens of a text, with those of its start and end.
        limit: tokens that the encoder takes, 77 for CLIP.

    Raises:
        ValueError: naming the first that is too long.
    """
    for name, caption in captions.items():
        count = count_tokens(caption)
        if count > limit:
            raise ValueError(f"caption of {name} has {count} tokens, but the text encoder takes {limit}; shorten it")


def prompt_pairs(
    concept: Concept,
    names: Sequence[str],
    captions: Sequence[str | None] | None = None,
    templates: Sequence[str] = (),
    shuffle: bool = False,
    seed: int = 0,
) -> list[list[tuple[str, str]]]:
    """What may be said of each picture: its subject prompts, each with its class prompt.

    They are the picture's own caption, or the templates with the subject's words for {}, or the concept's own prompts,
    which stand for a caption that is None too. With `shuffle` each comes in up to 8 seeded orders of its
    comma-separated tags, of which the written one is first.

    Raises:
        ValueError: for a caption that does not name the subject (naming its picture), or captions and templates both.
    """
    if captions is not None and templates:
        raise ValueError("templates are given, but the pictures have captions of their own; take one of the two")
    for template in templates:
        check_template(template)
    told: list[list[str]]
    if captions is not None:
        told = [[concept.subject_prompt if caption is None else caption] for caption in captions]
    else:
        filled = [template.replace("{}", concept.subject_phrase) for template in templates]
        told = [filled or [concept.subject_prompt]] * len(names)

    def pairs(prompt: str, name: str) -> list[tuple[str, str]]:
        if prompt == concept.subject_prompt and not shuffle:
            return [(prompt, concept.class_prompt)]
        orders = _orders(prompt, seed) if shuffle else [prompt]
        return [(order, concept.class_of(order, f"caption of {name}")) for order in orders]

    return [[pair for prompt in prompts for pair in pairs(prompt, name)] for name, prompts in zip(names, told)]


def _orders(caption: str, seed: int) -> list[str]:
    """Up to `ORDERS` different orders of a caption's tags, always the same ones for a seed."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    orders = {", ".join(tags): None}  # a set that keeps its order
    if len(set(tags)) < 2:
        return list(orders)
    if len(tags) <= _FEW:
        return list(orders | {", ".join(order): None for order in permutations(tags)})
    chance = random.Random(f"{seed}:{caption}")
    for _ in range(20 * ORDERS):  # of repeated tags there may be fewer orders
        if len(orders) == ORDERS:
            break
        orders[", ".join(chance.sample(tags, len(tags)))] = None
    return list(orders)
