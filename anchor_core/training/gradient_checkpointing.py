"""Gradient checkpointing of any network's blocks (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(blocks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """While it is open, the blocks keep only their inputs for the backward pass and compute the rest again.

    A pass without a graph, as the anchor's, is not touched. The adapter must be switched in the backward pass as it
    was in the forward pass.
    """
    blocks = list(blocks)
    try:
        for block in blocks:
            block.forward = _recomputed(block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _recomputed(forward):
    def run(*arguments, **options):
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    return run
