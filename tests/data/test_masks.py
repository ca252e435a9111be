"""Masks of references, by their alpha channel or from files of their own."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from anchor_core.data.pictures import References, from_images, load_references
from tests.data.files import picture


def half_clear(path, size=(20, 20)):
    """Red and opaque on the left, transparent on the right."""
    image = Image.new("RGBA", size, (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (size[0] // 2, 0, *size))
    image.save(path)


def test_alpha_is_laid_over_white_and_taken_as_the_mask(tmp_path):
    half_clear(tmp_path / "1.png")
    references = load_references(tmp_path, 20, masks=True)
    assert references.masks[0].shape == (1, 20, 20)
    assert references.masks[0][0, :, :10].eq(1).all() and references.masks[0][0, :, 10:].eq(0).all()
    assert references.pixels[0][:, 3, 15].tolist() == [1, 1, 1] and references.pixels[0][:, 3, 5].tolist() == [1, 0, 0]
    assert load_references(tmp_path, 20).masks is None


def test_a_mask_file_goes_before_alpha_and_is_no_picture(tmp_path):
    half_clear(tmp_path / "1.png")
    picture(tmp_path / "2.jpg")
    for name in ("1-masklabel.png", "2-masklabel.png"):
        mask = Image.new("L", (20, 20), 0)
        mask.paste(255, (0, 0, 20, 10))
        mask.save(tmp_path / name)
    references = load_references(tmp_path, 20, masks=True)
    assert references.names == ["1.png", "2.jpg"] == load_references(tmp_path, 20).names
    for mask in references.masks:
        assert mask[0, :10].eq(1).all() and mask[0, 10:].eq(0).all()


def test_masks_are_cut_and_resized_like_their_pictures(tmp_path):
    image = Image.new("RGBA", (60, 20), (255, 255, 255, 0))
    image.paste((255, 0, 0, 255), (20, 0, 40, 20))
    image.save(tmp_path / "1.png")
    references = load_references(tmp_path, 10, masks=True)
    assert references.masks[0].eq(1).all() and references.pixels[0][1:].eq(0).all()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda f: (half_clear(f / "1.png"), picture(f / "2.png")),
            r"2\.png has neither .* 2-masklabel\.png, while 1\.",
        ),
        (lambda f: picture(f / "1.png"), r"1\.png has neither an alpha channel nor a 1-masklabel\.png; give"),
        (lambda f: Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(f / "1.png"), r"^mask of 1\.png is empty"),
        (
            lambda f: (picture(f / "1.png"), picture(f / "1-masklabel.png", size=(10, 20))),
            r"1-masklabel\.png is 10x20, but it takes 20x20",
        ),
        (
            lambda f: (picture(f / "1.png"), (f / "1-masklabel.png").write_bytes(b"no")),
            r"1-masklabel\.png cannot be read",
        ),
    ],
)
def test_bad_masks_are_named(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_references(tmp_path, 8, masks=True)
    assert "\n" not in str(caught.value)


def test_masks_of_image_batches():
    images, masks = torch.rand(2, 6, 12, 3), torch.zeros(2, 6, 12)
    masks[:, :, 3:9] = 1
    references = from_images(images, 6, masks)
    assert len(references.masks) == 2 and all(mask.eq(1).all() for mask in references.masks)
    clear = torch.cat([images, masks.unsqueeze(-1)], dim=-1)
    assert torch.equal(from_images(clear, masks=True).masks[1][0], masks[1])
    assert from_images(clear).masks is None
    with pytest.raises(ValueError, match=r"^masks is \(1, 6, 12\), but for these images it takes \(2, 6, 12\)"):
        from_images(images, masks=masks[:1])
    with pytest.raises(ValueError, match="^masks of the alpha channel are asked for, but images has none"):
        from_images(images, masks=True)
    for value, told in ((0, "is empty"), (torch.nan, "has NaN or values out of"), (2, "has NaN or values out of")):
        masks[1] = value
        with pytest.raises(ValueError, match=f"^mask of image 2 {told}"):
            from_images(images, masks=masks)
    with pytest.raises(ValueError, match="^masks has 1 entries, but it takes one for each of 2"):
        References([torch.zeros(3, 4, 4)] * 2, ["a", "b"], [torch.ones(1, 4, 4)])
