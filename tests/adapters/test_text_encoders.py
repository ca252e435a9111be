"""One adapter over the denoising network and its text encoder."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.attach import attach_file
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter, to_file_keys
from anchor_core.adapters.layers import exact_layers
from tests.adapters.networks import predict


class WithText:
    """A tiny model whose adapter reaches the text encoder, as a backend attaches it."""

    def __init__(self, denoiser):
        self.denoiser, self.adapter, self.architecture = denoiser, None, "stable-diffusion-v1"
        self.networks = {"": denoiser.network, "te": denoiser.text_encoder}
        self.network, self.text_encoders = denoiser.network, {"te": denoiser.text_encoder}
        names = [name for name, part in denoiser.text_encoder.named_modules() if isinstance(part, torch.nn.Linear)]
        inner = {name: name.removeprefix("text_model.").replace(".", "_") for name in names}
        keys = {f"te:{name}": f"lora_te_text_model_{inner[name]}" for name in names}
        self.keys = {**denoiser.file_keys(), **keys}

    def attach(self, config: AdapterConfig, seed: int = 0, vectors=None) -> Adapter:
        networks = self.networks if config.text_encoder else {"": self.networks[""]}
        self.adapter = Adapter.attach(networks, config, seed, self.keys)
        return self.adapter

    def file_keys(self) -> dict[str, str]:
        return self.keys


@pytest.fixture
def with_text(eps_denoiser):
    return WithText(eps_denoiser)


@pytest.fixture
def networks(with_text):
    """The denoising network and its text encoder, and file keys for both."""
    return with_text.networks, with_text.keys


def test_a_file_with_a_text_encoder_attaches_again_and_through_diffusers(
    with_text, model_folders, make_step, stir, tmp_path
):
    from diffusers import StableDiffusionPipeline

    stir(with_text.attach(AdapterConfig(rank=2, alpha=4, text_encoder=True)))
    save_adapter(tmp_path / "lora.safetensors", to_file_keys(with_text.adapter, with_text.keys), {})
    ours = text_states(with_text.networks), predict(with_text.denoiser, make_step)
    with_text.adapter.detach()
    again, _ = attach_file(with_text, tmp_path / "lora.safetensors")
    assert again.config.text_encoder
    assert torch.equal(text_states(with_text.networks), ours[0])
    again.detach()
    pipeline = StableDiffusionPipeline.from_pretrained(
        model_folders["epsilon"], local_files_only=True, safety_checker=None
    )
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    theirs = text_states({"te": pipeline.text_encoder})
    assert not torch.equal(text_states(with_text.networks), ours[0])
    assert (theirs - ours[0]).abs().max() < 1e-4


def text_states(networks) -> torch.Tensor:
    with torch.no_grad():
        return networks["te"](torch.arange(12).view(2, 6)).last_hidden_state


def test_text_encoders_are_adapted_beside_the_network(networks, stir):
    networks, keys = networks
    untouched, modules = text_states(networks), dict(networks["te"].named_modules())
    trainable = next(networks["te"].parameters()).requires_grad_(True)
    adapter = Adapter.attach(networks, AdapterConfig(rank=2, text_encoder=True), 0, keys)
    text = [name for name in adapter.module_names if name.startswith("te:")]
    assert {name.rsplit(".", 1)[1] for name in text} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert len(text) < len(adapter.module_names) and adapter.base_module(text[0]).weight.shape == (32, 32)
    assert {id(p) for network in networks.values() for p in network.parameters() if p.requires_grad} == {
        id(parameter) for parameter in adapter.parameters()
    }
    assert torch.equal(text_states(networks), untouched)
    stir(adapter)
    full = text_states(networks)
    assert not torch.equal(full, untouched)
    with adapter.disabled():
        assert torch.equal(text_states(networks), untouched)
    tensors = to_file_keys(adapter, keys)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in tensors
    state = adapter.state_dict()
    adapter.detach()
    assert dict(networks["te"].named_modules()) == modules and not hasattr(networks["te"], "peft_config")
    assert [p for p in networks["te"].parameters() if p.requires_grad] == [trainable]
    assert torch.equal(text_states(networks), untouched)
    again = Adapter.attach(networks, AdapterConfig(rank=2, layers=exact_layers(list(adapter_names(state)))), 0, keys)
    again.load_state_dict(state)
    assert torch.equal(text_states(networks), full)


def adapter_names(state) -> dict[str, None]:
    return dict.fromkeys(key.removesuffix(".alpha") for key in state if key.endswith(".alpha"))


def test_presets_and_expressions_over_text_encoders(networks):
    networks, keys = networks
    for layers, leaves in (("all_linear", {"fc1", "fc2"}), ("cross_attention_kv", set())):
        adapter = Adapter.attach(networks, AdapterConfig(rank=2, layers=layers), 0, keys)
        text = {name.rsplit(".", 1)[1] for name in adapter.module_names if name.startswith("te:")}
        assert text == {"q_proj", "k_proj", "v_proj", "out_proj"} | leaves
        adapter.detach()
    adapter = Adapter.attach(networks, AdapterConfig(rank=2, layers="^te:.*fc1$"), 0, keys)
    assert all(name.endswith("fc1") for name in adapter.module_names)
    assert not any(parameter.requires_grad for parameter in networks[""].parameters())
    adapter.detach()
    with pytest.raises(ValueError, match="^layers is 'nothing', which matches no linear or convolution module"):
        Adapter.attach(networks, AdapterConfig(layers="nothing"), 0, keys)
