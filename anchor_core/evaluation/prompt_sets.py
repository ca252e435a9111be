"""Prompts for the diagnostics of semantic collapse, of our own writing, and the parts that CLIP-T is split by.

The authors had 200 sentences of 10 to 30 words on diverse topics written, each with the keyword, and as many simple
ones (arXiv 2506.22685); these are others, 200 of each, with {} for the keyword.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..checks import check_choice, shown
from ..concept import word_pattern

FOLDER = Path(__file__).with_name("prompts")
SETS = ("contextual", "simple")
"""Full sentences in which the keyword is one thing among others, and short ones about it alone."""

_ARTICLE = r"(?:(?:a|an|the|one)\s+)?"


def prompt_set(name: str, words: str) -> list[str]:
    """The prompts of a set, with these words for the keyword: a subject's ("sks dog"), or its class's ("dog")."""
    text = (FOLDER / f"{check_choice('prompts', name, SETS)}.txt").read_text(encoding="utf-8")
    return [line.replace("{}", words) for line in text.splitlines() if line]


def split_prompt(prompt: str, class_word: str) -> tuple[str, str]:
    """A class-only prompt as the subject's phrase and its context: "a dog in the snow" is "a dog" and "in the snow".

    What stands on both sides of the subject is put together: of "a red dog" the context is "a red". The context is
    empty where the prompt says the subject alone.

    Raises:
        ValueError: if the prompt does not have the class word.
    """
    found = word_pattern(class_word).search(prompt)
    if found is None:
        raise ValueError(f"prompt is {shown(prompt)!r}, but it takes one with the class word {class_word!r}")
    article = re.search(rf"{_ARTICLE}$", prompt[: found.start()], re.IGNORECASE)
    before, after = prompt[: article.start()], prompt[found.end() :]
    context = " ".join(f"{before} {after}".split()).strip(" ,.;:")
    return f"a {class_word}", context


def split_prompts(prompts: Sequence[str], class_word: str) -> tuple[list[str], list[str]]:
    """`split_prompt` of each: subjects, and contexts."""
    parts = [split_prompt(prompt, class_word) for prompt in prompts]
    return [subject for subject, _ in parts], [context for _, context in parts]
