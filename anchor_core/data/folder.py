"""What a folder holds for a training: pictures in natural order, their masks, and what is left out."""

from __future__ import annotations

import errno
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from ..checks import shown
from .reading import suffixes

logger = logging.getLogger(__name__)

MASK_ENDING = "-masklabel"
"""The mask of dog.jpg is dog-masklabel.png beside it, as OneTrainer and mask editors name it: white counts."""
MAX_PICTURES = 10_000
BESIDE = (".txt", ".json")
"""Captions, and the report of what made a folder."""
OUTWARD = "a link that leads out of the folder"


@dataclass(frozen=True)
class Contents:
    """What is in a folder of pictures; hidden files and folders in it do not count.

    Args:
        pictures: in natural order (2.png before 10.png), without masks.
        left_out: name to reason, of all other files but captions.
    """

    pictures: list[Path]
    masks: list[Path]
    left_out: dict[str, str]

    def mask_of(self, picture: Path) -> Path | None:
        """Its mask, whatever the case of the name; ValueError if it has several."""
        stem = picture.stem + MASK_ENDING
        found = [mask for mask in self.masks if mask.stem == stem]
        found = found or [mask for mask in self.masks if mask.stem.casefold() == stem.casefold()]
        if len(found) > 1:
            names = " and ".join(shown(mask.name) for mask in found)
            raise ValueError(f"picture {shown(picture)} has the masks {names}, but it takes one; take the others away")
        return found[0] if found else None


def contents(folder: str | Path) -> Contents:
    """What is in a folder, which exists."""
    folder, read = Path(folder), suffixes()
    pictures, masks, left_out = [], [], {}
    for file in folder.iterdir():
        suffix = file.suffix.lower()
        if file.name.startswith(".") or suffix in BESIDE or file.is_dir():
            continue
        if not is_inside(folder, file):
            left_out[file.name] = OUTWARD
        elif suffix not in read or not file.is_file():
            left_out[file.name] = "no picture of a format that is read"
        else:
            (masks if file.stem.lower().endswith(MASK_ENDING) else pictures).append(file)
    return Contents(sorted(pictures, key=_natural), sorted(masks), dict(sorted(left_out.items())))


def picture_contents(folder: str | Path, option: str = "references") -> Contents:
    """As `contents`, with at least one picture; what is left out is logged.

    Raises:
        ValueError: naming `option`, if it is no folder, or holds no picture or more than are taken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{option} is {shown(folder)!r}, which is no folder, but it takes a folder of pictures")
    found = contents(folder)
    told = listed([f"{name} ({reason})" for name, reason in found.left_out.items()])
    if not found.pictures:
        but = f", but {told}" if told else ""
        raise ValueError(
            f"{option} folder {shown(folder)} holds no picture{but}; put {', '.join(suffixes())} files there"
        )
    if len(found.pictures) > MAX_PICTURES:
        raise ValueError(
            f"{option} folder {shown(folder)} holds {len(found.pictures)} pictures, but it takes {MAX_PICTURES} at "
            "most; choose among them"
        )
    if told:
        logger.warning("left out of %s: %s", shown(folder), told)
    return found


def picture_files(folder: str | Path, option: str = "references") -> list[Path]:
    """The picture files of a folder, as `picture_contents` finds them."""
    return picture_contents(folder, option).pictures


def listed(names: list[str], most: int = 8) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more


def is_inside(folder: Path, path: Path) -> bool:
    """Whether what the path leads to, through links, lies in the folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        return False


def read_text(file: Path, limit: int) -> str:
    """The UTF-8 text of a file of a folder of pictures; OSError if it is longer than `limit` bytes, or leads out."""
    if not is_inside(file.parent, file):
        raise OSError(errno.ELOOP, f"it is {OUTWARD}")
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise OSError(errno.EINVAL, "it is no file")
    with file.open("rb") as stream:
        text = stream.read(limit + 1)
    if len(text) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes")
    return text.decode("utf-8-sig")


def _natural(file: Path) -> tuple[list[int | str], str]:
    # Text and digits, of any script, take turns, so that numbers are only ever compared with numbers.
    parts = re.split(r"(\d+)", file.name)
    return [int(part) if index % 2 else part.casefold() for index, part in enumerate(parts)], file.name
