"""One of each layer that an adapter of other programs may be on."""

from __future__ import annotations

import torch
from torch import nn


class Layers(nn.Module):
    """The first is of equal width and height."""

    def __init__(self):
        super().__init__()
        self.square = nn.Linear(24, 24)
        self.linear = nn.Linear(24, 16)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.LayerNorm(24)
        self.group = nn.GroupNorm(2, 8)


def layers() -> Layers:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Layers()
        for module in (made.norm, made.group):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        return made


def inputs(module: nn.Module) -> torch.Tensor:
    shape = (2, 8, 7, 7) if isinstance(module, (nn.Conv2d, nn.GroupNorm)) else (5, 24)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))
