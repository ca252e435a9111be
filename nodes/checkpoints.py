"""Where the checkpoints of trainings lie, and which of them a training goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import folder_paths

from ..anchor_core.training.checkpoint import Checkpoints

CHECKPOINTS = "anchor_checkpoints"  # not below output/loras, where a .ckpt file would be listed as a LoRA
NEW_TRAINING = "[new training]"


def _root() -> Path:
    return Path(folder_paths.get_output_directory()) / CHECKPOINTS


def checkpoint_names() -> list[str]:
    """The trainings that have checkpoints."""
    return sorted(folder.name for folder in _root().iterdir() if folder.is_dir()) if _root().is_dir() else []


def open_checkpoints(resume: str | None, lora: Path, every: int) -> Checkpoints | None:
    """Those of the training to go on from, or new ones, of this training alone, if some are to be written.

    Args:
        lora: the training's file; its name, and those of its folders, is what the user finds the checkpoints by.

    Raises:
        ValueError: there is none of that name, or the folder cannot be written.
    """
    if resume not in (None, NEW_TRAINING):
        if resume not in checkpoint_names():
            raise ValueError(f"resume is {resume!r}, which has no checkpoints; choose one of the list")
        return Checkpoints(_root() / resume)
    if not every:
        return None
    inside = Path(folder_paths.get_output_directory()) / "loras"
    name = lora.relative_to(inside).with_suffix("") if lora.is_relative_to(inside) else Path(lora.stem)
    name, taken = "-".join(name.parts), set(checkpoint_names())
    return Checkpoints(_root() / next(each for each in _numbered(name) if each not in taken))


def _numbered(name: str) -> Iterator[str]:
    """The name, and the name with 2, 3, ...: the number of a LoRA that was deleted is given again."""
    yield name
    yield from (f"{name}-{number}" for number in count(2))
