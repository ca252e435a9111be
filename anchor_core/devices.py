"""What a device has free, and its random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, with those that torch keeps for itself.

    On the CPU that is what the system can give without swapping, and no more than the process's container may take.
    """
    if device.type == "cpu":
        import psutil

        return min([psutil.virtual_memory().available, *_left_to_container()])
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def _left_to_container() -> list[int]:
    """Of Linux's control group (version 2), if it has a limit; its file cache is given back when it is needed."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = next(int(value) for key, value in pairs if key == "inactive_file")
    except (OSError, ValueError, StopIteration):
        return []
    return [] if limit == "max" else [int(limit) - int(used) + cached]


@contextmanager
def own_random_state(device: torch.device, seed: int) -> Iterator[None]:
    """A random state of the training's own, which only dropout uses."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
