"""Scores of generated pictures from their embeddings (DreamBench's CLIP-I, CLIP-T and DINO), whatever made those."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mean_pairwise_cosine(generated: Tensor, references: Tensor) -> float:
    """Mean cosine over all pairs of generated (N, D) and reference (M, D) embeddings: CLIP-I and DINO (DreamBooth)."""
    return float((F.normalize(generated, dim=-1) @ F.normalize(references, dim=-1).T).mean())


def text_alignment(pictures: Tensor, prompts: Tensor) -> float:
    """Mean cosine of each picture (N, D) with its own prompt (N, D): CLIP-T."""
    if pictures.shape != prompts.shape:
        raise ValueError(f"pictures is {tuple(pictures.shape)}, prompts {tuple(prompts.shape)}, but they go in pairs")
    return float(F.cosine_similarity(pictures, prompts, dim=-1).mean())
