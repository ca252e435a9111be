"""The most memory that a process of `bench speed` takes: of the card on CUDA, else resident."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def begin(device: torch.device) -> None:
    """Count from here; on systems but Linux a CPU's peak stays that of the process from its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        _RESET.write_text("5")  # the kernel's word for VmHWM


def taken(device: torch.device) -> int:
    """Bytes, the most since `begin`, or since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
