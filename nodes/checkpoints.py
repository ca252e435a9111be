"""Where the checkpoints of trainings lie, and which of them a training goes on from."""

from __future__ import annotations

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


def open_checkpoints(resume: str | None, name: str, every: int) -> Checkpoints | None:
    """Those of the training to go on from, or new ones under `name` if some are to be written.

    Raises:
        ValueError: there is none of that name, or the folder cannot be written.
    """
    if resume not in (None, NEW_TRAINING):
        if resume not in checkpoint_names():
            raise ValueError(f"resume is {resume!r}, which has no checkpoints; choose one of the list")
        return Checkpoints(_root() / resume)
    return Checkpoints(_root() / name) if every else None
