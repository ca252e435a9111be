"""Pictures of strangers: which files of a folder are read, by which of Pillow's readers, and how they are turned."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageOps

from anchor_core.checks import shown
from anchor_core.data import reading
from anchor_core.data.captions import MAX_BYTES, _orders, read_caption
from anchor_core.data.folder import contents, picture_files
from anchor_core.data.pictures import load_references
from anchor_core.data.reading import open_picture

ROOT = Path(__file__).resolve().parents[2]


def picture(path, color="red", size=(20, 20), mode="RGB", **options):
    Image.new(mode, size, color).save(path, **options)


def uneven(size=(12, 8)) -> Image.Image:
    """A picture of which no turn or mirroring is the same."""
    red, green = numpy.meshgrid(numpy.linspace(0, 255, size[0]), numpy.linspace(0, 255, size[1]))
    return Image.fromarray(numpy.stack([red, green, 0 * red], -1).astype(numpy.uint8))


def skip_without_avif(name: str) -> None:
    if name.endswith("avif") and "AVIF" not in reading.formats():
        pytest.skip("this Pillow has no AVIF, which came with 11.3")


def refused(call, *arguments) -> str:
    """The sentence that it ends in."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    return str(caught.value)


# --- formats --------------------------------------------------------------------------------------------------------


def test_only_the_named_formats_are_opened_whatever_the_name_says(tmp_path, monkeypatch):
    """Pillow goes by content: an EPS in a .png would be given to Ghostscript."""
    Image.init()
    for name in ("EPS", "PDF", "WMF", "PPM", "TGA", "ICNS", "PSD", "SGI", "MPEG"):
        if name in Image.OPEN:
            monkeypatch.setitem(Image.OPEN, name, (lambda *given: pytest.fail("opened"), lambda prefix: True))
    (tmp_path / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    picture(tmp_path / "2.png")
    assert "1.png cannot be read (it is none of PNG, JPEG" in refused(load_references, tmp_path, 8)
    picture(tmp_path / "plain.ppm")
    (tmp_path / "plain.ppm").rename(tmp_path / "1.png")
    assert "1.png cannot be read (it is none of" in refused(load_references, tmp_path, 8)


def test_pictures_are_opened_in_one_place():
    opening = {
        file.name
        for top in ("anchor_core", "nodes")
        for file in (ROOT / top).rglob("*.py")
        if re.search(r"Image\.open\b|\bpillow\(Image|imread", file.read_text(encoding="utf-8"))
    }
    assert opening == {"reading.py"}


@pytest.mark.parametrize("name", ["1.tif", "1.tiff", "1.gif", "1.avif", "1.jfif", "1.WEBP"])
def test_named_formats_are_read(tmp_path, name):
    skip_without_avif(name)
    uneven().save(tmp_path / name, format={"1.jfif": "JPEG"}.get(name))
    (pixels,) = load_references(tmp_path, 8).pixels
    with Image.open(tmp_path / name) as opened:
        theirs = torch.from_numpy(numpy.array(opened.convert("RGB").crop((2, 0, 10, 8)))).movedim(-1, 0) / 255
    torch.testing.assert_close(pixels, theirs)


def test_of_several_frames_the_first_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("1.gif", "2.png", "3.webp", "4.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    for pixels in load_references(tmp_path, 8).pixels:
        assert pixels[0].min() > 0.95 and pixels[2].max() < 0.05


def test_a_format_that_pillow_lacks_is_left_out_by_name(tmp_path, monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    monkeypatch.setattr(Image, "init", lambda: None)
    picture(tmp_path / "1.png")
    (tmp_path / "2.avif").write_bytes(b"any")
    assert load_references(tmp_path, 8).left_out == ("2.avif: no picture of a format that is read",)


@pytest.mark.parametrize("limit", [reading.MAX_PIXELS, None])
def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch, recwarn, limit):
    """Also where another pack has switched Pillow's own limit off."""
    whole = tmp_path / "1.png"
    picture(whole, size=(50, 50))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for pixels in (2499, 1000):  # Pillow warns above its limit, and refuses above twice that
        monkeypatch.setattr(reading, "MAX_PIXELS", pixels)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit and pixels)
        assert "1.png cannot be read (it has more than 0 megapixels)" in refused(open_picture, whole)
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]


def test_a_file_of_gigabytes_is_not_opened(tmp_path):
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(reading.MAX_BYTES + 1)  # takes no room on the disk
    assert "1.png cannot be read (it has more than 1024 MB)" in refused(load_references, tmp_path, 8)


def test_floating_point_pictures_are_refused(tmp_path):
    Image.new("F", (8, 8), 0.5).save(tmp_path / "1.tif")
    assert "1.tif cannot be read (it holds floating-point values)" in refused(load_references, tmp_path, 8)


# --- EXIF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(tmp_path, suffix, orientation):
    skip_without_avif(suffix)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"1.{suffix}"
    uneven().save(file, exif=exif)
    with Image.open(file) as opened:
        theirs = ImageOps.exif_transpose(opened).convert("RGB")
    assert numpy.array_equal(numpy.asarray(open_picture(file)), numpy.asarray(theirs))


def exif_of(*fields: tuple[int, int, int, int], count: int | None = None) -> bytes:
    """Little-endian EXIF of fields (tag, type, count, value or offset), the first of them orientation 6."""
    fields = ((0x0112, 3, 1, 6), *fields)
    packed = b"".join(struct.pack("<HHII", *field) for field in fields)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(fields) if count is None else count) + packed + bytes(4)


RESOLUTION, MAKE, EXIF_DIRECTORY, COPYRIGHT = 0x011A, 0x010F, 0x8769, 0x8298
ODD_FIELDS = {
    "a text for a number": exif_of((RESOLUTION, 2, 4, 0x00636261)),
    "a rational of no bytes": exif_of((RESOLUTION, 5, 0, 0xFFFFFFFF)),
    "a rational over zero": exif_of((RESOLUTION, 5, 1, 34)),
    "a text of bytes": exif_of((MAKE, 1, 4, 0xFFFFFFFF)),
    "a text of numbers": exif_of((COPYRIGHT, 12, 1, 8)),
    "a far directory": exif_of((EXIF_DIRECTORY, 4, 1, 0x7FFFFFFF)),
    "a directory in itself": exif_of((EXIF_DIRECTORY, 4, 1, 8)),
    "a type that is none": exif_of((MAKE, 99, 1, 0)),
    "a tag of several orientations": exif_of((0x0100, 3, 2, 0x00050005)),
    "fewer fields than it says": exif_of(count=9),
}
"""Each says orientation 6 in its first field."""


@pytest.mark.parametrize("kind", ODD_FIELDS)
def test_odd_exif_fields_are_not_read(tmp_path, kind):
    uneven().save(tmp_path / "1.jpg", exif=ODD_FIELDS[kind], quality=100)
    plain = uneven()
    plain.save(tmp_path / "plain.jpg", quality=100)
    with Image.open(tmp_path / "plain.jpg") as opened:
        turned = numpy.asarray(opened.transpose(Image.Transpose.ROTATE_270))
    assert numpy.array_equal(numpy.asarray(open_picture(tmp_path / "1.jpg")), turned)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\xff" * 40]
)
def test_a_picture_is_read_without_an_exif_that_cannot_be(tmp_path, exif):
    uneven().save(tmp_path / "1.jpg", exif=exif)
    assert open_picture(tmp_path / "1.jpg").size == (12, 8)


def test_an_orientation_that_is_no_number_turns_nothing(tmp_path):
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 2, 2, ord("6")) + bytes(4)
    uneven().save(tmp_path / "1.jpg", exif=exif)
    assert open_picture(tmp_path / "1.jpg").size == (12, 8)


# --- names ----------------------------------------------------------------------------------------------------------


def test_natural_order_with_digits_of_other_scripts(tmp_path):
    names = ["1.png", "٢.png", "3.png", "२०.png", "²a.png", "a.png", "a.png1.png", "a².png", "a٣.png", "１０.png"]
    for name in names:
        picture(tmp_path / name, size=(4, 4))
    assert [file.name for file in picture_files(tmp_path)] == [
        "1.png", "٢.png", "3.png", "１０.png", "२०.png", "a٣.png", "a.png", "a.png1.png", "a².png", "²a.png",
    ]  # fmt: skip


def test_hidden_files_are_no_pictures_and_no_masks(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "._1.png").write_bytes(b"what macOS leaves on other disks")
    (tmp_path / ".thumbnail.jpg").write_bytes(b"")
    references = load_references(tmp_path, 8)
    assert references.names == ["1.png"] and not references.left_out


def test_what_is_left_out_is_named(tmp_path, caplog):
    picture(tmp_path / "1.png")
    for name in ("1.txt", "2.heic", "3.jxl", "4.\x1b[2J.cr2", "report.json"):
        (tmp_path / name).write_bytes(b"any")
    (tmp_path / "folder").mkdir()
    references = load_references(tmp_path, 8)
    assert references.left_out == tuple(
        f"{name}: no picture of a format that is read" for name in ("2.heic", "3.jxl", "4.?[2J.cr2")
    )
    assert "2.heic (no picture" in caplog.text and "\x1b" not in caplog.text
    (tmp_path / "1.png").unlink()
    assert "holds no picture, but 2.heic (no picture of a format" in refused(load_references, tmp_path, 8)


@pytest.mark.parametrize("name", ["1-masklabel.PNG", "1-masklabel.webp", "1-MaskLabel.bmp", "1-masklabel.tif"])
def test_masks_of_any_case_and_format(tmp_path, name):
    picture(tmp_path / "1.jpg")
    mask = Image.new("L", (20, 20), 0)
    mask.paste(255, (0, 0, 10, 20))
    mask.save(tmp_path / name, lossless=True)
    references = load_references(tmp_path, 20, masks=True)
    assert references.names == ["1.jpg"] == load_references(tmp_path, 20).names
    assert references.masks[0][..., :10].eq(1).all() and references.masks[0][..., 10:].eq(0).all()


def test_of_two_masks_none_is_guessed(tmp_path):
    for name in ("1.jpg", "1-masklabel.png", "1-masklabel.webp"):
        picture(tmp_path / name)
    message = refused(lambda: load_references(tmp_path, 8, masks=True))
    assert "1.jpg has the masks 1-masklabel.png and 1-masklabel.webp, but it takes one" in message
    assert len(load_references(tmp_path, 8)) == 1


def test_too_many_pictures_are_refused_before_they_are_read(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    monkeypatch.setattr("anchor_core.data.folder.MAX_PICTURES", 3)
    assert "holds 4 pictures, but it takes 3 at most" in refused(load_references, tmp_path, 8)


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path):
    """A folder with a picture, and links inside it and out of it."""
    folder, outside = tmp_path / "references", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    picture(outside / "secret.png")
    (outside / "secret.txt").write_text("a secret of a sks dog")
    picture(folder / "1.png")
    try:
        (folder / "2.png").symlink_to(folder / "1.png")
        (folder / "3.png").symlink_to("../outside/secret.png")
        (folder / "4.png").symlink_to(folder / "4.png")
    except OSError:
        pytest.skip("this system makes no symbolic links without rights")
    return folder


def test_links_out_of_the_folder_are_not_followed(linked, caplog):
    references = load_references(linked, 8)
    assert references.names == ["1.png", "2.png"] and "3.png (a link that leads out of the folder)" in caplog.text
    assert set(references.left_out) == {f"{n}.png: a link that leads out of the folder" for n in (3, 4)}
    os.symlink(linked, linked.parent / "by_a_link")  # what the user names may be one
    assert load_references(linked.parent / "by_a_link", 8).names == references.names


def test_masks_and_captions_by_links_are_not_followed(linked):
    (linked / "1-masklabel.png").symlink_to("../outside/secret.png")
    assert "1.png has neither an alpha channel" in refused(lambda: load_references(linked, 8, masks=True))
    (linked / "1.txt").symlink_to("../outside/secret.txt")
    message = refused(read_caption, linked / "1.png")
    assert "1.txt cannot be read (it is a link that leads out of the folder)" in message and "secret of" not in message
    assert not contents(linked).masks


# --- captions -------------------------------------------------------------------------------------------------------


def test_a_long_caption_is_refused_unread(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("tag, " * (MAX_BYTES // 4))
    assert f"1.txt cannot be read (it has more than {MAX_BYTES} bytes)" in refused(read_caption, tmp_path / "1.png")


def test_orders_of_many_tags_take_no_factorial():
    tags = [f"tag{number}" for number in range(20_000)]
    orders = _orders(", ".join(tags), 0)
    assert len(set(orders)) == 8 and orders[0].split(", ") == tags
    assert all(sorted(order.split(", ")) == sorted(tags) for order in orders)
    assert _orders("same, " * 20_000, 0) == [", ".join(["same"] * 20_000)]
    assert sorted(_orders("a, a, b", 0)) == ["a, a, b", "a, b, a", "b, a, a"]


def test_control_characters_of_captions_and_names_reach_no_message(tmp_path):
    picture(tmp_path / "1\x1b]0;title\x07.png")
    caption = tmp_path / "1\x1b]0;title\x07.txt"
    caption.write_bytes(b"a\0b\x1b[31mc\r\n\td \xe2\x80\xaee")
    assert read_caption(caption.with_suffix(".png")) == "a b [31mc d \u202ee"
    caption.write_bytes(b"\xff")
    assert "1?]0;title?.txt cannot be read (it is not UTF-8)" in refused(read_caption, caption.with_suffix(".png"))
    assert load_references(tmp_path, 8).names == ["1?]0;title?.png"]


def test_shown():
    assert shown("plain ä 犬") == "plain ä 犬"
    assert shown("a\nb\x1b\u202e\udc80") == "a b???"
    assert shown("a" * 50 + "b" * 50, 10) == "aaaaa...bbbbb"
