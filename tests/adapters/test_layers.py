"""Which modules a preset or an expression selects, in every network's own names."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.layers import matching_modules, matching_names
from tests.adapters.networks import transformer


def test_presets_select_what_they_say(eps_denoiser):
    network = eps_denoiser.network
    attention = set(matching_modules(network, "attention"))
    assert {name.split(".attn")[1][2:] for name in attention} == {"to_q", "to_k", "to_v", "to_out.0"}
    kv = set(matching_modules(network, "cross_attention_kv"))
    assert kv == {name for name in attention if "attn2" in name and name.endswith(("to_k", "to_v"))}
    more = set(matching_modules(network, "attention_feed_forward")) - attention
    assert {name.split(".ff.")[1] for name in more} == {"net.0.proj", "net.2"}
    linear = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(matching_modules(network, "all_linear")) == linear
    outer = {"conv_in", "conv_out"}
    convolutions = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert outer <= convolutions
    assert set(matching_modules(network, "all_linear_conv")) == linear | convolutions - outer


UNET = "input_blocks.1.1.transformer_blocks.0"
COMFYUI = {
    "unet": [
        *(f"{UNET}.attn{i}.{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"{UNET}.ff.net.0.proj", f"{UNET}.ff.net.2", "input_blocks.1.1.proj_in", "time_embed.0", "label_emb.0.0"),
        *("input_blocks.0.0", "input_blocks.1.0.in_layers.2", "input_blocks.1.0.emb_layers.1", "out.2"),
    ],
    "mmdit": [
        *(f"joint_blocks.0.{side}_block.attn.{part}" for side in ("x", "context") for part in ("qkv", "proj")),
        *("joint_blocks.0.x_block.attn2.qkv", "joint_blocks.0.x_block.attn2.proj"),
        *(f"joint_blocks.0.{side}_block.mlp.{part}" for side in ("x", "context") for part in ("fc1", "fc2")),
        *("joint_blocks.0.x_block.adaLN_modulation.1", "t_embedder.mlp.0", "y_embedder.mlp.2", "context_embedder"),
        *("x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    ],
    "flux": [
        *(f"double_blocks.0.{side}_attn.{part}" for side in ("img", "txt") for part in ("qkv", "proj")),
        *("single_blocks.0.linear1", "single_blocks.0.linear2"),
        *(f"double_blocks.0.{side}_mlp.{part}" for side in ("img", "txt") for part in ("0", "2")),
        *("double_blocks.0.img_mod.lin", "single_blocks.0.modulation.lin", "img_in", "time_in.in_layer"),
    ],
}


@pytest.mark.parametrize(
    ("family", "attention", "feed_forward", "outer"),
    [
        ("unet", 8, 2, {"input_blocks.0.0", "out.2"}),
        ("mmdit", 6, 4, {"x_embedder.proj"}),
        ("flux", 6, 4, set()),
    ],
)
def test_presets_select_the_same_in_comfyuis_networks(family, attention, feed_forward, outer):
    names = COMFYUI[family]
    assert matching_names(names, "attention") == names[:attention]
    assert matching_names(names, "attention_feed_forward") == names[: attention + feed_forward]
    assert matching_names(names, "all_linear") == names
    assert set(names) - set(matching_names(names, "all_linear_conv")) == outer
    kv = matching_names(names, "cross_attention_kv")
    assert kv == ([f"{UNET}.attn2.to_k", f"{UNET}.attn2.to_v"] if family == "unet" else [])


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_presets_select_the_same_in_diffusers_transformers(family):
    network = transformer(family)
    attention = set(matching_modules(network, "attention"))
    joint = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    leaves = {name.split("attn.")[1] for name in attention if ".attn." in name}
    assert leaves == (joint if family == "flux" else joint - {"to_add_out"})  # SD3's last block has no text output
    assert {name for name in attention if ".attn." not in name} == (
        {"single_transformer_blocks.0.proj_out"}
        if family == "flux"
        else {f"transformer_blocks.0.attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    )
    more = set(matching_modules(network, "attention_feed_forward")) - attention
    image = {f"transformer_blocks.0.ff.net.{part}" for part in ("0.proj", "2")}
    text = {name.replace("ff", "ff_context") for name in image}
    assert more == (image | text | {"single_transformer_blocks.0.proj_mlp"} if family == "flux" else image)
    with pytest.raises(ValueError, match="layers is 'cross_attention_kv', but this .* has no cross-attention"):
        matching_modules(network, "cross_attention_kv")
