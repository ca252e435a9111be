"""References from a folder or a batch: order, colours, cuts, sizes and buckets."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from anchor_core.data.pictures import References, bucket_sizes, from_images, load_references
from tests.data.files import picture


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
    for odd, told in (
        (torch.full((1, 8, 8, 3), torch.inf), "class_images holds NaN or infinite"),  # not white
        (torch.full((1, 8, 8, 4), torch.nan), "class_images holds NaN or infinite"),
        (torch.zeros(0, 8, 8, 3), "class_images holds no picture"),
        (torch.zeros(1, 8, 8, 2), "class_images is"),
    ):
        with pytest.raises(ValueError, match=f"^{told}"):
            from_images(odd, name="class_images")


def test_references_check_what_they_hold():
    with pytest.raises(ValueError, match="reference a is"):
        References([torch.zeros(1, 4, 4)], ["a"])
    with pytest.raises(ValueError, match="reference b holds NaN"):
        References([torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.nan)], ["a", "b"])
    with pytest.raises(ValueError, match="one size is needed"):
        References([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)], ["a", "b"]).stack()


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (1024, 64), (64, 16)])
def test_bucket_sizes(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes and (resolution * 2, resolution // 2) in sizes
    assert len(set(sizes)) == len(sizes) and {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert resolution**2 - max(height, width) * multiple < height * width <= resolution**2
        assert max(height, width) <= 4 * min(height, width)


def test_bucket_sizes_are_those_of_sd_scripts():
    assert {(768, 320), (640, 384), (576, 448), (512, 512), (448, 576), (384, 640)} < set(bucket_sizes(512, 64))
    with pytest.raises(ValueError, match="^resolution is 500, but aspect buckets take a multiple of 64"):
        bucket_sizes(500, 64)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((1000, 1000), (64, 64)), ((900, 600), (48, 80)), ((30, 40), (80, 48)), ((400, 100), (32, 128))],
)
def test_pictures_take_the_nearest_bucket(tmp_path, size, bucket):
    picture(tmp_path / "1.png", size=size)
    (pixels,) = load_references(tmp_path, bucket_sizes(64, 16)).pixels
    assert pixels.shape[1:] == bucket
    images = torch.zeros(1, size[1], size[0], 3)
    assert from_images(images, bucket_sizes(64, 16)).pixels[0].shape[1:] == bucket


def test_of_buckets_as_near_the_larger_is_taken(tmp_path):
    picture(tmp_path / "1.png", size=(20, 20))
    for sizes in ([(8, 8), (16, 16)], [(16, 16), (8, 8)]):
        assert load_references(tmp_path, sizes).pixels[0].shape == (3, 16, 16)


def test_a_bucket_covers_and_keeps_the_aspect_ratio(tmp_path):
    # A square of 20 in a picture of 100 x 60: at 64 x 32 the cut is 100 x 50 and the scale 0.64.
    image = Image.new("RGB", (100, 60), "blue")
    image.paste("red", (40, 20, 60, 40))
    image.save(tmp_path / "1.png")
    (pixels,) = load_references(tmp_path, [(32, 64)]).pixels
    red = (pixels[0] > 0.5).nonzero()
    extent = (red.max(0).values - red.min(0).values + 1).tolist()
    assert pixels.shape == (3, 32, 64) and all(abs(edge - 12.8) <= 1 for edge in extent)


def test_smaller_pictures_are_enlarged_and_told(tmp_path, caplog):
    picture(tmp_path / "1.png", size=(20, 20))
    load_references(tmp_path, 20)
    assert not caplog.records
    load_references(tmp_path, 24)
    assert "1.png is 20x20, and is enlarged to 24x24" in caplog.text


@pytest.mark.parametrize("size", [8, [(8, 8), (4, 16)]])
def test_long_pictures_are_named(tmp_path, size):
    picture(tmp_path / "1.png", size=(20, 80))
    load_references(tmp_path, size)
    picture(tmp_path / "2.png", size=(1, 5000))
    with pytest.raises(ValueError, match=r"2\.png is 1x5000, of aspect ratio 5000:1, but it takes at most 4:1"):
        load_references(tmp_path, size)
    with pytest.raises(ValueError, match=r"^images is 1x5000, of aspect ratio 5000:1"):
        from_images(torch.zeros(1, 5000, 1, 3))


def test_pictures_of_16_bits_keep_their_greys(tmp_path):
    import numpy

    Image.fromarray(numpy.full((8, 8), 51 * 256 + 7, dtype=numpy.uint16)).save(tmp_path / "grey.png")
    assert color_of(load_references(tmp_path, 8).pixels[0]) == [51, 51, 51]
