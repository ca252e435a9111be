"""Files in one format turned into another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anchor_core.adapters.attach import attach_tensors
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import convert_file, load_adapter, save_adapter, to_file_keys
from anchor_core.adapters.formats import convert
from tests.adapters.networks import (
    METADATA,
    Bare,
    attached,
    equal,
    transformer,
    transformer_lora,
)


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("layers", ["attention", "attention_feed_forward", "all_linear", r"attn\.(to_k|to_v)$"])
def test_round_trips_of_transformers_are_exact(family, layers, stir):
    bare, tensors = transformer_lora(family, layers, stir)
    metadata = {"modelspec.architecture": METADATA[family]}
    there = convert(tensors, metadata, to="comfyui")
    assert all(key.startswith("diffusion_model.") for key in there)
    assert equal(convert(there, metadata, to="diffusers"), tensors)
    kohya = convert(there, metadata, to="kohya")
    assert all(key.startswith("lora_unet_") for key in kohya)
    assert equal(convert(kohya, metadata, to="comfyui"), there)
    assert equal(convert(kohya, metadata, to="diffusers"), tensors)
    bare.detach()
    adapter = attach_tensors(bare, kohya)
    assert equal(to_file_keys(adapter, bare.file_keys()), tensors)


def test_a_fused_lora_splits_with_one_down_and_fuses_again(stir):
    draw = torch.Generator().manual_seed(0)
    fused = {
        "diffusion_model.single_blocks.3.linear1.lora_down.weight": torch.randn(4, 32, generator=draw),
        "diffusion_model.single_blocks.3.linear1.lora_up.weight": torch.randn(7 * 32, 4, generator=draw),
        "diffusion_model.single_blocks.3.linear1.alpha": torch.tensor(2.0),
    }
    split = convert(fused, to="diffusers")
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    update = 0.5 * fused["diffusion_model.single_blocks.3.linear1.lora_up.weight"]
    assert len(split) == 8
    prefix = "transformer.single_transformer_blocks.3"
    assert torch.equal(torch.cat([split[f"{prefix}.{name}.lora_B.weight"] for name in names]), update)
    assert all(split[f"{prefix}.{name}.lora_A.weight"].shape == (4, 32) for name in names)
    again = convert(split, to="comfyui")
    assert again["diffusion_model.single_blocks.3.linear1.lora_down.weight"].shape == (4, 32)
    assert torch.equal(again["diffusion_model.single_blocks.3.linear1.lora_up.weight"], update)


def test_changes_of_all_weights_of_sd3_are_those_of_its_checkpoint(stir):
    from tests.backends.single_files import _mmdit

    network = transformer("sd3")
    before = _mmdit(network)
    bare = Bare(network, "transformer.", everything=True)
    stir(bare.attach(AdapterConfig(kind="full", layers="everything")))
    tensors = to_file_keys(bare.adapter, bare.file_keys())
    changes = convert(tensors, {"modelspec.architecture": METADATA["sd3"]}, to="comfyui")
    trained = {f"{n}.{p}": v for n in bare.adapter.module_names for p, v in bare.adapter.layer(n).trained.items()}
    bare.detach()
    network.load_state_dict(trained, strict=False)
    after, names = _mmdit(network), {"weight": "diff", "bias": "diff_b"}
    for key, tensor in after.items():
        module, _, leaf = key.removeprefix("model.").rpartition(".")
        if leaf != "pos_embed":  # which does not train
            torch.testing.assert_close(changes.pop(f"{module}.{names[leaf]}"), tensor - before[key])
    assert not changes


def test_changes_of_a_fused_layer_of_flux_are_its_parts_one_below_the_other():
    draw = torch.Generator().manual_seed(0)
    block, parts = "transformer.single_transformer_blocks.3", ("attn.to_q", "attn.to_k", "proj_mlp")
    diffs = {name: torch.randn(128 if name == "proj_mlp" else 32, 32, generator=draw) for name in parts}
    tensors = {f"{block}.{name}.diff": tensor for name, tensor in diffs.items()}
    tensors |= {f"{block}.{name}.diff_b": tensor[:, 0] for name, tensor in diffs.items()}
    tensors |= {f"{block}.attn.norm_q.diff": torch.ones(8)}
    made, original = convert(tensors, to="comfyui"), "diffusion_model.single_blocks.3"
    rows = [diffs["attn.to_q"], diffs["attn.to_k"], torch.zeros(32, 32), diffs["proj_mlp"]]
    assert torch.equal(made[f"{original}.linear1.diff"], torch.cat(rows))
    assert torch.equal(made[f"{original}.linear1.diff_b"], torch.cat(rows)[:, 0])
    assert torch.equal(made[f"{original}.norm.query_norm.diff"], torch.ones(8)) and len(made) == 3
    with pytest.raises(ValueError, match="^to is 'diffusers', but this is a full file, and diffusers reads LoRA only"):
        convert(tensors, to="diffusers")


def unet(sdxl: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    types = (down[0], down[1], down[1]) if sdxl else (down[1], down[1], down[0])
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4} if sdxl else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 16, 32), layers_per_block=2, down_block_types=types,
            up_block_types=(up[0], up[0], up[1]) if sdxl else (up[1], up[0], up[0]), cross_attention_dim=24,
            attention_head_dim=4, norm_num_groups=4, projection_class_embeddings_input_dim=24 + 6 * 4 if sdxl else None,
            transformer_layers_per_block=(1, 1, 2) if sdxl else 1, **extra,
        )  # fmt: skip


def noise(network: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 3, 24, generator=draw)
    extra = {"text_embeds": torch.randn(2, 24, generator=draw), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return network(x, torch.tensor([10, 500]), text, added_cond_kwargs=extra).sample


@pytest.mark.parametrize("sdxl", [False, True])
def test_unet_files_of_every_format_have_one_effect_and_round_trips_are_exact(sdxl, stir, tmp_path):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    bare = Bare(unet(sdxl), "unet.")
    stir(bare.attach(AdapterConfig(rank=2, layers="all_linear_conv")), size=0.2)
    tensors, ours = to_file_keys(bare.adapter, bare.file_keys()), noise(bare.network)
    bare.detach()
    kohya = convert(tensors, to="kohya")
    assert any(key.startswith("lora_unet_input_blocks" if sdxl else "lora_unet_down_blocks") for key in kohya)
    assert equal(convert(kohya, to="diffusers"), tensors) and equal(convert(tensors, to="comfyui"), kohya)
    attach_tensors(bare, kohya)
    assert torch.equal(noise(bare.network), ours)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "feature_extractor"))
    if sdxl:
        nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "text_encoder_2", "tokenizer_2"))
    pipelines = {True: StableDiffusionXLPipeline, False: StableDiffusionPipeline}
    only = {} if sdxl else {"safety_checker": None}
    for format, file in {"diffusers": tensors, "kohya": kohya}.items():
        save_adapter(tmp_path / f"{format}.safetensors", file, {})
        pipeline = pipelines[sdxl](unet=unet(sdxl), **nothing, **only)
        pipeline.load_lora_weights(tmp_path, weight_name=f"{format}.safetensors")
        assert (noise(pipeline.unet) - ours).abs().max() < 1e-4


def test_text_encoders_change_their_prefix():
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    for network, ours, count in (
        ("lora_unet_down_blocks_0_attentions_0_proj_in", ("lora_te_",), 1),
        ("lora_unet_input_blocks_4_1_proj_in", ("lora_te1_", "lora_te2_"), 2),
    ):
        file = {
            f"{prefix}.{part}": tensor
            for prefix in (network, *(f"{te}{name.replace('.', '_')}" for te in ours))
            for part, tensor in (
                ("lora_down.weight", torch.ones(2, 8)),
                ("lora_up.weight", torch.ones(8, 2)),
                ("alpha", torch.tensor(2.0)),
            )
        }
        metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base"} if count == 2 else {}
        other = convert(file, metadata, to="diffusers")
        encoders = ["text_encoder", "text_encoder_2"][:count]
        assert {key for key in other if key.startswith("text")} == {
            f"{encoder}.{name}.lora_{part}.weight" for encoder in encoders for part in "AB"
        }
        assert equal(convert(other, metadata, to="kohya"), file)


def test_what_cannot_be_converted_says_why(stir, tmp_path):
    for kind, reason in (("dora", "magnitudes depend on the base weights"), ("loha", "diffusers reads LoRA only")):
        bare = attached(kind, stir, "diffusion_model.double_blocks.0.")
        with pytest.raises(ValueError, match=f"^to is 'diffusers'.*{reason}"):
            convert(to_file_keys(bare.adapter, bare.file_keys()), to="diffusers")
    peft = attached("dora", stir, "transformer.single_transformer_blocks.0.")
    tensors = to_file_keys(peft.adapter, peft.file_keys())
    with pytest.raises(ValueError, match="^to is 'kohya', but this is a dora file"):
        convert({key: tensor for key, tensor in tensors.items() if "dora_scale" not in key}, to="kohya")
    down, up = torch.ones(1, 5), torch.ones(5, 1)
    either = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": down}
    either["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = up
    with pytest.raises(ValueError, match="both SD3 and Flux"):
        convert(either, to="comfyui")
    with pytest.raises(ValueError, match="^to is 'other', but it takes one of comfyui, kohya, diffusers"):
        convert(either, to="other")
    with pytest.raises(ValueError, match="in no known format: nowhere"):
        convert({"nowhere.lora_down.weight": down, "nowhere.lora_up.weight": up}, to="kohya")
    save_adapter(tmp_path / "one.safetensors", either, {})
    with pytest.raises(ValueError, match=r"one\.safetensors: .*both SD3 and Flux") as caught:
        convert_file(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "kohya")
    assert "\n" not in str(caught.value) and not (tmp_path / "two.safetensors").exists()


def test_convert_file_carries_the_metadata(stir, tmp_path):
    _, tensors = transformer_lora("flux", "attention", stir)
    metadata = {"modelspec.architecture": METADATA["flux"], "anchor.w": "0.5"}
    save_adapter(tmp_path / "one.safetensors", tensors, metadata)
    convert_file(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "comfyui")
    made, carried = load_adapter(tmp_path / "two.safetensors")
    assert carried == metadata and equal(made, convert(tensors, metadata, to="comfyui"))
