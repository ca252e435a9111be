"""OneTrainer's DoRA files against OneTrainer's own layers: the same output, to 1e-4.

It is no package, so this needs a clone of it, in $ONETRAINER_PATH; its licence lets nothing of it be here.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import nn

from anchor_core.adapters.attach import attach_tensors
from tests.adapters.networks import Bare
from tests.adapters.one_of_each import inputs, layers

path = os.environ.get("ONETRAINER_PATH")
pytestmark = pytest.mark.skipif(path is None, reason="no OneTrainer: set ONETRAINER_PATH to a clone")

METADATA = {"ot_config": "{}", "ot_branch": "master"}


def peer(name: str, module: nn.Module, **options) -> nn.Module:
    """OneTrainer's DoRA layer on a module, at random weights."""
    if path not in sys.path:
        sys.path.append(path)
    from modules.module.LoRAModule import DoRAModule

    made = DoRAModule(f"lora_unet_{name}", module, 4, 2.0, train_device=torch.device("cpu"), **options)
    made.initialize_weights()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    made.eval().hook_to_module()
    return made


@pytest.mark.parametrize("on_output", [False, True])
@pytest.mark.parametrize("epsilon", [False, True])
@pytest.mark.parametrize("name", ["square", "linear", "conv"])
def test_a_dora_has_the_effect_that_onetrainer_gives_it(name, epsilon, on_output):
    network = layers()
    module = network.get_submodule(name)
    made = peer(name, module, norm_epsilon=epsilon, decompose_output_axis=on_output)
    x = inputs(module)
    with torch.no_grad():
        expected = module(x)
    tensors = {f"lora_unet_{name}.{key}": tensor.detach().clone() for key, tensor in made.state_dict().items()}
    assert any(key.endswith("dora_scale") for key in tensors)
    bare = Bare(layers(), "lora_unet_", everything=True)
    untouched = bare.network.get_submodule(name)
    attach_tensors(bare, tensors, METADATA)
    with torch.no_grad():
        assert (expected - untouched(x)).abs().max() > 1e-2
        torch.testing.assert_close(bare.network.get_submodule(name)(x), expected, atol=1e-4, rtol=1e-4)
