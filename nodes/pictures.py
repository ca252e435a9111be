"""The pictures of ComfyUI's input folder, found by name and by what is in them, and small ones to show."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import folder_paths

from ..anchor_core.data.folder import is_inside
from ..anchor_core.data.picked import Picked, PickedFile, is_clear, painted
from ..anchor_core.data.pictures import over_white
from ..anchor_core.data.reading import is_turned, open_picture, suffixes

EDGE = 320
"""Of a small picture, in pixels."""
MAX_FILES = 100_000
"""That are looked through for one that is known by what is in it alone."""

_hashes: dict[str, tuple[tuple[int, int], str]] = {}


def sha256_of(file: Path) -> str:
    """In hexadecimal; known as long as the file's time and size stay."""
    state = file.stat()
    now, (before, known) = (state.st_mtime_ns, state.st_size), _hashes.get(str(file), (None, ""))
    if now != before:
        with file.open("rb") as stream:
            known = hashlib.file_digest(stream, "sha256").hexdigest()
        _hashes[str(file)] = now, known
    return known


def named(name: str) -> Path | None:
    """The picture of that name in the input folder, as ComfyUI writes names (`folder/dog.png [input]`), if it is there.

    Raises:
        ValueError: a name that leads out of that folder.
    """
    _, base = folder_paths.annotated_filepath(name)
    if base not in (None, folder_paths.get_input_directory()):
        raise ValueError(
            f"picture {name!r} is not in ComfyUI's input folder; put it on the node, which copies it there"
        )
    file = folder_paths.get_annotated_filepath(name)
    return Path(file) if file.lower().endswith(suffixes()) and os.path.isfile(file) else None


def holding(sha256: str, size: int | None = None) -> Path | None:
    """The first picture of the input folder with those bytes; with their number, others need not be read."""
    root = Path(folder_paths.get_input_directory())
    known = [Path(name) for name, (_, other) in list(_hashes.items()) if other == sha256]
    for file in chain(known, _pictures(root)):
        try:
            if size in (None, file.stat().st_size) and is_inside(root, file) and sha256_of(file) == sha256:
                return file
        except OSError:
            continue  # gone or closed to us meanwhile, as if it were not there
    return None


def _pictures(root: Path) -> Iterator[Path]:
    count, read = 0, suffixes()
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            count += 1
            if count > MAX_FILES:
                return
            if name.lower().endswith(read):
                yield Path(folder, name)


def found(file: PickedFile, what: str = "picture") -> Path:
    """Where a file of a list is: under its name if that holds the bytes that it held, else wherever those are.

    Raises:
        ValueError: if it is nowhere, or its name leads out of the input folder.
    """
    by_name = named(file.name) if file.name else None
    if by_name is not None and file.sha256 in ("", sha256_of(by_name)):
        return by_name
    elsewhere = holding(file.sha256, file.bytes) if file.sha256 else None
    if elsewhere is None:
        but = "; another picture has its name" if by_name else ""
        raise ValueError(
            f"{what} {file.called} is not in this ComfyUI's input folder{but}; drop it on the node, under any name, or "
            "take it off the list"
        )
    return elsewhere


def files_of(picked: list[Picked]) -> list[tuple[Path, Path | None]]:
    """Each picture's file and that of its mask; ValueError, naming the first that is nowhere."""
    return [
        (found(each.file), None if each.mask is None else found(each.mask, f"mask of {each.file.called},"))
        for each in picked
    ]


def look(file: PickedFile, what: str = "picture") -> dict[str, Any]:
    """What a page shows of a file: its name, bytes and size in pixels; or why there is nothing to show, and whether
    that is because it is `missing`."""
    try:
        path = found(file, what)
    except ValueError as error:
        return {"missing": True, "why": str(error)}
    try:
        sha256 = sha256_of(path)
        seen = small(sha256, path, what == "mask")
    except (ValueError, OSError) as error:
        return {"missing": False, "why": str(error)}
    name = Path(os.path.relpath(path, folder_paths.get_input_directory())).as_posix()
    about = {field: value for field, value in asdict(seen).items() if field != "jpeg"}
    return {"name": name, "sha256": sha256, "bytes": path.stat().st_size} | about


def shown(sha256: str, mask: bool) -> bytes | None:
    """The small JPEG of a file of the input folder with those bytes, as a picture or as a mask; None if there is none
    that can be read."""
    file = holding(sha256)
    try:
        return None if file is None else small(sha256, file, mask).jpeg
    except ValueError:
        return None


@dataclass(frozen=True)
class Small:
    """What is shown of a file.

    Args:
        turned: its EXIF turns it.
        clear: something of it is transparent.
        share: of a mask, what counts, in [0, 1].
        jpeg: small, of a picture over white, or white where a mask lets it count.
    """

    width: int
    height: int
    turned: bool
    clear: bool
    share: float
    jpeg: bytes


@lru_cache(maxsize=256)
def small(sha256: str, path: Path, mask: bool) -> Small:
    """ValueError as `open_picture`; `sha256` is what it is remembered by."""
    from PIL.ImageStat import Stat

    opened = open_picture(path)
    picture = painted(opened) if mask else over_white(opened)
    (width, height), share = picture.size, Stat(picture).mean[0] / 255
    picture.thumbnail((EDGE, EDGE))
    stream = BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return Small(width, height, is_turned(path), is_clear(opened), share, stream.getvalue())
