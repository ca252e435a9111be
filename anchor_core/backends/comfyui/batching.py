"""Which conditions go through the network together, and what its blocks are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.conds
import comfy.samplers
import torch
from torch import nn


def with_own_options(block: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A block's transformer_options as they are now: ComfyUI counts the blocks in them, which patches read, also when
    gradient checkpointing runs the block once more."""
    if torch.is_grad_enabled():
        options = {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}
    return arguments, options


def batches(encoded: Sequence[dict[str, comfy.conds.CONDRegular]]) -> list[list[int]]:
    """Rows that can run in one batch: those whose prompts ComfyUI can join, as for most models of one length."""
    batches: list[list[int]] = []
    for row, conds in enumerate(encoded):
        for batch in batches:
            if comfy.samplers.cond_equal_size(encoded[batch[0]], conds):
                batch.append(row)
                break
        else:
            batches.append([row])
    return batches
