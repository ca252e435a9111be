"""Captions beside pictures, templates, and the class prompt of each."""

from __future__ import annotations

import pytest

from anchor_core.data.captions import check_captions, prompt_pairs
from anchor_core.data.pictures import load_references
from tests.data.files import picture


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"1\.txt is empty"),
        (" \n", r"1\.txt is empty"),
        (b"\xff\xfe\xff", r"1\.txt cannot be read \(it is not UTF-8\)"),
        (None, r"1\.png has no caption; write one into 1\.txt"),
    ],
)
def test_bad_caption_files_are_named(tmp_path, text, message):
    picture(tmp_path / "1.png")
    if text is not None:
        (tmp_path / "1.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_references(tmp_path, 8, captions=True)
    assert load_references(tmp_path, 8).captions is None


def test_captions_beside_their_pictures(tmp_path, concept):
    for name, text in (("10", "a sks dog\nin snow "), ("2", "\ufeffsks dog")):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    references = load_references(tmp_path, 8, captions=True)
    assert references.captions == ["sks dog", "a sks dog in snow"]
    pairs = prompt_pairs(concept, references.names, references.captions)
    assert pairs == [[("sks dog", "dog")], [("a sks dog in snow", "a dog in snow")]]


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a dog", "^caption of b is 'a dog', which does not name the subject; write 'sks dog'"),
        ("two sks dogs", "^caption of b is 'two sks dogs', which does not name the subject"),
        ("a sks dog, sks", "^caption of b is 'a sks dog, sks', but it takes 'sks' only as a part of 'sks dog'"),
    ],
)
def test_captions_that_do_not_name_the_subject(concept, caption, message):
    with pytest.raises(ValueError, match=message):
        prompt_pairs(concept, ["a", "b"], ["a sks dog", caption])


def test_templates_and_plain_prompts(concept):
    assert prompt_pairs(concept, ["a", "b"]) == [[("a photo of a sks dog", "a photo of a dog")]] * 2
    pairs = prompt_pairs(concept, ["a"], templates=["{} in snow", "a {}"])
    assert pairs == [[("sks dog in snow", "dog in snow"), ("a sks dog", "a dog")]]
    with pytest.raises(ValueError, match="^template is 'a dog'"):
        prompt_pairs(concept, ["a"], templates=["a dog"])
    with pytest.raises(ValueError, match="^templates are given, but the pictures have captions"):
        prompt_pairs(concept, ["a"], ["sks dog"], templates=["a {}"])


def test_shuffled_captions_keep_their_pairs(concept):
    caption = "sks dog, snow, red hat, night, old"
    (pairs,) = prompt_pairs(concept, ["a"], [caption], shuffle=True)
    assert pairs[0] == (caption, caption.replace("sks ", "")) and len(set(pairs)) == 8
    for subject, class_ in pairs:
        assert sorted(subject.split(", ")) == sorted(caption.split(", ")) and class_ == subject.replace("sks ", "")
    assert prompt_pairs(concept, ["z"], [caption], shuffle=True) == [pairs]
    assert prompt_pairs(concept, ["a"], [caption], shuffle=True, seed=1) != [pairs]
    assert len(prompt_pairs(concept, ["a"], ["sks dog, a, b"], shuffle=True)[0]) == 6
    assert len(prompt_pairs(concept, ["a"], ["sks dog, a, a, a"], shuffle=True)[0]) == 4
    assert prompt_pairs(concept, ["a"], shuffle=True) == [[("a photo of a sks dog", "a photo of a dog")]]


def test_long_captions_are_named(eps_denoiser):
    def count(text: str) -> int:
        return len(eps_denoiser.tokenizer(text).input_ids)

    check_captions({"a.txt": "dog " * 75}, count, 77)
    with pytest.raises(ValueError, match=r"^caption of b\.txt has 78 tokens, but the text encoder takes 77"):
        check_captions({"a.txt": "dog", "b.txt": "dog " * 76}, count, 77)
