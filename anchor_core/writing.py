"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE = 3600.0
"""Seconds after which what a process left half-written is taken for one that was killed."""


@contextmanager
def whole(path: Path, stale: float = STALE) -> Iterator[Path]:
    """A path beside `path` to write to; at the end it takes that place, and after an error it is gone.

    What killed processes have left in the folder for `stale` seconds is removed.

    Raises:
        OSError: of the file system, as it is.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(OSError):  # it is gone already, or its disk is read-only by now
            part.unlink()
    for left in path.parent.glob(".*.part"):
        with suppress(OSError):  # another process has just finished it
            if left.stat().st_mtime <= time.time() - stale:
                left.unlink()


def try_folder(folder: Path) -> None:
    """Make the folder, and a file in it that leaves nothing behind.

    Raises:
        OSError: of the file system, as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
