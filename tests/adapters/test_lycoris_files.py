"""Files of LyCORIS' kinds against LyCORIS itself: the same output of the same layer, to 1e-4."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.attach import attach_tensors
from tests.adapters.networks import Bare
from tests.adapters.one_of_each import Layers, inputs, layers

lycoris = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")

LYCORIS = {"ss_network_module": "lycoris.kohya"}


CASES = {
    "locon": ("LoConModule", ("square", "linear", "conv"), {}),
    "locon-tucker": ("LoConModule", ("conv",), {"use_tucker": True}),
    "locon-rslora": ("LoConModule", ("linear",), {"rs_lora": True}),
    "dora-out": ("LoConModule", ("square", "linear", "conv"), {"weight_decompose": True, "wd_on_out": True}),
    "dora-in": ("LoConModule", ("square", "linear", "conv"), {"weight_decompose": True, "wd_on_out": False}),
    "loha": ("LohaModule", ("square", "linear", "conv"), {}),
    "loha-tucker": ("LohaModule", ("conv",), {"use_tucker": True}),
    "loha-dora": ("LohaModule", ("square", "conv"), {"weight_decompose": True, "wd_on_out": True}),
    "loha-dora-in": ("LohaModule", ("square", "conv"), {"weight_decompose": True, "wd_on_out": False}),
    "lokr": ("LokrModule", ("square", "linear", "conv"), {"factor": 2, "lora_dim": 2}),
    "lokr-both": ("LokrModule", ("square", "conv"), {"factor": 8, "lora_dim": 1, "decompose_both": True}),
    "lokr-full": ("LokrModule", ("linear", "conv"), {"full_matrix": True}),
    "lokr-tucker": ("LokrModule", ("conv",), {"use_tucker": True, "lora_dim": 1, "factor": 2}),
    "lokr-dora": ("LokrModule", ("square", "conv"), {"weight_decompose": True, "lora_dim": 2}),
    "glora": ("GLoRAModule", ("square", "linear", "conv"), {}),
    "ia3": ("IA3Module", ("square", "linear", "conv"), {}),
    "ia3-input": ("IA3Module", ("square", "linear", "conv"), {"train_on_input": True}),
    "oft": ("DiagOFTModule", ("square", "linear", "conv"), {}),
    "oft-constraint": ("DiagOFTModule", ("square", "conv"), {"constraint": 0.05, "rescaled": True}),
    "boft": ("ButterflyOFTModule", ("linear", "wide"), {}),
    "boft-rescaled": ("ButterflyOFTModule", ("linear", "wide"), {"constraint": 0.05, "rescaled": True}),
    "norm": ("NormModule", ("norm", "group"), {}),
    "full": ("FullModule", ("linear", "conv"), {}),
}


def trained(case: str, network: Layers, name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What LyCORIS would save of a layer trained at random, and the layer's output with it."""
    kind, _, options = CASES[case]
    module = network.get_submodule(name)
    made = getattr(lycoris, kind)(f"lora_unet_{name}", module, 1.0, **{"lora_dim": 4, "alpha": 2, **options})
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    made.eval()
    made.apply_to()
    with torch.no_grad():
        output = module(inputs(module))
    saved = made.custom_state_dict() if hasattr(made, "custom_state_dict") else None
    saved = saved or made.state_dict()
    tensors = {
        f"lora_unet_{name}.{part}": tensor.detach().clone()
        for part, tensor in saved.items()
        if not part.startswith("org_module") and part != "scalar"
    }
    return tensors, output


@pytest.mark.parametrize("case", CASES)
def test_a_file_has_the_effect_that_lycoris_gives_it(case):
    for name in CASES[case][1]:
        tensors, expected = trained(case, layers(), name)
        bare = Bare(layers(), "lora_unet_", everything=True)
        untouched = bare.network.get_submodule(name)
        x = inputs(untouched)
        attach_tensors(bare, tensors, LYCORIS)
        with torch.no_grad():
            assert (expected - untouched(x)).abs().max() > 1e-2
            torch.testing.assert_close(bare.network.get_submodule(name)(x), expected, atol=1e-4, rtol=1e-4)
        bare.detach()
        assert bare.network.get_submodule(name) is untouched
