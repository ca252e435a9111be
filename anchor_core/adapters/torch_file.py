"""Files that `torch.save` wrote, read without running anything that is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import reason

SEAL = "sha256"
"""Of a state's other contents, among them: neither torch nor zip notices changed bytes of a tensor when it reads."""


class UnreadableFile(Exception):
    """A file that `read_torch` cannot read, with the reason on one line.

    Attributes:
        strerror: the operating system's reason, None where the contents are at fault.
    """

    def __init__(self, error: Exception):
        self.strerror = getattr(error, "strerror", None)
        super().__init__(reason(error))


def read_torch(path: str | Path) -> Any:
    """What is in the file, with tensors on the CPU; nothing but tensors and plain values is taken.

    Raises:
        UnreadableFile: whatever is wrong with it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # contents that are no such file lead torch to errors of a dozen types
        raise UnreadableFile(error) from error


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its `SEAL`."""
    rest = {name: value for name, value in state.items() if name != SEAL}
    digest = hashlib.sha256()
    for part in _parts(rest):
        digest.update(part)
    return {**rest, SEAL: digest.hexdigest()}


def read_sealed(path: str | Path) -> dict[str, Any]:
    """The state in the file; one without a seal, of an earlier version, as it is.

    Raises:
        UnreadableFile: as `read_torch`, or if the contents are not those that were sealed.
    """
    state = read_torch(path)
    try:
        whole = SEAL not in state or sealed(state)[SEAL] == state[SEAL]
    except Exception as error:  # whatever the contents are
        raise UnreadableFile(error) from error
    if not whole:
        raise UnreadableFile(ValueError("it is damaged: its contents are not what was written"))
    return state


def _parts(value: Any) -> Iterator[bytes]:
    """Everything that tells a state from another."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, Mapping):
        yield f"mapping of {len(value)}".encode()
        for name, each in value.items():
            yield repr(name).encode()
            yield from _parts(each)
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} of {len(value)}".encode()
        for each in value:
            yield from _parts(each)
    else:
        yield repr(value).encode()
