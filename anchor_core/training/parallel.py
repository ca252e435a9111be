"""Several processes that train one adapter together (`accelerate launch`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process among `count`; each draws the rows of all from the one seed and keeps its own share.

    So `count` processes of batch B make the steps of one process of batch `count` * B. `device` is the one that this
    process was given, None where it is alone.
    """

    rank: int = 0
    count: int = 1
    device: str | None = None

    @classmethod
    def launched(cls, count: int) -> Workers:
        """This one of the `count` processes that `accelerate launch` started."""
        if count == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, str(state.device))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This process's part of `rows` rows, which `count` divides."""
        each = rows // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors by their mean over the processes, in place."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.div_(self.count).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            tensor.copy_(part.view_as(tensor))


ALONE = Workers()
