"""OFT files whose layers have different numbers of blocks, which peft's config has no pattern for."""

from __future__ import annotations

import torch
from torch import nn

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.layers import exact_layers


def test_each_layer_has_its_own_number_of_blocks(stir):
    torch.manual_seed(0)
    network = nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.Linear(24, 8), "ab": nn.Linear(16, 8)})
    config = AdapterConfig(kind="oft", rank=2, layers=exact_layers(["a", "ab", "b"]), ranks={"a": 4, "b": 8})
    adapter = Adapter.attach(network, config)
    stir(adapter)
    state = adapter.state_dict()
    assert {name: len(state[f"{name}.oft_R.weight"]) for name in ("a", "b", "ab")} == {"a": 4, "b": 8, "ab": 2}
    for name in adapter.module_names:  # an orthogonal matrix of that many blocks before the layer
        layer, base = adapter.layer(name), adapter.base_module(name)
        size = base.in_features // len(state[f"{name}.oft_R.weight"])
        turn = layer.get_delta_weight("anchor").detach()
        torch.testing.assert_close(turn @ turn.T, torch.eye(base.in_features), atol=1e-4, rtol=0)
        outside = torch.block_diag(*[torch.ones(size, size)] * (base.in_features // size)) == 0
        assert not turn[outside].any() and not torch.equal(turn, torch.eye(base.in_features))
    adapter.detach()
    assert all(type(layer) is nn.Linear for layer in network.values())
