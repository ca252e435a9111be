"""Optimizers and the course of their learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .settings import TrainSettings


def make_optimizer(groups: Sequence[Any], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer that `settings` names, of parameters or of groups of them.

    Raises:
        ValueError: if its package is not installed.
    """
    try:
        kind = _optimizer_class(settings.optimizer)
    except ImportError as error:
        package = (error.name or str(error)).split(".")[0]
        raise ValueError(
            f"optimizer is {settings.optimizer!r}, which needs the package {package}; install it or take adamw"
        ) from error
    options: dict[str, Any] = {"weight_decay": settings.weight_decay, "betas": (settings.beta1, settings.beta2)}
    if settings.optimizer == "schedule_free":
        options["warmup_steps"] = settings.warmup
    if kind is torch.optim.AdamW and on_gpu(groups):
        options["fused"] = True  # otherwise a GPU takes as much again as the weights in the middle of a step
    return kind(groups, lr=settings.learning_rate, **options)


def on_gpu(groups: Sequence[Any]) -> bool:
    """Whether parameters, or groups of them, are on a card of NVIDIA's or AMD's."""
    first = groups[0]["params"][0] if isinstance(groups[0], dict) else groups[0]
    return first.device.type == "cuda"


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Of `OPTIMIZERS`; ImportError where its package is missing."""
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy
    if name == "schedule_free":
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree
    return torch.optim.AdamW


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then constant, a half cosine or a line to 0 at the end of the training."""
    # Schedule-free warms up by itself.
    warmup = 0 if settings.optimizer == "schedule_free" else settings.warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, settings.steps - warmup)
        if settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return max(0.0, 1 - progress) if settings.schedule == "linear" else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class AveragedWeights:
    """The weights that a training keeps, which the running ones may differ from: an EMA, or schedule-free's average.

    Inside `with average:` the network runs on the average.

    Args:
        parameters: the running weights.
        decay: of the exponential moving average, 0 for none; it starts lower, at (1 + n) / (10 + n) after n updates.
        optimizer: asked for its own average if it keeps one.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float, optimizer: torch.optim.Optimizer):
        self._parameters, self._decay, self._optimizer = list(parameters), decay, optimizer
        self._average = [p.detach().clone() for p in self._parameters] if decay else []
        self._running: list[torch.Tensor] = []
        self._updates = 0
        if hasattr(optimizer, "train"):
            optimizer.train()

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimizer."""
        if self._average:
            self._updates += 1
            decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
            torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    def _swap(self) -> None:
        for i, parameter in enumerate(self._parameters if self._average else ()):  # takes no memory, so it cannot fail
            parameter.data, self._average[i] = self._average[i], parameter.data

    def apply(self) -> None:
        """Put the average in the place of the running weights."""
        if hasattr(self._optimizer, "eval"):
            self._optimizer.eval()
        self._swap()

    def __enter__(self) -> None:
        if hasattr(self._optimizer, "eval"):  # whose way to its average and back rounds
            self._running = [p.detach().clone() for p in self._parameters]
        self.apply()

    @torch.no_grad()
    def __exit__(self, *exception) -> None:
        self._swap()
        if hasattr(self._optimizer, "train"):
            self._optimizer.train()
        for parameter, running in zip(self._parameters, self._running):
            parameter.copy_(running)
        self._running = []

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A step of the optimizer and the update after it count in the block, or else, by an error, neither does.

        The error ends the training, so that only what is kept of it is put back: the weights and their average. The
        copies live as long as the step, when what its passes took is free again. Fused AdamW needs none: it takes no
        memory once a weight is changed, and beside the weights of a whole network their copies would be missed.
        """
        updates, state = self._updates, self._optimizer.state
        own_average = dict(state) if hasattr(self._optimizer, "eval") else {}  # is made of the state
        own = [each for values in own_average.values() for each in values.values() if torch.is_tensor(each)]
        put_back = _remembered([] if self._changes_all_at_once() else [*self._parameters, *self._average, *own])
        try:
            yield
        except BaseException:
            put_back()
            self._updates = updates
            if not own_average:  # there was none before a first step
                state.clear()
            raise

    def _changes_all_at_once(self) -> bool:
        """Whether a step of the optimizer takes no memory when a weight is changed already."""
        groups, state = self._optimizer.param_groups, self._optimizer.state
        # The state of a second group is made when the first is changed.
        later = [p for group in groups[1:] for p in group["params"] if p.grad is not None]
        return all(group.get("fused") for group in groups) and all(p in state for p in later)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average, "updates": self._updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(saved)
        self._updates = state["updates"]


@torch.no_grad()
def _remembered(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A function that gives tensors the values that they have now, and takes no memory for it."""
    alike: dict[tuple, list[torch.Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    # Times 1: one kernel for all of a kind, where a copy of each would be thousands.
    copies = {kind: torch._foreach_mul(group, 1) for kind, group in alike.items()}

    @torch.no_grad()
    def put_back() -> None:
        for kind, group in alike.items():
            torch._foreach_copy_(group, copies[kind])

    return put_back
