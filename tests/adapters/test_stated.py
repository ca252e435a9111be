"""Which prompts are taken for a file's own."""

from __future__ import annotations

import json

import pytest

from anchor_core.adapters.stated import ESTIMATED, GIVEN, STATED, UNKNOWN, prompts_of

OURS = {"anchor.subject_prompt": "a photo of a sks dog", "anchor.class_prompt": "a photo of a dog"}
KOHYA = {"ss_tag_frequency": json.dumps({"10_ohwx cat": {"sitting": 3, "ohwx cat": 9}})}
DATASETS = {"ss_datasets": json.dumps([{"subsets": [{"class_tokens": None}, {"class_tokens": "zwx toy car"}]}])}
DIRS = {"ss_dataset_dirs": json.dumps({"img": {}, "5_sks_stuffed animal": {"n_repeats": 5}})}
PHRASE = {"modelspec.trigger_phrase": "zxc, another"}


@pytest.mark.parametrize(
    ("metadata", "subject", "class_prompt", "how"),
    [
        (OURS, "a photo of a sks dog", "a photo of a dog", STATED),
        (OURS | KOHYA, "a photo of a sks dog", "a photo of a dog", STATED),
        (KOHYA, "a photo of a ohwx cat", "a photo of a cat", ESTIMATED),
        (DATASETS, "a photo of a zwx toy car", "a photo of a toy car", ESTIMATED),
        (DIRS, "a photo of a sks stuffed animal", "a photo of a stuffed animal", ESTIMATED),
    ],
)
def test_what_a_file_tells(metadata, subject, class_prompt, how):
    found = prompts_of(metadata)
    assert (found.subject, found.class_prompt) == (subject, class_prompt)
    assert found.subject_from == found.class_from == how


def test_what_is_given_comes_first():
    found = prompts_of(KOHYA, "ohwx, portrait", "a cat")
    assert (found.subject, found.class_prompt, found.subject_from, found.class_from) == (
        "ohwx, portrait", "a cat", GIVEN, GIVEN,
    )  # fmt: skip
    found = prompts_of(PHRASE, "", "a house")
    assert (found.subject, found.subject_from, found.class_from) == ("a photo of a zxc", ESTIMATED, GIVEN)


def test_without_a_trigger_word_there_is_no_subject():
    found = prompts_of({}, "", "a house")
    assert (found.subject, found.subject_from) == ("", UNKNOWN)


def test_without_a_class_it_is_asked_for():
    for metadata in ({}, PHRASE, {"ss_tag_frequency": json.dumps({"10_ohwx": {"a": 1}})}):
        with pytest.raises(ValueError, match="^class_prompt is empty"):
            prompts_of(metadata)
    with pytest.raises(ValueError, match="^class_prompt is 'A Dog', the same as subject_prompt"):
        prompts_of({}, "a dog", "A Dog")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1, 2]",
        "null",
        '{"x": 1}',
        '"10_sks dog"',
        "[" * 5000,
        '[{"subsets": {"a": 1}}]',
        '[{"subsets": [7]}]',
        " " * 5_000_000,
    ],
)
def test_metadata_that_cannot_be_read_tells_nothing(text):
    metadata = dict.fromkeys(("ss_tag_frequency", "ss_dataset_dirs", "ss_datasets"), text)
    assert prompts_of(metadata, "", "a dog").subject == ""


def test_what_is_guessed_is_fit_to_be_shown():
    hostile = {"ss_tag_frequency": json.dumps({f"3_\x1b[2J\u202e{'x' * 5000} dog": {}})}
    found = prompts_of(hostile, "", "a dog")
    assert found.subject.isprintable() and len(found.subject) < 200
