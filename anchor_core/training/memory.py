"""What a training step takes in memory, estimated before the first one, and the settings that fit in what is free.

The gradient of a small batch is computed on the model itself, with its adapter and objective, and every tensor that
is allocated meanwhile is followed until it is freed, as torch.distributed's MemTracker does. Every tensor of a pass
grows linearly with the rows and, as attention is memory-efficient, with the area of the latents, or not at all. So
the peaks of three small batches give that of any batch. What the optimizer keeps is known from the number of
parameters. The estimate is of steps: pictures and prompts are encoded before, and a preview takes less.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..concept import Concept
from ..data.cache import Cache
from ..data.dataset import Dataset, Example
from .optimizers import on_gpu
from .settings import TrainSettings
from .trainer import one_pass

logger = logging.getLogger(__name__)

EDGES = 16, 32
"""Of the latents that are measured: what every network can halve as often as it does."""
OVERHEAD = 1.1
"""What an allocator takes for a byte that is in use, at the peak."""
GB = 1e9

_STATE = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "schedule_free": 8}
"""Bytes of an optimizer's state for each parameter, beside its gradient: 4 for each average, copy or distance."""


@dataclass(frozen=True)
class Growth:
    """Peak bytes of a pass: constant + rows (row + pixel x area), the area being that of the latents, h w."""

    constant: float
    row: float
    pixel: float

    def peak(self, rows: int, area: int) -> float:
        return OVERHEAD * (self.constant + rows * (self.row + self.pixel * area))

    def area(self, room: float, rows: int) -> float:
        """The largest whose peak is `room`; below 0 if there is none."""
        return ((room / OVERHEAD - self.constant) / rows - self.row) / self.pixel


class _Live(TorchDispatchMode):
    """Follows what is allocated while it is on; `peak` is the most that was alive at once, in bytes."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.bytes, self.peak = device, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        output = function(*arguments, **options)
        given = {id(storage) for storage in _storages((arguments, options))}
        for storage in _storages(output):
            # A view and an operation in place give a storage that there was before.
            if id(storage) not in given and storage.device.type == self.device.type:
                given.add(id(storage))
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return output

    def _freed(self, count: int) -> None:
        self.bytes -= count


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of the plain tensors among the leaves: a quantised one has its parts elsewhere."""
    plain = (Tensor, torch.nn.Parameter)
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if type(leaf) in plain]


def measure(
    denoiser: Any, concept: Concept, settings: TrainSettings, shape: tuple[int, int, int], rows: int, cache: Cache
) -> int:
    """Peak bytes that the gradient of `rows` rows of latents (C, h, w) allocates, beside the adapter's gradient."""

    def dataset(*prompts: str) -> Dataset:
        return Dataset([Example(torch.zeros(shape), (prompts[0],), (prompts[-1],)) for _ in range(rows)])

    datasets = [dataset(concept.subject_prompt, concept.class_prompt)]
    if settings.make_objective().reads_class_pictures:
        datasets.append(dataset(concept.class_prompt))
    settings = replace(settings, batch_size=rows, micro_batch=0, accumulation=1, ema=0.0)
    live = _Live(denoiser.device)
    one_pass(denoiser, datasets, concept, settings, cache, live)
    return live.peak


def growth(denoiser: Any, concept: Concept, settings: TrainSettings, shape, cache: Cache) -> Growth:
    """How the peak of a pass with these settings grows.

    Args:
        shape: of the latents that will be trained on, (C, h, w); small ones are measured themselves.
    """
    channels, height, width = shape
    if height * width <= EDGES[1] ** 2:
        rows = settings.micro_batch or settings.batch_size
        peak = measure(denoiser, concept, settings, shape, rows, cache)
        return Growth(0.0, 0.0, peak / rows / (height * width))
    small, large = ((channels, edge, edge) for edge in EDGES)
    one, two, other = (
        measure(denoiser, concept, settings, *batch, cache) for batch in ((small, 1), (small, 2), (large, 1))
    )
    pixel = (other - one) / (EDGES[1] ** 2 - EDGES[0] ** 2)
    return Growth(2 * one - two, two - one - pixel * EDGES[0] ** 2, pixel)


def optimizer_bytes(adapter: Any, settings: TrainSettings) -> int:
    """Of the gradient, the optimizer's state and the averaged weights; the parameters themselves are there already."""
    each = 4 + _STATE[settings.optimizer] + (4 if settings.ema else 0)
    return each * sum(parameter.numel() for parameter in adapter.parameters())


def step_bytes(adapter: Any, settings: TrainSettings) -> int:
    """Of what `AveragedWeights.whole` copies while the optimizer steps, when what the passes took is free again."""
    groups = adapter.parameter_groups(settings.token_learning_rate, settings.norm_learning_rate)
    if settings.optimizer == "adamw" and on_gpu(groups) and len(groups) == 1:
        return 0
    each = 4 + (4 if settings.ema else 0) + (_STATE["schedule_free"] if settings.optimizer == "schedule_free" else 0)
    return each * sum(parameter.numel() for parameter in adapter.parameters())


def check_memory(
    settings: TrainSettings, denoiser: Any, dataset: Dataset, concept: Concept, cache: Cache | None = None
) -> TrainSettings:
    """The settings with which a step fits in the free memory of the device.

    With `settings.memory` at `fit`, `micro_batch` is lowered first, as that costs least, and then gradient
    checkpointing is switched on: neither changes what is learnt. With `refuse` they stay as they are.

    Args:
        denoiser: with the adapter that is to be trained.

    Raises:
        ValueError: none fits; says what would.
    """
    if settings.memory == "off":
        return settings
    shape = max((tuple(each.latents.shape) for each in dataset.examples), key=lambda shape: shape[1] * shape[2])
    area, cache, found = shape[1] * shape[2], cache or Cache(denoiser), {}
    held, copies = optimizer_bytes(denoiser.adapter, settings), step_bytes(denoiser.adapter, settings)
    for fitting in _choices(settings, denoiser):
        kept = fitting.gradient_checkpointing
        if kept not in found:
            found[kept] = growth(denoiser, concept, fitting, shape, cache)
        needed = held + max(copies, found[kept].peak(fitting.micro_batch or fitting.batch_size, area))
        free = denoiser.make_room(int(needed))
        if needed <= free:
            _tell(settings, fitting, needed, free)
            return fitting
    edge = max(0.0, found[kept].area(free - held, 1)) ** 0.5 * denoiser.downscale // 64 * 64
    remedy = (
        f"resolution {edge:.0f} or less" if edge >= 256 else "a smaller rank, optimizer adamw8bit or a smaller model"
    )
    tried = " with gradient checkpointing and micro_batch 1" if settings.memory == "fit" else ""
    raise ValueError(
        f"memory is {settings.memory!r}, but a step{tried} takes about {needed / GB:.1f} GB beside the model, and "
        f"{free / GB:.1f} GB are free on {denoiser.device}; take {remedy}, or memory off to try all the same"
    )


def _choices(settings: TrainSettings, denoiser: Any) -> Iterator[TrainSettings]:
    """The settings, and those that take less and less memory for more and more time, if that is allowed."""
    yield settings
    if settings.memory == "refuse":
        return
    rows = settings.micro_batch or settings.batch_size
    sizes = [rows, *(size for size in range(rows // 2, 0, -1) if rows % size == 0)]
    for kept in dict.fromkeys((settings.gradient_checkpointing, True)):
        if kept and not settings.gradient_checkpointing and not denoiser.can_checkpoint:
            return
        for size in sizes:
            yield replace(settings, micro_batch=size, gradient_checkpointing=kept)


def _tell(given: TrainSettings, fitting: TrainSettings, needed: float, free: float) -> None:
    names = ("micro_batch", "gradient_checkpointing")
    changed = [f"{name} {getattr(fitting, name)}" for name in names if getattr(fitting, name) != getattr(given, name)]
    chosen = f"; so that it fits: {', '.join(changed)}" if changed else ""
    level = logging.WARNING if changed else logging.INFO
    logger.log(level, "memory: a step takes about %.1f GB of %.1f GB that are free%s", needed / GB, free / GB, chosen)
