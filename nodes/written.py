"""Files that nodes write, which are written again once they are gone."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

logger = logging.getLogger(__name__)


class Written:
    """The files that nodes have written since ComfyUI started, by the node (its id, or what it was told).

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
