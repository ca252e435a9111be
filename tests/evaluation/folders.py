"""Folders of pictures and texts for the tests of this room."""

from __future__ import annotations

from PIL import Image


def write(folder, *names, colour=(1, 0, 0), **texts) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), tuple(255 * part for part in colour)).save(folder / name)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
