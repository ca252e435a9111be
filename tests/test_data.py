from __future__ import annotations

import pytest
import torch
from PIL import Image

from anchor_core.data import Concept, References, from_images, load_references, sample_class_latents


def picture(path, color="red", size=(20, 20), **options):
    Image.new("RGB", size, color).save(path, **options)


def color_of(pixels: torch.Tensor) -> list[int]:
    return (pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2] * 255).round().int().tolist()


def test_natural_order_and_suffixes(tmp_path):
    for name in ("10.png", "2.png", "a.JPG", "1.webp", "b3.bmp"):
        picture(tmp_path / name)
    (tmp_path / "caption.txt").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    references = load_references(tmp_path, 8)
    assert references.names == ["1.webp", "2.png", "10.png", "a.JPG", "b3.bmp"]
    assert len(references) == 5 and references.stack().shape == (5, 3, 8, 8)
    assert references.stack().dtype == torch.float32


def test_centre_crop_and_resize(tmp_path):
    wide = Image.new("RGB", (60, 20), "blue")
    wide.paste("red", (20, 0, 40, 20))
    wide.save(tmp_path / "wide.png")
    (pixels,) = load_references(tmp_path, 10).pixels
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    assert torch.equal(pixels, red.expand(3, 10, 10))


def test_exif_orientation(tmp_path):
    stored = Image.new("RGB", (16, 16), "blue")
    stored.paste("red", (0, 0, 16, 8))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    stored.save(tmp_path / "turned.png", exif=exif)
    (pixels,) = load_references(tmp_path, 16).pixels
    assert pixels[:, 2, 8].tolist() == [0, 0, 1] and pixels[:, 13, 8].tolist() == [1, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    if mode == "P":
        clear = Image.new("P", (8, 8), 0)
        clear.putpalette([0, 0, 0] * 256)
        clear.save(tmp_path / "clear.png", transparency=0)
    else:
        clear.convert(mode).save(tmp_path / "clear.png")
    (pixels,) = load_references(tmp_path, 8).pixels
    assert color_of(pixels) == [255, 255, 255]


def test_grey_becomes_rgb(tmp_path):
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    assert color_of(load_references(tmp_path, 8).pixels[0]) == [51, 51, 51]


def test_unreadable_pictures_are_named_in_one_line(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"2\.png cannot be read") as caught:
        load_references(tmp_path, 8)
    assert "\n" not in str(caught.value)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"2\.png cannot be read"):
        load_references(tmp_path, 8)


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        load_references(tmp_path, 8)
    with pytest.raises(ValueError, match="is no folder"):
        load_references(tmp_path / "missing", 8)
    with pytest.raises(ValueError, match="^size is 0"):
        load_references(tmp_path, 0)
    with pytest.raises(ValueError, match="holds no picture"):
        References([], [])
    with pytest.raises(ValueError, match="holds no picture"):
        from_images(torch.zeros(0, 8, 8, 3))


def test_from_images(tmp_path):
    images = torch.zeros(2, 6, 12, 4)
    images[0, :, 3:9, 0] = 1  # red, inside the centre square
    images[0, ..., 3] = 1
    references = from_images(images, size=4)
    assert references.stack().shape == (2, 3, 4, 4)
    torch.testing.assert_close(references.pixels[0], torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 4, 4))
    torch.testing.assert_close(references.pixels[1], torch.ones(3, 4, 4))
    kept = torch.rand(1, 6, 12, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(from_images(kept).pixels[0], kept[0].movedim(-1, 0))
    with pytest.raises(ValueError, match="^images is"):
        from_images(torch.zeros(3, 8, 8))


def test_references_check_what_they_hold():
    with pytest.raises(ValueError, match="reference a is"):
        References([torch.zeros(1, 4, 4)], ["a"])
    with pytest.raises(ValueError, match="reference b holds NaN"):
        References([torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.nan)], ["a", "b"])
    with pytest.raises(ValueError, match="one size is needed"):
        References([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)], ["a", "b"]).stack()


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


def test_class_latents_are_the_pretrained_networks(eps_denoiser, concept, stir):
    from anchor_core.adapter import AdapterConfig

    options = {"seed": 4, "steps": 2, "batch_size": 2}
    untouched = sample_class_latents(eps_denoiser, concept, 3, (4, 8, 8), **options)
    assert untouched.shape == (3, 4, 8, 8)
    stir(eps_denoiser.attach(AdapterConfig(rank=2)))
    assert torch.equal(sample_class_latents(eps_denoiser, concept, 3, (4, 8, 8), **options), untouched)
    other = sample_class_latents(eps_denoiser, concept, 3, (4, 8, 8), **{**options, "seed": 5})
    assert not torch.equal(other, untouched)
