"""Pictures that were picked one by one: a list as JSON, each with its caption and its mask."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checks import shown
from ..concept import plain_text
from .captions import MAX_BYTES
from .folder import MAX_PICTURES
from .pictures import References, Sizes, as_sizes, read_reference

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

EXAMPLE = '[{"name": "dog.png", "caption": "a photo of a sks dog"}]'
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PickedFile:
    """A file as a list names it, by its name, by what is in it, or by both.

    Args:
        name: as ComfyUI names its inputs: `dog.png`, `folder/dog.png`.
        sha256: of its bytes, in hexadecimal.
        bytes: its size, which makes it quicker to find by what is in it.
    """

    name: str = ""
    sha256: str = ""
    bytes: int | None = None

    @property
    def called(self) -> str:
        return shown(self.name or self.sha256[:12])


@dataclass(frozen=True)
class Picked:
    """A picture of the list.

    Args:
        caption: of this picture; empty for the concept's own prompt.
        mask: what counts is transparent in it, as ComfyUI's mask editor leaves what was painted, or white in one of
            which nothing is transparent. Without a mask the whole picture counts.
        invert_mask: what does not count by this, does.
    """

    file: PickedFile
    caption: str = ""
    mask: PickedFile | None = None
    invert_mask: bool = False


def parse(text: str, name: str = "pictures") -> list[Picked]:
    """The pictures of a JSON list: of objects with `name` or `sha256` (or both) and, if wanted, `bytes`, `caption`,
    `mask` (an object with `name`, `sha256`, `bytes`) and `invert_mask`. An empty text is an empty list.

    Raises:
        ValueError: naming the entry, for what is no such list.
    """
    if not text.strip():
        return []
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {shown(text, 80)!r}, which is no JSON; give a list such as {EXAMPLE}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{name} is {shown(text, 80)!r}, but it takes a list such as {EXAMPLE}")
    if len(entries) > MAX_PICTURES:
        raise ValueError(f"{name} has {len(entries)} entries, but it takes {MAX_PICTURES} at most; choose among them")
    return [_entry(entry, f"{name} entry {number}") for number, entry in enumerate(entries, 1)]


def _entry(said: Any, where: str) -> Picked:
    kinds = {"caption": str, "invert_mask": bool, "mask": dict}
    own = parse_file(said, where, kinds)
    rest = {key: said[key] for key in kinds if said.get(key) is not None}
    if len(rest.get("caption", "").encode(errors="replace")) > MAX_BYTES:
        raise ValueError(f"{where}: caption has more than {MAX_BYTES} bytes; shorten it")
    if "mask" in rest:
        rest["mask"] = parse_file(rest["mask"], f"{where}: mask")
    return Picked(own, **rest)


def parse_file(said: Any, where: str, more: Mapping[str, type] | None = None) -> PickedFile:
    """The file that an object names; `more` are other keys that it may have. ValueError, naming `where`."""
    kinds = {"name": str, "sha256": str, "bytes": int, **(more or {})}
    if not isinstance(said, dict):
        raise ValueError(f"{where} is {shown(said, 80)!r}, but it takes an object such as {EXAMPLE[1:-1]}")
    for key, value in said.items():
        if key not in kinds:
            raise ValueError(f"{where} has {shown(key, 40)!r}, but it takes {', '.join(kinds)}")
        if value is not None and (not isinstance(value, kinds[key]) or (kinds[key] is int and isinstance(value, bool))):
            raise ValueError(f"{where}: {key} is {shown(value, 80)!r}, but it takes a {kinds[key].__name__}")
    file = PickedFile(*(said.get(key) or empty for key, empty in (("name", ""), ("sha256", ""), ("bytes", None))))
    if not file.name and not file.sha256:
        raise ValueError(f"{where} names no file; give its name, or the sha256 of its bytes")
    if file.sha256 and not SHA256.fullmatch(file.sha256):
        raise ValueError(f"{where}: sha256 is {shown(file.sha256, 80)!r}, but it takes 64 of 0-9 and a-f")
    return file


def is_clear(picture: Image) -> bool:
    """Whether anything of a picture is transparent."""
    return picture.mode == "RGBA" and picture.getchannel("A").getextrema()[0] < 255


def painted(mask: Image) -> Image:
    """How much counts, in mode L, of a mask: its transparency if it has some, else its brightness."""
    from PIL.ImageChops import invert

    return invert(mask.getchannel("A")) if is_clear(mask) else mask.convert("L")


def unpainted(mask: Image) -> Image:
    """What `painted` leaves."""
    from PIL.ImageChops import invert

    return invert(painted(mask))


def load_picked(
    picked: Sequence[Picked], files: Sequence[tuple[Path, Path | None]], size: Sizes, *, masks: bool = False
) -> References:
    """The picked pictures, in their order, read as `load_references` reads those of a folder.

    Args:
        files: of each, the picture's and that of its mask, if it has one.
        masks: take the alpha channel of a picture without a mask.

    Raises:
        ValueError: for no picture; naming the picture if it or its mask cannot be read, if the mask is empty or of
            another size, or if the picture is longer than 4:1.
    """
    if not picked:
        raise ValueError("pictures is empty; put 3 to 20 pictures of one subject on the node, or choose a folder")
    twice = doubles(files)
    if twice:
        logger.warning(
            "picked twice, and so learnt twice as often: %s", ", ".join(picked[n].file.called for n in twice)
        )
    sizes, pixels, own = as_sizes(size), [], []
    for entry, (file, mask_file) in zip(picked, files, strict=True):
        picture, mask = read_reference(file, sizes, mask_file, unpainted if entry.invert_mask else painted)
        pixels.append(picture)
        own.append(mask if masks or mask_file is not None else None)
    if any(mask is not None for mask in own):
        own = [picture.new_ones(1, *picture.shape[1:]) if mask is None else mask for picture, mask in zip(pixels, own)]
        share = torch.stack([mask.mean() for mask in own]).mean().item()
        logger.info("masks: the loss counts in %.0f %% of the pixels", 100 * share)
    else:
        own = None
    captions = [plain_text(entry.caption) or None for entry in picked]
    return References(pixels, [entry.file.called for entry in picked], own, captions if any(captions) else None)


def doubles(files: Sequence[tuple[Path, Path | None]]) -> list[int]:
    """Places of the files that stand before them already."""
    paths = [file for file, _ in files]
    return [number for number, file in enumerate(paths) if file in paths[:number]]
