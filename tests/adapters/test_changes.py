"""What an adapter changes of each weight, against the weights that its layers compute with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.changes import changes, effective_rank
from anchor_core.adapters.config import AdapterConfig

OPTIONS = {
    "lora": {"rank": 3, "alpha": 5.0},
    "dora": {"rank": 3},
    "lokr": {"rank": 2, "alpha": 3.0},
    "loha": {"rank": 2, "alpha": 3.0},
    "loha, wide": {"rank": 6, "alpha": 3.0},
    "oft": {"rank": 4},
    "full": {"rank": 1},
    "svdiff": {"rank": 1},
}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Linear(24, 16), nn.Linear(16, 32, bias=False)])
        self.mid_block = nn.Conv2d(16, 24, 3)


def weight_of(layer, base: nn.Module, shape: torch.Size) -> torch.Tensor:
    """(out, in ...): what a layer does to each unit vector, without its bias."""
    if isinstance(base, nn.Linear):
        units = torch.eye(shape[1])
    else:
        units = torch.eye(math.prod(shape[1:])).reshape(-1, *shape[1:])
    with torch.no_grad():
        return (layer(units) - layer(torch.zeros_like(units))).flatten(1).T


@pytest.mark.parametrize("kind", OPTIONS)
def test_norms_and_ranks_are_those_of_the_change_itself(kind, stir):
    torch.manual_seed(0)
    network = Network()
    kind, options = kind.split(",")[0], OPTIONS[kind]
    layers = r"down_blocks\.\d" if kind == "oft" else r"down_blocks\.\d|mid_block"
    adapter = Adapter.attach(network, AdapterConfig(kind=kind, layers=layers, **options))
    stir(adapter, size=0.05 if kind == "svdiff" else 0.3)
    keys = {name: f"lora_unet_{name.replace('.', '_')}" for name in adapter.module_names}
    found = list(changes(adapter, keys, lambda layer: layer.weight))
    assert [each.block for each in found] == ["down_blocks.0", "down_blocks.1", "mid_block"][: len(found)]
    for name, change in zip(adapter.module_names, found, strict=True):
        layer, base = adapter.layer(name), adapter.base_module(name)
        own = base.weight.detach()
        dense = (weight_of(layer, base, own.shape) - own.flatten(1)).double()
        values = torch.linalg.svdvals(dense)
        norm = dense.norm().item()
        if kind == "full" and base.bias is not None:
            norm = math.hypot(norm, (layer.trained["bias"] - base.bias).norm().item())
        assert change.norm == pytest.approx(norm, rel=1e-4)
        assert change.relative == pytest.approx(norm / own.norm().item(), rel=1e-4)
        values = values[values > 1e-4 * values[0]]  # the probing by unit vectors is in float32
        shares = values / values.sum()
        assert change.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=2e-3)
        assert change.kind == kind and change.layer == name


def test_effective_rank_by_its_definition():
    """Roy & Vetterli: n equal values give n, one alone 1, and the scale does not matter."""
    assert effective_rank(torch.full((5,), 3.0)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == effective_rank(torch.zeros(0)) == 0
    two = torch.tensor([0.75, 0.25])
    assert effective_rank(7 * two) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_an_adapter_that_has_learnt_nothing_changes_nothing():
    network = Network()
    adapter = Adapter.attach(network, AdapterConfig(rank=2, layers=r"down_blocks\.\d|mid_block"))
    for change in changes(adapter, {name: name for name in adapter.module_names}, lambda layer: layer.weight):
        assert change.norm == change.relative == change.effective_rank == 0
