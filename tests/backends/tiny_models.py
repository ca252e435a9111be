"""Tiny models of the real classes at random weights: pictures of 16 x 16 become latents of (4, 8, 8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.conftest import WORDS, build_tokenizer

LATENT = (4, 8, 8)
WIDTH, WIDTH_2, T5_WIDTH = 32, 40, 80
"""Of the text encoders: the CLIPs are told apart by theirs, and SD3's two together are narrower than its T5."""


def build_t5_tokenizer():
    """A T5Tokenizer that knows every letter, and a few whole words."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(chr(code), -5.0) for code in range(33, 127)]
    return T5Tokenizer(
        vocab=[*special, ("\u2581", -5.0), *letters, *((f"\u2581{word}", -1.0) for word in WORDS)], extra_ids=0
    )


def _clip(tokenizer, projected: bool = False, width: int = WIDTH):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _told_apart((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def _t5(tokenizer):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=16, d_ff=T5_WIDTH, num_layers=1, num_heads=2, is_decoder=False
    )
    return _told_apart(T5EncoderModel(config))


def _told_apart(encoder):
    # A random text encoder hardly tells prompts apart; wide embeddings make it do so.
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder.eval()


def _vae(**options: Any):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT[0],
        norm_num_groups=8,
        sample_size=16,
        **options,
    )


def _ddim(**options: Any):
    from diffusers import DDIMScheduler

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **options)


def _stable_diffusion(words: Path, scheduler, **unet: Any):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = build_tokenizer(words)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            norm_num_groups=8,
            **unet,
        ),
        vae=_vae(scaling_factor=0.7),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sd1(words: Path):
    return _stable_diffusion(words, _ddim(), attention_head_dim=4)


def build_sd2_v(words: Path):
    """Predicts v on a schedule of zero terminal SNR, with SD2's linear projections."""
    scheduler = _ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return _stable_diffusion(words, scheduler, attention_head_dim=(2, 4), use_linear_projection=True)


def build_sdxl(words: Path):
    """SDXL's own structure, blocks and layers, so that its names in the original layout are SDXL's."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = build_tokenizer(words)
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 2, 2),
            use_linear_projection=True,
            cross_attention_dim=WIDTH + WIDTH_2,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH_2 + 6 * 8,
        ),
        vae=_vae(scaling_factor=0.13025),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer, projected=True, width=WIDTH_2),
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(words),
        scheduler=EulerDiscreteScheduler.from_config(_ddim().config),
    )


def build_sd3(words: Path, t5: bool = True):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, t5_tokenizer = build_tokenizer(words), build_t5_tokenizer()
    clip = _clip(tokenizer, projected=True)
    torch.nn.init.eye_(clip.text_projection.weight)  # as SD3's is, so that its checkpoints leave it out
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=LATENT[0],
            out_channels=LATENT[0],
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=WIDTH + WIDTH_2,
            pos_embed_max_size=16,
        ),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip,
        text_encoder_2=_clip(tokenizer, projected=True, width=WIDTH_2),
        text_encoder_3=_t5(t5_tokenizer) if t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(words),
        tokenizer_3=t5_tokenizer if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def build_flux(words: Path, guidance_embeds: bool = True):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, t5_tokenizer = build_tokenizer(words), build_t5_tokenizer()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=4 * LATENT[0],
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_t5(t5_tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
    )


BUILDERS = {
    "sd1": build_sd1,
    "sd2_v": build_sd2_v,
    "sdxl": build_sdxl,
    "sd3": build_sd3,
    "flux": build_flux,
}


def build(name: str, folder: Path, seed: int = 0, **options: Any):
    """The tiny pipeline `name`, its tokenizer files below `folder`; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = BUILDERS[name](folder / "words", **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser_of(pipeline):
    """The denoiser over a pipeline's own parts, with whatever LoRA it has loaded."""
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

    parts = {name: part for name, part in pipeline.components.items() if name.startswith(("text_", "tokenizer"))}
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    return DiffusersDenoiser(network, vae=pipeline.vae, scheduler=pipeline.scheduler, **parts)
