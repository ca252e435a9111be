"""Files that nodes write: under a name that nobody else takes, and written again once they are gone."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(.*_)(\d+)_")


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """A file for a save that replaces it: `path`, as `new_lora_file` names it, or the next number that is free.

    It is made, empty, so that no other program takes the name meanwhile, and taken away if the block fails before
    anything is in it.

    Raises:
        ValueError: the folder cannot be written.
    """
    name, number = _NUMBERED.fullmatch(path.stem).groups()
    for each in count(int(number)):
        file = path.with_name(f"{name}{each:05}_{path.suffix}")
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


class Written:
    """The files that nodes have written since ComfyUI started, by the node's id (hidden `unique_id`).

    ComfyUI keeps what a node has given for as long as its inputs and its `fingerprint_inputs` stay the same, whatever
    has become of the file. With `fingerprint` in that, a node whose file was deleted runs again, once.
    """

    def __init__(self):
        self._files: dict[str, tuple[Path, ...]] = {}
        self._lost: Counter[str] = Counter()

    def add(self, node: str, *files: Path) -> None:
        """What the node has written by its last run."""
        self._files[node] = files

    def fingerprint(self, node: str) -> int:
        """How often the node's files have been missed."""
        gone = [file for file in self._files.get(node, ()) if not file.is_file()]
        if gone:
            logger.info("%s is gone, and is made again", gone[0])
            del self._files[node]
            self._lost[node] += 1
        return self._lost[node]


WRITTEN = Written()
"""Nodes are classes without a state, and ComfyUI keeps none for them."""
