"""The concept that is taught: a subject prompt with a rare word, and the class prompt that anchors it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from .checks import shown

# Where the words of a class end: "a sks stuffed animal in the snow" is of the class "stuffed animal".
_FUNCTION_WORDS = frozenset(
    "a an the this that my your his her its our their of in on at by to from for with and or is are near over".split()
)


MAX_PROMPT = 2**16

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
            if not isinstance(value, str) or not plain_text(value):
                raise ValueError(f"{name} is {value!r}, but it takes a text that is not empty")
            if len(value) > MAX_PROMPT:
                raise ValueError(f"{name} has {len(value)} characters, but it takes {MAX_PROMPT} at most; shorten it")
            object.__setattr__(self, name, plain_text(value))
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
        check_template(template)
        class_ = plain_text(class_word)
        subject = f"{plain_text(token)} {class_}"
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
                f"{name} is {shown(caption)!r}, which does not name the subject; "
                f"write {self.subject_phrase!r} where it does"
            )
        words = list(_WORD.finditer(self.subject_phrase))
        start, end, _ = _difference(words, list(_WORD.finditer(self.class_phrase)))
        token = " ".join(word[0] for word in words[start:end])
        if word_pattern(token).search(class_caption):
            raise ValueError(
                f"{name} is {shown(caption)!r}, but it takes {token!r} only as a part of {self.subject_phrase!r}"
            )
        return class_caption


def plain_text(text: str) -> str:
    """A prompt or caption as both backends read it: on one line, without control characters, parentheses as letters.

    Training captions are plain text, as in other trainers: `(word:1.5)` is no weight. Taggers and ComfyUI write a
    parenthesis as `\\(`, which is the same text here as there.
    """
    words = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text).split()
    return " ".join(words).replace("\\(", "(").replace("\\)", ")")


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


def check_template(template: str) -> None:
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(f"template is {template!r}, but it takes a text with one {{}} for the subject's words")
