"""Module names of the same network in diffusers and in the original (ComfyUI's) code, by its structure.

The correspondence is that of the checkpoints which both read. Families: `sd` (SD1, SD2), `sdxl`, `sd3`, `flux`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_WORDS = (
    # UNets
    "down_blocks up_blocks mid_block transformer_blocks input_blocks middle_block output_blocks in_layers out_layers "
    "emb_layers skip_connection time_embed label_emb time_embedding add_embedding linear_1 linear_2 conv_in conv_out "
    "conv_shortcut conv_norm_out time_emb_proj to_q to_k to_v to_out proj_in proj_out "
    # transformers
    "joint_blocks x_block context_block double_blocks single_blocks single_transformer_blocks img_attn txt_attn "
    "img_mlp txt_mlp img_mod txt_mod img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer "
    "adaLN_modulation x_embedder y_embedder t_embedder context_embedder pos_embed add_q_proj add_k_proj add_v_proj "
    "to_add_out ff_context norm1_context norm_out proj_mlp time_text_embed timestep_embedder text_embedder "
    "guidance_embedder query_norm key_norm norm_q norm_k norm_added_q norm_added_k ln_q ln_k "
    # text encoders
    "text_model self_attn q_proj k_proj v_proj out_proj text_projection final_layer_norm token_embedding "
    "position_embedding wi_0 wi_1 layer_norm1 layer_norm2"
).split()
_TOKEN = re.compile(f"(?:{'|'.join(sorted(_WORDS, key=len, reverse=True))}|[^_]+)(?=_|$)")


def dotted(name: str) -> str:
    """`down_blocks_0_attentions_1_proj_in` as `down_blocks.0.attentions.1.proj_in`."""
    return ".".join(_TOKEN.findall(name))


# --- transformers: (blocks there, blocks in diffusers, {name in a block: names in diffusers}) ----------------------

_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def _under(part: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{part}.{name}" for name in names)


_BLOCKS = {
    "sd3": [
        (
            "joint_blocks",
            "transformer_blocks",
            {
                "x_block.attn.qkv": _under("attn", _QKV),
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn.ln_q": ("attn.norm_q",),
                "x_block.attn.ln_k": ("attn.norm_k",),
                "x_block.attn2.ln_q": ("attn2.norm_q",),
                "x_block.attn2.ln_k": ("attn2.norm_k",),
                "context_block.attn.ln_q": ("attn.norm_added_q",),
                "context_block.attn.ln_k": ("attn.norm_added_k",),
                "x_block.attn2.qkv": _under("attn2", _QKV),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "x_block.adaLN_modulation.1": ("norm1.linear",),
                "context_block.attn.qkv": _under("attn", _ADDED_QKV),
                "context_block.attn.proj": ("attn.to_add_out",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
                "context_block.adaLN_modulation.1": ("norm1_context.linear",),
            },
        )
    ],
    "flux": [
        (
            "double_blocks",
            "transformer_blocks",
            {
                "img_attn.qkv": _under("attn", _QKV),
                "img_attn.proj": ("attn.to_out.0",),
                "img_attn.norm.query_norm": ("attn.norm_q",),
                "img_attn.norm.key_norm": ("attn.norm_k",),
                "txt_attn.norm.query_norm": ("attn.norm_added_q",),
                "txt_attn.norm.key_norm": ("attn.norm_added_k",),
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "img_mod.lin": ("norm1.linear",),
                "txt_attn.qkv": _under("attn", _ADDED_QKV),
                "txt_attn.proj": ("attn.to_add_out",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
                "txt_mod.lin": ("norm1_context.linear",),
            },
        ),
        (
            "single_blocks",
            "single_transformer_blocks",
            {
                "linear1": (*_under("attn", _QKV), "proj_mlp"),
                "linear2": ("proj_out",),
                "modulation.lin": ("norm.linear",),
                "norm.query_norm": ("attn.norm_q",),
                "norm.key_norm": ("attn.norm_k",),
            },
        ),
    ],
}
_OUTSIDE = {
    "sd3": {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    "flux": {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
}

# --- UNets ---------------------------------------------------------------------------------------------------------

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET_BACK = {value: key for key, value in _RESNET.items()}
_UNET_BACK = {value: key for key, value in _UNET.items()}
_STAGE = 3  # input blocks of one resolution: two of layers, one that halves it; output blocks: three of layers


def _unet_to_diffusers(name: str) -> str:
    if name in _UNET:
        return _UNET[name]
    match = re.match(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)$|middle_block\.(\d)\.(.+)$", name)
    if not match:
        return name
    side, number, position, inner, middle, middle_inner = match.groups()
    if middle:
        return (
            f"mid_block.attentions.0.{middle_inner}"
            if middle == "1"
            else _resnet("mid_block", int(middle) // 2, middle_inner)
        )
    stage, index = divmod(int(number) - (side == "input_blocks"), _STAGE)
    block = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{stage}"
    if inner == "op":
        return f"{block}.downsamplers.0.conv"
    if inner == "conv":
        return f"{block}.upsamplers.0.conv"
    return _resnet(block, index, inner) if position == "0" else f"{block}.attentions.{index}.{inner}"


def _resnet(block: str, index: int, inner: str) -> str:
    return f"{block}.resnets.{index}.{_RESNET.get(inner, inner)}"


def _unet_to_original(name: str) -> str:
    if name in _UNET_BACK:
        return _UNET_BACK[name]
    match = re.match(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)$", name)
    if not match:
        return name
    side, stage, part, index, inner = match.groups()
    inner, position = _RESNET_BACK.get(inner, inner), int(part != "resnets")
    if side is None:
        return f"middle_block.{1 if position else 2 * int(index)}.{inner}"
    first = _STAGE * int(stage)
    if part == "downsamplers":
        return f"input_blocks.{first + _STAGE}.0.op"
    if part == "upsamplers":
        return f"output_blocks.{first + _STAGE - 1}.2.conv"  # where there is one, SDXL has attention before it
    blocks, shift = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
    return f"{blocks}.{first + int(index) + shift}.{position}.{inner}"


# --- both ----------------------------------------------------------------------------------------------------------


def to_diffusers(name: str, family: str) -> tuple[str, ...]:
    """diffusers' names for a module: several where the original one is fused. A name of diffusers' stays."""
    if family in ("sd", "sdxl"):
        return (_unet_to_diffusers(name),)
    for there, here, names in _BLOCKS[family]:
        match = re.match(rf"{there}\.(\d+)\.(.+)$", name)
        if match and match[2] in names:
            return tuple(f"{here}.{match[1]}.{part}" for part in names[match[2]])
    return (_OUTSIDE[family].get(name, name),)


def to_original(name: str, family: str) -> tuple[str, int | None]:
    """The original name for a module, and which part of it this is where that one is fused. An original one stays."""
    if family in ("sd", "sdxl"):
        return _unet_to_original(name), None
    for there, here, names in _BLOCKS[family]:
        match = re.match(rf"{here}\.(\d+)\.(.+)$", name)
        for original, parts in names.items() if match else ():
            if match[2] in parts:
                return f"{there}.{match[1]}.{original}", parts.index(match[2]) if len(parts) > 1 else None
    return next((old for old, new in _OUTSIDE[family].items() if new == name), name), None


def swapped_rows(parts: Mapping[str, Tensor], original: str, family: str) -> dict[str, Tensor]:
    """The LoRA or change of a layer whose output is (shift, scale) in one code and (scale, shift) in the other."""
    pair = original == "final_layer.adaLN_modulation.1" or original.endswith("context_block.adaLN_modulation.1")
    if family in ("sd", "sdxl") or not pair:
        return dict(parts)
    by_row = {"lora_up.weight", "dora_scale", "diff", "diff_b"}
    rows, width = parts.get("lora_up.weight", parts.get("diff")), parts.get("lora_down.weight", parts.get("diff"))
    if rows is None or width is None or not parts.keys() <= by_row | {"lora_down.weight", "alpha"}:
        raise ValueError(f"{original} has its rows in another order there, which only a LoRA or full can follow")
    if rows.shape[0] != 2 * width.shape[1]:
        return dict(parts)  # all but SD3's last block modulate six values
    return {part: tensor.roll(rows.shape[0] // 2, 0) if part in by_row else tensor for part, tensor in parts.items()}


_TRANSFORMER_WIDTHS = {1536: "sd3", 2432: "sd3", 3072: "flux"}
_SDXL = re.compile(
    r"^(input_blocks\.(7|8)\.1|output_blocks\.[0-2]\.1\.(?!conv)|up_blocks\.0\.attentions|label_emb|add_embedding)"
    r"|transformer_blocks\.[1-9]"
)


def network_family(layers: Mapping[str, Mapping[str, Tensor]], architecture: str, two_text_encoders: bool) -> str:
    """Which family's names and shapes these are.

    Raises:
        ValueError: if they are of none, or of SD3 or Flux without a sign of which.
    """
    named = {"stable-diffusion-xl": "sdxl", "stable-diffusion-v3": "sd3", "flux": "flux", "stable-diffusion-v": "sd"}
    said = next((family for name, family in named.items() if architecture.startswith(name)), None)
    names = list(layers)
    for family, beginnings in {
        "sd3": ("joint_blocks.", "context_block"),
        "flux": ("double_blocks.", "single_blocks.", "single_transformer_blocks."),
    }.items():
        if any(name.startswith(beginnings) for name in names):
            return family
    if any(re.match(r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)\.", n) for n in names):
        if said in ("sd", "sdxl"):
            return said
        return "sdxl" if two_text_encoders or any(map(_SDXL.search, names)) or _wide_text(layers) else "sd"
    if any(name.startswith("transformer_blocks.") for name in names):
        widths = {parts["lora_down.weight"].shape[1] for parts in layers.values() if "lora_down.weight" in parts}
        family = said or next((_TRANSFORMER_WIDTHS[width] for width in widths if width in _TRANSFORMER_WIDTHS), None)
        if family in _BLOCKS:
            return family
        raise ValueError(
            "the file's names are of both SD3 and Flux, and its metadata names no architecture; "
            "give a file with modelspec.architecture"
        )
    if said or not names:
        return said or ("sdxl" if two_text_encoders else "sd")
    raise ValueError(f"{names[0]} is a layer of no known network; conversion is for SD1, SD2, SDXL, SD3 and Flux")


def _wide_text(layers: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether the cross-attention reads SDXL's 2048 channels of text."""
    keys = [parts.get("lora_down.weight") for name, parts in layers.items() if re.search(r"attn2\.to_[kv]$", name)]
    return any(down is not None and down.shape[1] == 2048 for down in keys)
