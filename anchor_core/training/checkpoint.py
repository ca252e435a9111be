"""Checkpoints: the whole state of a training in one file, so that a resumed run goes on as if never broken off."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..adapters.torch_file import sealed
from ..checks import reason
from ..writing import try_folder, whole

KEPT = 2
"""Checkpoints that stay; the one before the newest is there in case that the newest cannot be read."""

_NAME = re.compile(r"step-(\d+)\.ckpt")


class Checkpoints:
    """The checkpoints of one training in a folder, `step-000100.ckpt` and so on.

    Raises:
        ValueError: if the folder cannot be written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            try_folder(self.folder)
        except OSError as error:
            raise self._unwritable(error) from error

    def files(self) -> list[Path]:
        """The checkpoints, oldest first."""
        if not self.folder.is_dir():  # taken away meanwhile
            return []
        return sorted((f for f in self.folder.iterdir() if _NAME.fullmatch(f.name)), key=_step)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after `step`, whole or not at all, and take away all but the newest `KEPT`.

        Raises:
            ValueError: if it cannot be written.
        """
        path = self.folder / f"step-{step:06}.ckpt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(path, stale=0.0) as part:  # nobody else writes here
                torch.save(sealed(state), part)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise self._unwritable(error) from error
        for old in self.files()[:-KEPT]:
            old.unlink(missing_ok=True)
        return path

    def _unwritable(self, error: Exception) -> ValueError:
        return ValueError(f"checkpoint folder {self.folder} cannot be written ({reason(error)}); choose another place")


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])
