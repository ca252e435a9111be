"""What a verb says when memory runs out."""

from __future__ import annotations

import pytest
import torch

from anchor_core import cli


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of 8 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_a_sentence(monkeypatch, capsys, error):
    def fail(options):
        raise error

    monkeypatch.setattr(cli.commands, "subjects", fail)
    assert cli.main(["sandbox", "subjects"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: out of memory (" in line and "take a smaller batch_size" in line


def test_another_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli.commands, "subjects", lambda options: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size|inconsistent"):
        cli.main(["sandbox", "subjects"])
