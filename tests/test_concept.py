"""A subject's prompt and its class's: what they differ in, and which pairs make no sense."""

from __future__ import annotations

import pytest

from anchor_core.concept import Concept


def test_concept_tidies_its_prompts():
    concept = Concept("  a photo of  a sks dog ", "a photo of a dog")
    assert concept.subject_prompt == "a photo of a sks dog"


@pytest.mark.parametrize(
    ("subject", "class_", "message"),
    [
        ("", "a dog", "^subject_prompt is ''"),
        ("a sks dog", "", "^class_prompt is ''"),
        ("a sks dog", "   ", "^class_prompt is '   '"),
        (None, "a dog", "^subject_prompt is None"),
        ("a sks dog", 3, "^class_prompt is 3"),
        ("a dog", "a dog", "^class_prompt is 'a dog', the same as subject_prompt"),
        ("A dog", "a  dog ", "^class_prompt is 'a dog', the same as subject_prompt"),
    ],
)
def test_bad_concepts_are_named(subject, class_, message):
    with pytest.raises(ValueError, match=message) as caught:
        Concept(subject, class_)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("subject", "class_", "phrases"),
    [
        ("a photo of a sks dog", "a photo of a dog", ("sks dog", "dog")),
        ("a photo of sks", "a photo of a dog", ("sks", "a dog")),
        ("a sks stuffed animal in the snow", "a stuffed animal in the snow", ("sks stuffed animal", "stuffed animal")),
        ("a photo of a dog sks", "a photo of a dog", ("dog sks", "dog")),
        ("sks dog, best quality", "Dog, best quality", ("sks dog", "Dog")),
        ("photo of <new1> cat", "photo of cat", ("<new1> cat", "cat")),
        ("a photo of a corgi", "a photo of a dog", ("corgi", "dog")),
    ],
)
def test_phrases_are_what_the_prompts_differ_in(subject, class_, phrases):
    concept = Concept(subject, class_)
    assert (concept.subject_phrase, concept.class_phrase) == phrases
    assert concept.class_of(subject) == class_


def test_concept_from_words():
    concept = Concept.from_words(" sks ", "stuffed  animal", "a {} in the snow")
    assert concept.subject_prompt == "a sks stuffed animal in the snow"
    assert concept.class_prompt == "a stuffed animal in the snow"
    assert concept.class_of("A Sks  stuffed animal's hat") == "A stuffed animal's hat"
    for words, message in [
        (("", "dog"), "^token is ''"),
        (("sks", " "), "^class_word is ' '"),
        (("sks", "dog", "a photo"), "^template is 'a photo', but it takes a text with one {}"),
        (("sks", "dog", "{} {}"), "^template is "),
    ]:
        with pytest.raises(ValueError, match=message):
            Concept.from_words(*words)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("a photo of a sks dog", "a photo of a"), "^class_prompt is 'a photo of a', but it takes the class word too"),
        (("a sks dog in the snow", "a in the snow"), "^class_prompt is 'a in the snow', but it takes the class word"),
        (("a dog", "a sks dog"), "^subject_prompt is 'a dog', but it takes a rare word that class_prompt"),
        (("a sks dog", "an animal", "sks dog", "dog"), "^class_prompt is 'an animal', but it takes .* 'dog'"),
        (("a xyz dog", "a dog", "sks dog", "dog"), "^subject_prompt is 'a xyz dog', but it takes .* 'sks dog'"),
    ],
)
def test_prompts_without_their_words_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Concept(*values)
