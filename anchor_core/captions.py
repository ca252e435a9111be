"""What is said of the pictures: the two prompts of the concept, captions, and their variants."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, takewhile
from pathlib import Path

ORDERS = 8
"""How many orders of its tags a shuffled caption is seen in, so that the set of prompts stays finite."""

# Where the words of a class end: "a sks stuffed animal in the snow" is of the class "stuffed animal".
_FUNCTION_WORDS = frozenset(
    "a an the this that my your his her its our their of in on at by to from for with and or is are near over".split()
)
_WORD = re.compile(r"[^\s,.;:!?()\"]+|[,.;:!?()\"]")


@dataclass(frozen=True)
class Concept:
    """The subject prompt ("a photo of a sks dog") and the class prompt ("a photo of a dog").

    The two phrases are what captions are translated by: where a caption says `subject_phrase` ("sks dog"), its class
    caption says `class_phrase` ("dog"). Without them they are what the prompts differ in, with the class word.

    Raises:
        ValueError: if a prompt is empty or no text; if both are the same, as the anchor would then hold the subject
            prompt to what it meant before, and nothing could be learnt; if the subject prompt has no word of its own;
            if the class prompt lacks the class word.
    """

    subject_prompt: str
    class_prompt: str
    subject_phrase: str = ""
    class_phrase: str = ""

    def __post_init__(self):
        for name in ("subject_prompt", "class_prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} is {value!r}, but it takes a text that is not empty")
            object.__setattr__(self, name, " ".join(value.split()))
        if self.subject_prompt.casefold() == self.class_prompt.casefold():
            raise ValueError(
                f"class_prompt is {self.class_prompt!r}, the same as subject_prompt; "
                "put a rare word such as sks into the subject prompt only"
            )
        if not self.subject_phrase and not self.class_phrase:
            subject, class_ = _phrases(self.subject_prompt, self.class_prompt)
            object.__setattr__(self, "subject_phrase", subject)
            object.__setattr__(self, "class_phrase", class_)
        for name in ("subject", "class"):
            prompt, phrase = getattr(self, f"{name}_prompt"), getattr(self, f"{name}_phrase")
            if not phrase or not word_pattern(phrase).search(prompt):
                raise ValueError(f"{name}_prompt is {prompt!r}, but it takes a text with the words {phrase!r}")

    @classmethod
    def from_words(cls, token: str, class_word: str, template: str = "a photo of a {}") -> Concept:
        """The concept of a rare word, a class, and a template with one {} for them.

        Raises:
            ValueError: naming what is empty, or a template without exactly one {}.
        """
        for name, value in (("token", token), ("class_word", class_word)):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} is {value!r}, but it takes a word or two, such as sks and dog")
        _check_template(template)
        class_ = " ".join(class_word.split())
        subject = f"{' '.join(token.split())} {class_}"
        return cls(template.replace("{}", subject), template.replace("{}", class_), subject, class_)

    def class_of(self, caption: str, name: str = "caption") -> str:
        """The class caption: `caption` with the subject's words replaced by those of the class.

        Args:
            name: what the caption is called in errors, such as its file.

        Raises:
            ValueError: if the caption does not name the subject by `subject_phrase`, or has its token elsewhere too.
        """
        class_caption, count = word_pattern(self.subject_phrase).subn(lambda _: self.class_phrase, caption)
        if not count:
            raise ValueError(
                f"{name} is {caption!r}, which does not name the subject; write {self.subject_phrase!r} where it does"
            )
        words = list(_WORD.finditer(self.subject_phrase))
        start, end, _ = _difference(words, list(_WORD.finditer(self.class_phrase)))
        token = " ".join(word[0] for word in words[start:end])
        if word_pattern(token).search(class_caption):
            raise ValueError(f"{name} is {caption!r}, but it takes {token!r} only as a part of {self.subject_phrase!r}")
        return class_caption


def word_pattern(phrase: str) -> re.Pattern[str]:
    """The words of a phrase, whole, in any case."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def _difference(subject: list[re.Match[str]], class_: list[re.Match[str]]) -> tuple[int, int, int]:
    """Where two lists of words differ: subject[start:end] against class_[start:class_end]."""

    def same(ours: Iterable[re.Match[str]], theirs: Iterable[re.Match[str]]) -> int:
        return len(list(takewhile(lambda pair: pair[0][0].casefold() == pair[1][0].casefold(), zip(ours, theirs))))

    start = same(subject, class_)
    tail = same(reversed(subject[start:]), reversed(class_[start:]))
    return start, len(subject) - tail, len(class_) - tail


def _phrases(subject: str, class_: str) -> tuple[str, str]:
    """What two prompts differ in, widened to the class word where that stands in both: ("sks dog", "dog")."""
    ours, theirs = list(_WORD.finditer(subject)), list(_WORD.finditer(class_))
    start, end, class_end = _difference(ours, theirs)
    if start == end:
        raise ValueError(f"subject_prompt is {subject!r}, but it takes a rare word that class_prompt {class_!r} lacks")
    if not any(map(_is_content, theirs[start:class_end])):
        after = len(list(takewhile(_is_content, ours[end:])))
        before = 0 if after else len(list(takewhile(_is_content, reversed(ours[:start]))))
        if not after and not before:
            raise ValueError(f"class_prompt is {class_!r}, but it takes the class word too, such as a photo of a dog")
        start, end, class_end = start - before, end + after, class_end + after
    return subject[ours[start].start() : ours[end - 1].end()], class_[
        theirs[start].start() : theirs[class_end - 1].end()
    ]


def _is_content(word: re.Match[str]) -> bool:
    return word[0].casefold() not in _FUNCTION_WORDS and any(letter.isalnum() for letter in word[0])


def _check_template(template: str) -> None:
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(f"template is {template!r}, but it takes a text with one {{}} for the subject's words")


def read_caption(picture: Path) -> str:
    """The text of the .txt file beside a picture, on one line; ValueError, naming it, if there is none."""
    file = picture.with_suffix(".txt")
    try:
        text = " ".join(file.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError as error:
        raise ValueError(f"picture {picture} has no caption; write one into {file.name} beside it") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"caption {file} cannot be read ({reason}); write it again as UTF-8 text") from error
    if not text:
        raise ValueError(f"caption {file} is empty; write what the picture shows, with the subject's words")
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
    captions: Sequence[str] | None = None,
    templates: Sequence[str] = (),
    shuffle: bool = False,
    seed: int = 0,
) -> list[list[tuple[str, str]]]:
    """What may be said of each picture: its subject prompts, each with its class prompt.

    They are the picture's own caption, or the templates with the subject's words for {}, or the concept's own prompts.
    With `shuffle` each comes in up to 8 seeded orders of its comma-separated tags, of which the written one is first.

    Raises:
        ValueError: for a caption that does not name the subject (naming its picture), or captions and templates both.
    """
    if captions is not None and templates:
        raise ValueError("templates are given, but the pictures have captions of their own; take one of the two")
    for template in templates:
        _check_template(template)
    told: list[list[str]]
    if captions is not None:
        told = [[caption] for caption in captions]
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
    if math.factorial(len(tags)) <= ORDERS:
        return list(orders | {", ".join(order): None for order in permutations(tags)})
    chance = random.Random(f"{seed}:{caption}")
    for _ in range(20 * ORDERS):  # repeated tags have fewer orders than it seems
        if len(orders) == ORDERS:
            break
        orders[", ".join(chance.sample(tags, len(tags)))] = None
    return list(orders)
