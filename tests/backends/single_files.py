"""Tiny models as single-file checkpoints in the original layouts, which diffusers' `from_single_file` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from anchor_core.adapters.names import to_original
from anchor_core.backends.diffusers.names import ldm_names

_VAE = (
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda match: f"up.{1 - int(match[1])}.block"),  # two blocks, counted from the end
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{1 - int(match[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
)
_OPEN_CLIP = (
    (r"text_model\.encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
)


def _renamed(state: Mapping[str, Tensor], rules, prefix: str) -> dict[str, Tensor]:
    result = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[prefix + key] = tensor
    return result


def _clip(encoder, prefix: str) -> dict[str, Tensor]:
    state = {key: tensor for key, tensor in encoder.state_dict().items() if "text_projection" not in key}
    return _renamed(state, [(r"^(?!text_model\.)", "text_model.")], prefix)


def _open_clip(encoder, prefix: str) -> dict[str, Tensor]:
    names = {key: key if key.startswith("text_") else f"text_model.{key}" for key in encoder.state_dict()}
    state = {names[key]: tensor for key, tensor in encoder.state_dict().items()}
    # SD2's checkpoints have one too, which nothing reads.
    state["text_projection"] = state.pop("text_projection.weight", torch.eye(encoder.config.hidden_size)).T
    for layer in range(encoder.config.num_hidden_layers):
        attention = f"text_model.encoder.layers.{layer}.self_attn"
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{attention}.{part}_proj.{leaf}") for part in "qkv"]
            state[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat(parts)
    return _renamed(state, _OPEN_CLIP, prefix)


def _unet(unet) -> dict[str, Tensor]:
    names = ldm_names(unet)
    parts = [(*key.rpartition("."), tensor) for key, tensor in unet.state_dict().items()]
    return {f"model.diffusion_model.{names[module]}.{leaf}": tensor for module, _, leaf, tensor in parts}


def _mmdit(transformer) -> dict[str, Tensor]:
    fused: dict[str, dict[int, Tensor]] = {}
    last = transformer.config.num_layers - 1
    for key, tensor in transformer.state_dict().items():
        module, _, leaf = key.rpartition(".")
        name, index = to_original(module, "sd3")
        if module == "norm_out.linear" or module == f"transformer_blocks.{last}.norm1_context.linear":
            tensor = torch.cat(tensor.chunk(2)[::-1])  # (scale, shift) here, (shift, scale) there
        key = leaf if leaf == "pos_embed" else f"{name}.{leaf}"
        fused.setdefault(f"model.diffusion_model.{key}", {})[index or 0] = tensor
    return {key: torch.cat([parts[index] for index in sorted(parts)]) for key, parts in fused.items()}


def single_file(name: str, pipeline) -> dict[str, Tensor]:
    """The tensors of the checkpoint of a tiny `sd1`, `sd2_v`, `sdxl` or `sd3` pipeline."""
    state = _renamed(pipeline.vae.state_dict(), _VAE, "first_stage_model.")
    if name == "sd3":
        state |= _mmdit(pipeline.transformer)
        state |= _clip(pipeline.text_encoder, "text_encoders.clip_l.transformer.")
        state |= _renamed(pipeline.text_encoder_2.state_dict(), (), "text_encoders.clip_g.transformer.")
        state |= _renamed(pipeline.text_encoder_3.state_dict(), (), "text_encoders.t5xxl.transformer.")
    elif name == "sdxl":
        state |= _unet(pipeline.unet)
        state |= _clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        state |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif name == "sd2_v":
        state |= _unet(pipeline.unet)
        state |= _open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        state |= _unet(pipeline.unet)
        state |= _clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    return {key: tensor.clone().contiguous() for key, tensor in state.items()}
