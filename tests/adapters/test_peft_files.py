"""Files as peft and diffusers write them, against peft's own forward."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from anchor_core.adapters.attach import attach_file, attach_tensors
from tests.adapters.networks import METADATA, Bare, blocks, inputs, transformer


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_layers_of_pefts_have_its_effect(options):
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    names = ["linear", "wide", "point"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False, **options)
        theirs = get_peft_model(blocks(), config)
        for name, part in theirs.named_parameters():
            if "lora_" in name:
                part.data += 0.1 * torch.randn(part.shape)
    tensors = get_peft_model_state_dict(theirs)
    assert all(key.startswith("base_model.model.") for key in tensors)
    rank = 4**0.5 if options.get("use_rslora") else 4
    # Without its config a file of peft's does not tell alpha; kohya's key does.
    tensors |= {f"base_model.model.{name}.alpha": torch.tensor(8 * 4 / rank) for name in names}
    bare = Bare(blocks(), "")
    attach_tensors(bare, tensors)
    for name in names:
        x = inputs(bare.adapter.base_module(name))
        with torch.no_grad():
            expected = theirs.base_model.model.get_submodule(name)(x)
            assert (expected - bare.adapter.base_module(name)(x)).abs().max() > 1e-2
            torch.testing.assert_close(bare.adapter.layer(name)(x), expected, atol=1e-4, rtol=1e-4)


def test_a_bias_and_named_adapters_are_read_as_diffusers_reads_them(tmp_path):
    from diffusers import FluxPipeline

    network = transformer("flux")
    names = [n for n, part in network.named_modules() if isinstance(part, torch.nn.Linear) and ".attn." in n]
    draw = torch.Generator().manual_seed(2)
    tensors = {}
    for name in names:
        part = network.get_submodule(name)
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, part.in_features, generator=draw)
        tensors[f"transformer.{name}.lora_B.weight"] = 0.2 * torch.randn(part.out_features, 4, generator=draw)
        tensors[f"transformer.{name}.lora_B.bias"] = torch.randn(part.out_features, generator=draw)
    save_file(tensors, tmp_path / "lora.safetensors")
    nothing = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(transformer=transformer("flux"), **nothing)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    named = {key.replace("lora_A.", "lora_A.default_0.").replace("lora_B.", "lora_B.default_0."): each
             for key, each in tensors.items()}  # fmt: skip
    save_file(named, tmp_path / "named.safetensors")
    for file in ("lora", "named"):
        bare = Bare(network, "transformer.", METADATA["flux"])
        attach_file(bare, tmp_path / f"{file}.safetensors")
        for name in names:
            x = torch.randn(3, bare.adapter.base_module(name).in_features, generator=draw)
            with torch.no_grad():
                expected = pipeline.transformer.get_submodule(name)(x)
                torch.testing.assert_close(bare.adapter.layer(name)(x), expected, atol=1e-4, rtol=1e-4)
        bare.detach()


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_a_layer_that_is_fused_in_one_code_alone_has_its_effect_in_the_other(kind):
    """Flux' queries, keys, values and MLP: one layer in the original, four in diffusers."""
    draw = torch.Generator().manual_seed(3)
    names = [f"single_transformer_blocks.0.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    network = transformer("flux")
    width, rows = 32, [32, 32, 32, 128]

    def parts(rows: int) -> dict[str, torch.Tensor]:
        def some(*shape):
            return 0.3 * torch.randn(shape, generator=draw)

        return {
            "lokr": {"lokr_w1": some(4, 4), "lokr_w2": some(rows // 4, width // 4)},
            "loha": {"hada_w1_a": some(rows, 2), "hada_w1_b": some(2, width), "hada_w2_a": some(rows, 2),
                     "hada_w2_b": some(2, width)},
            "dora": {"lora_down.weight": some(2, width), "lora_up.weight": some(rows, 2),
                     "dora_scale": 1 + some(rows, 1)},
        }[kind]  # fmt: skip

    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1 = torch.nn.Linear(width, sum(rows))
            with torch.no_grad():
                self.linear1.weight.copy_(torch.cat([network.get_submodule(name).weight for name in names]))
                self.linear1.bias.copy_(torch.cat([network.get_submodule(name).bias for name in names]))

    original = torch.nn.Module()
    original.single_blocks = torch.nn.ModuleList([Fused()])
    separate = {f"transformer.{n}.{p}": each for n, r in zip(names, rows) for p, each in parts(r).items()}
    fused = {f"lora_unet_single_blocks_0_linear1.{p}": each for p, each in parts(sum(rows)).items()}
    x = torch.randn(5, width, generator=draw)
    metadata = {"ss_network_module": "lycoris.kohya"}
    for file in (separate, fused):
        one, other = Bare(original, "diffusion_model."), Bare(network, "transformer.", METADATA["flux"])
        attach_tensors(one, file, metadata)
        attach_tensors(other, file, metadata)
        with torch.no_grad():
            made = torch.cat([network.get_submodule(name)(x) for name in names], dim=1)
            whole = original.single_blocks[0].linear1(x)
        one.detach()
        other.detach()
        with torch.no_grad():
            assert (whole - original.single_blocks[0].linear1(x)).abs().max() > 1e-2
        torch.testing.assert_close(whole, made, atol=1e-4, rtol=1e-4)
