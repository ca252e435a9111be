"""Pictures that were picked one by one: their list, captions and masks."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from PIL import Image

from anchor_core.concept import Concept
from anchor_core.data.captions import prompt_pairs
from anchor_core.data.picked import Picked, PickedFile, load_picked, parse
from tests.data.files import picture

HASH = "0" * 63 + "f"


def painted(path, box, size=(20, 20)):
    """As ComfyUI's mask editor saves it: what was painted is transparent."""
    image = Image.new("RGBA", size, (1, 2, 3, 255))
    image.paste((1, 2, 3, 0), box)
    image.save(path)


def of(*names: str, **more) -> list[Picked]:
    return [Picked(PickedFile(name), **more) for name in names]


def test_a_list_is_read():
    text = json.dumps(
        [
            {"name": "a/dog.png"},
            {"sha256": HASH, "bytes": 7, "caption": "a sks dog", "mask": {"name": "m.png"}, "invert_mask": True},
            {"name": "b.png", "sha256": None, "caption": None, "mask": None},
        ]
    )
    assert parse(text) == [
        Picked(PickedFile("a/dog.png")),
        Picked(PickedFile("", HASH, 7), "a sks dog", PickedFile("m.png"), True),
        Picked(PickedFile("b.png")),
    ]
    assert parse("") == parse(" \n") == parse("[]") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog.png", r"^pictures is 'dog\.png', which is no JSON; give a list such as \["),
        ('{"name": "dog.png"}', r"^pictures is .*, but it takes a list such as"),
        ('[{"name": "a.png"}, "b.png"]', r"^pictures entry 2 is 'b\.png', but it takes an object"),
        ('[{"file": "a.png"}]', r"^pictures entry 1 has 'file', but it takes name, sha256, bytes, caption"),
        ('[{"caption": "x"}]', r"^pictures entry 1 names no file; give its name"),
        ('[{"name": 1}]', r"^pictures entry 1: name is '1', but it takes a str"),
        ('[{"name": "a", "bytes": true}]', r"^pictures entry 1: bytes is 'True', but it takes a int"),
        ('[{"sha256": "../x"}]', r"^pictures entry 1: sha256 is '\.\./x', but it takes 64 of"),
        ('[{"name": "a", "mask": "m.png"}]', r"^pictures entry 1: mask is 'm\.png', but it takes a dict"),
        ('[{"name": "a", "mask": {}}]', r"^pictures entry 1: mask names no file"),
        (json.dumps([{"name": "a", "caption": "x" * 20_000}]), r"^pictures entry 1: caption has more than 16384 bytes"),
        ("[" * 100_000, r"^pictures is '\[\[.* which is no JSON"),
    ],
)
def test_what_is_no_list_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_order_names_and_sizes_are_those_of_the_list(tmp_path):
    picture(tmp_path / "1.png", "red", (40, 20))
    picture(tmp_path / "2.png", "blue", (20, 40))
    files = [(tmp_path / "2.png", None), (tmp_path / "1.png", None)]
    references = load_picked(of("b/two.png", "one.png"), files, [(32, 64), (64, 32)])
    assert references.names == ["b/two.png", "one.png"]
    assert [tuple(pixels.shape) for pixels in references.pixels] == [(3, 64, 32), (3, 32, 64)]
    assert references.masks is None and references.captions is None
    with pytest.raises(ValueError, match="^pictures is empty; put 3 to 20"):
        load_picked([], [], 20)


@pytest.mark.parametrize("inverted", [False, True])
def test_what_is_painted_counts_and_a_picture_without_a_mask_counts_whole(tmp_path, inverted):
    for name in ("1.png", "2.png"):
        picture(tmp_path / name)
    painted(tmp_path / "mask.png", (0, 0, 20, 5))
    files = [(tmp_path / "1.png", tmp_path / "mask.png"), (tmp_path / "2.png", None)]
    first, second = load_picked(of("1.png", "2.png", invert_mask=inverted), files, 20).masks
    expected = torch.zeros(1, 20, 20)
    expected[:, :5] = 1
    assert torch.equal(first, 1 - expected if inverted else expected) and second.eq(1).all()


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_mask_without_transparency_is_white_where_it_counts(tmp_path, mode):
    picture(tmp_path / "1.png")
    mask = Image.new("L", (20, 20), 0)
    mask.paste(255, (0, 0, 10, 20))
    mask.convert(mode).save(tmp_path / "mask.png")
    (own,) = load_picked(of("1.png"), [(tmp_path / "1.png", tmp_path / "mask.png")], 20).masks
    assert own[0, :, :10].eq(1).all() and own[0, :, 10:].eq(0).all()


def test_transparency_of_the_picture_counts_where_masks_are_asked_for(tmp_path):
    painted(tmp_path / "1.png", (0, 0, 20, 5))
    picture(tmp_path / "2.png")
    files = [(tmp_path / name, None) for name in ("1.png", "2.png")]
    assert load_picked(of("1.png", "2.png"), files, 20).masks is None
    first, second = load_picked(of("1.png", "2.png"), files, 20, masks=True).masks
    assert first[:, :5].eq(0).all() and first[:, 5:].eq(1).all() and second.eq(1).all()


def test_errors_name_the_picture(tmp_path):
    picture(tmp_path / "1.png")
    Image.new("L", (20, 20), 0).save(tmp_path / "none.png")
    painted(tmp_path / "small.png", (0, 0, 5, 5), (10, 10))
    picture(tmp_path / "long.png", size=(90, 20))
    for files, message in (
        ((tmp_path / "1.png", tmp_path / "none.png"), "^mask of dog.png is empty"),
        ((tmp_path / "1.png", tmp_path / "small.png"), "small.png is 10x10, but it takes 20x20, the size of 1.png"),
        ((tmp_path / "long.png", None), "long.png is 90x20, of aspect ratio 4.5:1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_picked(of("dog.png"), [files], 20)


def test_a_picture_without_a_caption_has_the_prompt_of_the_concept(tmp_path):
    picture(tmp_path / "1.png")
    files = [(tmp_path / "1.png", None)] * 2
    both = [*of("1.png"), *of("1.png", caption="a sks dog,\n asleep")]
    references = load_picked(both, files, 20)
    assert references.captions == [None, "a sks dog, asleep"]
    pairs = prompt_pairs(Concept.from_words("sks", "dog"), references.names, references.captions)
    assert pairs == [[("a photo of a sks dog", "a photo of a dog")], [("a sks dog, asleep", "a dog, asleep")]]


def test_a_picture_that_is_picked_twice_is_named(tmp_path, caplog):
    picture(tmp_path / "1.png")
    with caplog.at_level(logging.WARNING):
        load_picked(of("1.png", "again.png"), [(tmp_path / "1.png", None)] * 2, 20)
    assert caplog.messages == ["picked twice, and so learnt twice as often: again.png"]
