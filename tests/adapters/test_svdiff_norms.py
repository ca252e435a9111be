"""SVDiff on everything: norms as matrices of one row, the outer convolutions, and a rate of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.attach import attach_file
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter, to_file_keys
from anchor_core.adapters.weight_kinds import SpectralLayer
from anchor_core.training.settings import TrainSettings

EVERY = AdapterConfig(kind="svdiff", layers="everything")


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.LayerNorm(6)])
def test_a_norms_weight_is_a_matrix_of_one_row(norm):
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2, 0.5, 3, 0, 1]))
        norm.bias.copy_(torch.arange(6.0))
    layer, x = SpectralLayer(norm), torch.randn(2, 6)
    assert layer.shift.shape == (1,) and torch.equal(layer(x), norm(x))  # to the bit
    length = norm.weight.norm()
    with torch.no_grad():
        layer.shift.fill_(0.5)
    expected = norm.weight * (length + 0.5) / length
    torch.testing.assert_close(norm.weight + layer.change(), expected)
    torch.testing.assert_close(layer(x), (norm(x) - norm.bias) * (length + 0.5) / length + norm.bias)
    with torch.no_grad():
        layer.shift.fill_(-100)  # relu: no length below 0
    torch.testing.assert_close(layer(x), norm.bias.expand(2, 6))
    layer(x).sum().backward()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), norm(x))


def test_everything_is_every_convolution_and_norm_with_rates_of_their_own(eps_denoiser):
    adapter = eps_denoiser.attach(EVERY)
    names = set(adapter.module_names)
    assert {"conv_in", "conv_out", "conv_norm_out"} <= names
    groups = adapter.parameter_groups(norm_learning_rate=1e-6)
    norms = [name for name in names if adapter.base_module(name).weight.ndim == 1]
    assert len(groups) == 2 and groups[1]["lr"] == 1e-6 and len(groups[1]["params"]) == len(norms) > 5
    assert all(parameter.shape == (1,) for parameter in groups[1]["params"])
    (alone,) = adapter.parameter_groups()
    assert len(alone["params"]) == len(names) == sum(len(group["params"]) for group in groups)
    with pytest.raises(ValueError, match="^norm_learning_rate is 0.1, but prodigy"):
        TrainSettings(optimizer="prodigy", norm_learning_rate=0.1)


def test_its_file_brings_it_back(eps_denoiser, stir, tmp_path):
    adapter = eps_denoiser.attach(EVERY)
    stir(adapter)
    state, generator = adapter.state_dict(), torch.Generator().manual_seed(0)
    noisy, times = torch.randn((1, 4, 8, 8), generator=generator), torch.tensor([500])
    condition = [eps_denoiser.encode_prompt("a photo of a dog")]
    wanted = eps_denoiser.predict(noisy, times, condition)
    save_adapter(tmp_path / "every.safetensors", to_file_keys(adapter, eps_denoiser.file_keys()), {})
    eps_denoiser.detach()
    plain = eps_denoiser.predict(noisy, times, condition)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    attach_file(eps_denoiser, tmp_path / "every.safetensors")
    assert isinstance(eps_denoiser.adapter, Adapter) and eps_denoiser.adapter.state_dict().keys() == state.keys()
    torch.testing.assert_close(eps_denoiser.predict(noisy, times, condition), wanted)
