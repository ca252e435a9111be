"""Tiny models of ComfyUI's own classes at random weights, for scripts that run under its interpreter.

Pictures of 64 x 64 become latents of (C, 8, 8). Text encoders and autoencoders are no part of what is tested: objects
with ComfyUI's interface stand for them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import torch
from torch import Tensor

SIZE = 8
WIDTH = 24
"""Of the prompts' embeddings."""
POOLED = 16

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 1],
    "num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1], "context_dim": WIDTH, "adm_in_channels": None,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "use_temporal_attention": False,
    "legacy": False,
}  # fmt: skip
HEADS = {"num_heads": -1, "num_head_channels": 16}
SDXL = UNET | HEADS | {
    "use_linear_in_transformer": True, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2],
    "num_classes": "sequential", "adm_in_channels": POOLED + 6 * 256,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 1, "num_blocks": 2, "input_size": None, "adm_in_channels": POOLED,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 64}},
    "num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None, "qk_norm": "rms",
    "x_block_self_attn_layers": [0],
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": WIDTH,
    "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [4, 6, 6],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
CHROMA = {key: value for key, value in FLUX.items() if key != "guidance_embed"} | {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "in_dim": 64, "out_dim": 32,
    "hidden_dim": 32, "n_layers": 1,
}  # fmt: skip
LUMINA2 = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 32, "cap_feat_dim": WIDTH, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 16, "qk_norm": True, "axes_dims": [4, 6, 6],
    "axes_lens": [64, 64, 64],
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "freq_dim": 32, "text_dim": WIDTH,
    "num_heads": 2, "num_layers": 2, "in_dim": 16, "out_dim": 16,
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
    "joint_attention_dim": WIDTH, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip
_SD2_V = "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # ComfyUI tells v-prediction by how this one varies


@dataclass(frozen=True)
class Family:
    """A class of `comfy.supported_models`, its network's config, and what its files tell of the prediction."""

    config: type
    network: dict[str, Any]
    told_by: Callable[[], dict[str, Tensor]] = dict
    fixed_length: bool = False


FAMILIES = {
    "sd1": Family(supported.SD15, UNET, fixed_length=True),
    "sd2_v": Family(
        supported.SD20,
        UNET | HEADS | {"use_linear_in_transformer": True},
        lambda: {_SD2_V: torch.arange(9.0)},
        fixed_length=True,
    ),
    "sdxl": Family(supported.SDXL, SDXL, fixed_length=True),
    "sdxl_v": Family(
        supported.SDXL, SDXL, lambda: {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, fixed_length=True
    ),
    "sd3": Family(supported.SD3, SD3),
    "flux": Family(supported.Flux, FLUX),
    "chroma": Family(supported.Chroma, CHROMA),
    "lumina2": Family(supported.Lumina2, LUMINA2),
    "wan": Family(supported.WAN21_T2V, WAN),
    "qwen_image": Family(supported.QwenImage, QWEN),
}


def build(name: str, dtype: torch.dtype = torch.float32, computing: torch.dtype | None = None):
    """MODEL, CLIP and VAE; weights stored in `dtype` and cast to `computing` where they are used."""
    family = FAMILIES[name]
    config = family.config(family.network)
    config.unet_config |= {key: value for key, value in family.network.items() if key in HEADS}
    config.set_inference_dtype(dtype, computing)
    model = config.get_model(family.told_by(), device=torch.device("cpu"))
    fill(model.diffusion_model)
    video = config.latent_format.latent_dimensions == 3
    return patcher_of(model), Clip(family.fixed_length), Vae(config.latent_format.latent_channels, video)


def patcher_of(model: comfy.model_base.BaseModel) -> comfy.model_patcher.ModelPatcher:
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())


def latent_shape(name: str) -> tuple[int, int, int]:
    return FAMILIES[name].config.latent_format.latent_channels, SIZE, SIZE


def fill(network: torch.nn.Module) -> None:
    """Seeded values; ComfyUI leaves the memory as it finds it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                values *= (tensor.numel() // len(tensor)) ** -0.5
            else:
                values = 0.1 * values + (0 if name.endswith("bias") else 1)
            tensor.copy_(values.to(tensor.dtype))


class Clip:
    """Embeddings drawn by the prompt; of as many tokens as the prompt has words and a few, unless all are alike."""

    def __init__(self, fixed_length: bool):
        self.fixed_length = fixed_length

    def tokenize(self, prompt: str) -> str:
        return prompt

    def encode_from_tokens_scheduled(self, prompt: str, show_pbar: bool = True) -> list:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        tokens = 12 if self.fixed_length else 4 + len(prompt.split())
        embedding = torch.randn((1, tokens, WIDTH), generator=generator)
        return [[embedding, {"pooled_output": torch.randn((1, POOLED), generator=generator)}]]


class Vae:
    """Means of 8 x 8 pixels, and back; a video VAE takes the pictures of a batch for the frames of one video."""

    def __init__(self, channels: int, video: bool):
        self.channels, self.video = channels, video

    def encode(self, pixels: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 64 // SIZE)
        latents = means.repeat(1, self.channels, 1, 1)[:, : self.channels]
        return latents.movedim(0, 1).unsqueeze(0) if self.video else latents

    def decode(self, latents: Tensor) -> Tensor:
        frames = latents if self.video else latents.unsqueeze(2)
        pixels = frames[:, :3].repeat_interleave(64 // SIZE, 3).repeat_interleave(64 // SIZE, 4).sigmoid()
        pixels = pixels.permute(0, 2, 3, 4, 1)
        return pixels if self.video else pixels[:, 0]


def fingerprint(model) -> tuple:
    """The values of every parameter and buffer, and which objects, modules and flags the model consists of."""
    values = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    objects = [id(item) for item in (*model.model.parameters(), *model.model.buffers(), *model.model.modules())]
    flags = [(p.requires_grad, p.is_inference()) for p in model.model.parameters()]
    classes = [(type(module), "forward" in vars(module)) for module in model.model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules()]
    management = comfy.model_management
    return values, (objects, flags, classes, hooks, management.in_training, management.NUM_STREAMS)


def same(one: tuple, other: tuple) -> bool:
    equal = one[0].keys() == other[0].keys() and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    return equal and one[1] == other[1]
