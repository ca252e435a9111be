"""Gradients through what ComfyUI's networks do that autograd does not follow: fused kernels, and writing in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from comfy_kitchen.backends import eager
from torch import Tensor, nn

from .families import WRITES_IN_PLACE
from .layers import is_plain

KERNELS = (
    "adaln", "rms_adaln", "apply_rope", "apply_rope1", "apply_rope_split_half", "apply_rope_split_half1", "rms_rope",
    "rms_rope1", "rms_rope_split_half", "rms_rope_split_half1",
)  # fmt: skip


@cache  # torch keeps what each call registers for good
def register_kernels() -> None:
    """Give every kernel that this comfy_kitchen has the gradient of its own plain implementation.

    ComfyUI 0.33 leaves most kernels out where `in_training` is set, but not all of those of Anima, Cosmos-Predict2,
    ERNIE-Image and JoyImage.
    """
    for name in KERNELS:
        if hasattr(torch.ops.comfy_kitchen, name) and hasattr(eager, name):
            torch.library.register_autograd(
                f"comfy_kitchen::{name}", _backward(getattr(eager, name)), setup_context=_keep_inputs
            )


def _keep_inputs(ctx: Any, inputs: tuple, output: Any) -> None:  # called by these names
    ctx.save_for_backward(*(each for each in inputs if torch.is_tensor(each)))
    ctx.others = [None if torch.is_tensor(each) else (each,) for each in inputs]


@contextmanager
def copied_where_overwritten(network: nn.Module) -> Iterator[None]:
    """A forward pass that keeps for its gradient copies of all but the weights, where the network writes in place."""
    if type(network).__name__ not in WRITES_IN_PLACE:
        yield
        return
    weights = {each.untyped_storage().data_ptr() for each in network.parameters() if is_plain(each)}

    def keep(saved: Tensor) -> Tensor:
        kept = not is_plain(saved) or saved.untyped_storage().data_ptr() in weights
        return saved if kept else saved.clone()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        yield


def _backward(plain: Callable[..., Any]) -> Callable[..., tuple]:
    def backward(context: Any, *gradients: Tensor) -> tuple:
        saved = iter(context.saved_tensors)
        inputs = [next(saved).detach() if other is None else other[0] for other in context.others]
        wanted = [each for each, needed in zip(inputs, context.needs_input_grad) if needed]
        with torch.enable_grad():
            for each in wanted:
                each.requires_grad_(True)
            found = iter(torch.autograd.grad(plain(*inputs), wanted, gradients, allow_unused=True))
        return tuple(next(found) if needed else None for needed in context.needs_input_grad)

    return backward
