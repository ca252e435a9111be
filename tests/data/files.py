"""Files of pictures for the tests of this room."""

from __future__ import annotations

from PIL import Image


def picture(path, color="red", size=(20, 20), **options):
    Image.new("RGB", size, color).save(path, **options)
