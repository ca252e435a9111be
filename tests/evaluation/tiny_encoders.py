"""CLIP, DINO and DINOv2 of the real classes at a tiny size."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.conftest import build_tokenizer


def save_encoders(root: Path) -> Path:
    """`clip`, `dino` and `dinov2` in `root`, at random weights, in transformers' layout."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    tokenizer = build_tokenizer(root / "words")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {
            "clip": CLIPModel(clip),
            "dino": ViTModel(ViTConfig(**small, image_size=28, patch_size=7), add_pooling_layer=False),
            "dinov2": Dinov2Model(Dinov2Config(**{**small, "mlp_ratio": 2}, image_size=56, patch_size=14)),
        }
    for name, model in models.items():
        model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "clip")
    return root
