"""Which prompts a stranger's file was trained with: what it states, what its tags let one guess, or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import shown
from ..concept import plain_text
from .metadata import stated_prompt

GIVEN, STATED, ESTIMATED, UNKNOWN = "given", "stated by the file", "estimated from the file", "unknown"
"""How a prompt is known: by the user; as our files state it; from kohya's folders or a trigger phrase; not at all."""

_LENGTH = 4_000_000
_WORDS = 120
_FOLDER = re.compile(r"\d+_(.+)")
"""kohya's folders of pictures: `<repeats>_<trigger word> <class>`."""


@dataclass(frozen=True)
class Prompts:
    """The two prompts to measure a file with, and how each is known (of `GIVEN` ... `UNKNOWN`).

    Attributes:
        subject: with the trigger word; empty where nothing tells it.
        class_prompt: without it.
    """

    subject: str
    subject_from: str
    class_prompt: str
    class_from: str


def prompts_of(metadata: Mapping[str, str], subject: str = "", class_prompt: str = "") -> Prompts:
    """Those given, else those that the file states, else a guess.

    Guessed from kohya's `ss_tag_frequency`, `ss_dataset_dirs` and `ss_datasets`, whose folders and class tokens are
    `sks dog`, a trigger word and a class; else from `modelspec.trigger_phrase`. Metadata that cannot be read tells
    nothing.

    Raises:
        ValueError: if nothing tells the class prompt, or both prompts are the same.
    """
    word, class_word = next(_phrases(metadata), ("", ""))
    guessed = word if len(word.split()) > 2 else f"a photo of a {word} {class_word}".strip() if word else ""
    guessed_class = f"a photo of a {class_word}" if class_word else ""
    subject, subject_from = _first(subject, stated_prompt(metadata, "subject"), guessed)
    class_prompt, class_from = _first(class_prompt, stated_prompt(metadata, "class"), guessed_class)
    if not class_prompt:
        raise ValueError(
            "class_prompt is empty and the file does not tell it; give what the subject is an instance of, such as "
            "a photo of a dog, or for a style a photo of a house"
        )
    if subject.casefold() == class_prompt.casefold() and GIVEN not in (subject_from, class_from):
        subject, subject_from = "", UNKNOWN
    elif subject.casefold() == class_prompt.casefold():
        raise ValueError(
            f"class_prompt is {class_prompt!r}, the same as subject_prompt; leave out the word that calls the LoRA"
        )
    return Prompts(subject, subject_from, class_prompt, class_from)


def _first(given: str, stated: str | None, guessed: str) -> tuple[str, str]:
    for prompt, how in ((given, GIVEN), (stated, STATED), (guessed, ESTIMATED)):
        if prompt and prompt.strip():
            return plain_text(prompt), how
    return "", UNKNOWN


def _phrases(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(trigger word, class) that the file's tags let one guess, the likeliest first; the class may be empty."""
    for name in ("ss_tag_frequency", "ss_dataset_dirs"):
        folders = _read(metadata, name)
        for folder in folders if isinstance(folders, dict) else ():
            match = _FOLDER.fullmatch(folder)
            yield from _split(match[1] if match else "")
    datasets = _read(metadata, "ss_datasets")
    for dataset in datasets if isinstance(datasets, list) else ():
        for subset in _list(dataset, "subsets"):
            tokens = subset.get("class_tokens") if isinstance(subset, dict) else None
            yield from _split(tokens if isinstance(tokens, str) else "")
    phrase = metadata.get("modelspec.trigger_phrase", "")
    if isinstance(phrase, str):
        words = shown(phrase, _WORDS).split(",")[0].strip()
        if words:
            yield words, ""


def _list(held: Any, name: str) -> list[Any]:
    found = held.get(name) if isinstance(held, dict) else None
    return found if isinstance(found, list) else []


def _read(metadata: Mapping[str, str], name: str) -> Any:
    text = metadata.get(name)
    if not isinstance(text, str) or len(text) > _LENGTH:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _split(phrase: str) -> Iterator[tuple[str, str]]:
    word, _, class_word = " ".join(shown(phrase, _WORDS).replace("_", " ").split()).partition(" ")
    if word:
        yield word, class_word
