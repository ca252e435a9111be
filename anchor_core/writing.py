"""Files that are written whole or not at all, and under a name that nobody else takes."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
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


_NUMBERED = re.compile(r"(.+_)(\d+)_")


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """A file for a save that replaces it: `path`, or if there is one, that with the next number that is free.

    `dog_00001_.safetensors` goes on as `dog_00002_.safetensors`, and so does `dog.safetensors`. The file is made,
    empty, so that no other program takes its name meanwhile, and is gone if the block fails before anything is in it.

    Raises:
        ValueError: the folder cannot be written.
    """
    numbered = _NUMBERED.fullmatch(path.stem)
    name, number = numbered.groups() if numbered else (f"{path.stem}_", 1)
    following = (path.with_stem(f"{name}{each:05}_") for each in count(int(number) + 1))
    for file in chain([path], following):
        try:
            file.touch(exist_ok=False)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"{file} cannot be written ({error.strerror}); free space or take another name") from error
    try:
        yield file
    except BaseException:
        if file.is_file() and not file.stat().st_size:
            file.unlink()
        raise


def try_folder(folder: Path) -> None:
    """Make the folder, and a file in it that leaves nothing behind.

    Raises:
        OSError: of the file system, as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
