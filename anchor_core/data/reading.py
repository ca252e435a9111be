"""Picture files, opened: of the formats that are named here and no other, bounded, upright."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks import shown

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

logger = logging.getLogger(__name__)

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}
"""Pillow's names of what is read, with suffixes. It goes by content, and would start other programs for some others."""
MAX_PIXELS = 1024**3 // 4 // 3
"""Pillow's own limit, 89 megapixels: a quarter of a gigabyte in RGB. Other packs switch Pillow's off."""
MAX_BYTES = 2**30

_EXIF_ORIENTATION = 0x0112


def formats() -> list[str]:
    """Those of `FORMATS` that the installed Pillow has; AVIF came with 11.3."""
    from PIL import Image

    if not FORMATS.keys() <= Image.OPEN.keys():
        Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def suffixes() -> tuple[str, ...]:
    """In lower case."""
    return tuple(suffix for name in formats() for suffix in FORMATS[name])


def open_picture(file: Path) -> Image:
    """The whole picture, the first of several, turned as its EXIF says, in RGB or (with transparency) RGBA.

    Raises:
        ValueError: one sentence that names the file, if it cannot be read, is of another format or too large.
    """
    import numpy
    from PIL import Image, UnidentifiedImageError

    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MB")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(file, formats=formats())
        with opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombWarning
            if opened.mode == "F":
                raise ValueError("it holds floating-point values")
            opened.load()
            picture = _upright(opened, file)
            if picture.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip
                picture = Image.fromarray((numpy.asarray(picture).clip(0, 65535) >> 8).astype(numpy.uint8))
            clear = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
            return picture.convert("RGBA" if clear else "RGB")
    except Exception as error:  # a damaged file makes Pillow's readers raise anything
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is none of {', '.join(formats())}"
        elif isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
            reason = f"it has more than {MAX_PIXELS / 1e6:.0f} megapixels"
        raise ValueError(
            f"picture {shown(file)} cannot be read ({shown(reason)}); replace it or take it out of the folder"
        ) from error


def is_turned(file: Path) -> bool:
    """Whether its EXIF turns a picture that `open_picture` reads."""
    from PIL import Image

    with Image.open(file, formats=formats()) as opened:
        return _turn(opened, file) is not None


def _upright(picture: Image, file: Path) -> Image:
    """Turned as the EXIF orientation says; `ImageOps.exif_transpose` writes all fields anew, and fails at odd ones."""
    turn = _turn(picture, file)
    return picture if turn is None else picture.transpose(turn)


def _turn(picture: Image, file: Path) -> Transpose | None:
    """What brings it upright, None where its EXIF asks for nothing or cannot be read."""
    from PIL.Image import Transpose

    try:
        orientation = picture.getexif().get(_EXIF_ORIENTATION)
    except Exception as error:
        logger.warning("%s is not turned, as its EXIF cannot be read (%s)", shown(file), shown(error))
        return None
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return turns.get(orientation) if isinstance(orientation, int) else None
