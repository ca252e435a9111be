"""Faults to put into a training: memory that is not there, and disks that fail."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from anchor_core.drift import DriftProbe
from anchor_core.training import saving, trainer
from anchor_core.training.preview import Preview

OUT_OF_MEMORY = {
    "of the card": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "of the machine": lambda: MemoryError(),
    "of the CPU allocator": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] can't allocate memory"),
}


class Sites:
    """Where memory is asked for in a training; each call is counted, and one of them fails.

    Args:
        strike: the site, the number of its call (from 1) and the exception, or None to count alone.
    """

    def __init__(self, denoiser, strike: tuple[str, int, BaseException] | None = None):
        self.denoiser, self.strike, self.calls = denoiser, strike, Counter()
        self.struck = False

    def __call__(self, site: str) -> None:
        self.calls[site] += 1
        if self.strike is not None and self.strike[:2] == (site, self.calls[site]):
            self.struck = True
            raise self.strike[2]

    @contextmanager
    def watched(self) -> Iterator[Sites]:
        network, vae, text = self.denoiser.network, self.denoiser.vae, self.denoiser.text_encoder
        with ExitStack() as stack:
            # In the middle of a pass, where the network's other modules have run already.
            for site, module in (
                ("forward", network.mid_block), ("encode pictures", vae.encoder), ("decode", vae.decoder),
                ("encode prompts", text.get_input_embeddings()),
            ):  # fmt: skip
                stack.callback(module.register_forward_pre_hook(lambda *_, site=site: self(site)).remove)
            stack.callback(network.mid_block.register_forward_hook(self._in_backward).remove)
            stack.callback(register_optimizer_step_pre_hook(lambda *_: self("optimizer")).remove)
            for site, owner, name in (
                ("probe", DriftProbe, "measure"), ("preview", Preview, "picture"), ("file", saving, "to_file_keys"),
                ("checkpoint", trainer, "state_of"), ("sampling", type(self.denoiser), "sample"),
            ):  # fmt: skip
                stack.enter_context(patch.object(owner, name, self._before(site, getattr(owner, name))))
            yield self

    def _in_backward(self, module, inputs, output: torch.Tensor) -> None:
        if output.requires_grad:  # a module's own backward hook would sum gradients in another order
            output.register_hook(lambda gradient: self("backward"))

    def _before(self, site: str, function):
        def wrapped(*arguments, **options):
            self(site)
            return function(*arguments, **options)

        return wrapped


class Disk:
    """The disk below a folder, as this process sees it through Python: from some write on it fails.

    torch writes past Python; what is opened, renamed or removed after it fails all the same.
    """

    def __init__(self):
        self._folder: str | None = None
        sys.addaudithook(self._hook)  # which stays for good, so that one `Disk` serves all cases

    @contextmanager
    def failing(self, folder: Path, number: int, after: int, lasting: bool) -> Iterator[Disk]:
        """errno `number` for the write `after` (from 1) and, if it is lasting, for all that follow."""
        self._number, self._after, self._lasting, self._writes, self.struck = number, after, lasting, 0, False
        self._folder = str(folder)
        try:
            yield self
        finally:
            self._folder = None

    _WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def _hook(self, event: str, arguments: tuple) -> None:
        if self._folder is None or event not in ("open", "os.rename", "os.mkdir", "os.remove"):
            return
        path = str(arguments[0])
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & self._WRITING)
        if not writes or not path.startswith(self._folder):
            return
        if event == "os.remove" and self._number != errno.EROFS:  # a full disk lets go
            return
        self._writes += 1
        if self._writes == self._after or (self._lasting and self._writes > self._after):
            self.struck = True
            raise OSError(self._number, os.strerror(self._number), path)
