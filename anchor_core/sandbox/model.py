"""The embedded model: SD1.5's classes at a small size, in diffusers' folder layout."""

from __future__ import annotations

from pathlib import Path

import torch

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped model, a folder that `StableDiffusionPipeline.from_pretrained` reads."""

PICTURE_SIZE = 64

UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 4,  # the number of heads, by diffusers' SD1.5 convention
    "norm_num_groups": 16,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "encoder_block_out_channels": (32, 32, 32),
    "decoder_block_out_channels": (64, 64, 64),
    "num_encoder_blocks": (1, 2, 2),
    "num_decoder_blocks": (3, 3, 2),
    "scaling_factor": 1.0,  # set from the latents' standard deviation when the autoencoder has been trained
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 128,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.025,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build(tokenizer, seed: int = 0) -> dict[str, torch.nn.Module]:
    """The parts of the model at random weights: `unet`, `vae`, `text_encoder`, in float32."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **TEXT,
        )
        return {
            "unet": UNet2DConditionModel(**UNET),
            "vae": AutoencoderTiny(**VAE),
            "text_encoder": CLIPTextModel(text),
        }


def save(parts: dict[str, torch.nn.Module], tokenizer, folder: Path) -> None:
    """Write the model as a diffusers folder in float16."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors.torch import load_file, save_file

    pipeline = StableDiffusionPipeline(
        **{name: part.half() for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    # Every version of transformers finds these names; 5.0 does not find those of now, and fills the tower at random.
    file = folder / "text_encoder" / "model.safetensors"
    named = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})
