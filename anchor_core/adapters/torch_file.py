"""Files that `torch.save` wrote, read without running anything that is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class UnreadableFile(Exception):
    """A file that `read_torch` cannot read, with the reason on one line.

    Attributes:
        strerror: the operating system's reason, None where the contents are at fault.
    """

    def __init__(self, error: Exception):
        self.strerror = getattr(error, "strerror", None)
        super().__init__(" ".join(str(self.strerror or error).split())[:200])


def read_torch(path: str | Path) -> Any:
    """What is in the file, with tensors on the CPU; nothing but tensors and plain values is taken.

    Raises:
        UnreadableFile: whatever is wrong with it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # contents that are no such file lead torch to errors of a dozen types
        raise UnreadableFile(error) from error
