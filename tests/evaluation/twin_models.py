"""Tiny networks of diffusers whose weights ComfyUI's classes take as well, with prompts given as embeddings."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

WIDTH, POOLED, SIZE = 24, 16, 8
"""Of the prompts' embeddings and of latents, as in tests/comfyui/comfy_models.py."""

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
    "num_res_blocks": [1, 1], "context_dim": WIDTH, "adm_in_channels": None, "use_spatial_transformer": True,
    "use_linear_in_transformer": False, "use_temporal_attention": False, "legacy": False, "transformer_depth": [1, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 0, 0], "num_heads": 4, "num_head_channels": -1,
}  # fmt: skip
SDXL = UNET | {
    "use_linear_in_transformer": True, "transformer_depth": [0, 2], "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 2, 2], "num_classes": "sequential", "adm_in_channels": POOLED + 6 * 256,
    "num_heads": -1, "num_head_channels": 16,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 2, "num_blocks": 2, "input_size": None, "adm_in_channels": POOLED,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}},
    "num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": WIDTH,
    "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [4, 6, 6],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
FAMILIES = {"sd1": ("SD15", UNET), "sdxl": ("SDXL", SDXL), "sd3": ("SD3", SD3), "flux": ("Flux", FLUX)}
"""ComfyUI's class of each, and its network's config."""


def _unet(**options: Any):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH,
        norm_num_groups=32, **options,
    )  # fmt: skip


def _network(family: str) -> nn.Module:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    if family == "sd1":
        return _unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    if family == "sdxl":
        return _unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=POOLED + 6 * 256,
        )  # fmt: skip
    if family == "sd3":
        return SD3Transformer2DModel(
            sample_size=SIZE, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=64,
            num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=128,
            pooled_projection_dim=POOLED, pos_embed_max_size=8,
        )  # fmt: skip
    return FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def given(prompt: str, fixed_length: bool) -> tuple[Tensor, Tensor]:
    """(tokens, WIDTH) and (POOLED,), drawn by the prompt as the stand-in of ComfyUI's CLIP draws them."""
    generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
    tokens = 12 if fixed_length else 4 + len(prompt.split())
    embedding = torch.randn((1, tokens, WIDTH), generator=generator)
    return embedding[0], torch.randn((1, POOLED), generator=generator)[0]


class Twin(DiffusersDenoiser):
    """A denoiser whose prompts are given."""

    def encode_prompts(self, prompts, adapted=False):
        found = [given(prompt, self.family not in ("sd3", "flux")) for prompt in prompts]
        return [embedding for embedding, _ in found] if self.architecture == "stable-diffusion-v1" else found

    def encode_prompt(self, prompt, adapted=False):
        return self.encode_prompts([prompt])[0]


def build(family: str) -> Twin:
    """The twin at seeded weights; what it has of text encoders is never asked."""
    from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler

    channels = 4 if family in ("sd1", "sdxl") else 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _network(family)
        for tensor in network.parameters():
            if tensor.ndim == 1:  # biases and norms that do something
                tensor.data += 0.1 * torch.randn(tensor.shape)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, norm_num_groups=8,
        )  # fmt: skip
    if channels == 4:
        options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        scheduler = DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    text = nn.Identity()
    return Twin(network, text, None, vae, scheduler, text_encoder_2=text, tokenizer_2=None, text_encoder_3=None)
