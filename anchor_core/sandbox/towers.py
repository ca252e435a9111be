"""Picture encoders and their contrastive training with a text encoder: for the text tower, and for the judge."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stage import Stage, autocast


def as_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


class PictureTower(nn.Module):
    """A small convolutional encoder of 64 px pictures, (B, 3, 64, 64) to unit vectors (B, width)."""

    def __init__(self, width: int = 128, channels: tuple[int, ...] = (32, 64, 128, 192)):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, 2, 1)]
        for before, after in zip(channels, (*channels[1:], channels[-1])):
            layers += [_Residual(before), nn.Conv2d(before, after, 3, 2, 1)]
        self.body = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(8, channels[-1])
        self.head = nn.Linear(channels[-1] * 4, width)

    def features(self, x: Tensor) -> Tensor:
        """Before the projection, (B, 4 C): a 2 x 2 grid of features, so that position is not lost."""
        return F.silu(self.norm(self.body(x))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.features(x)).float(), dim=-1)


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels) for _ in range(2)])
        self.convolutions = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions):
            y = convolution(F.silu(norm(y)))
        return x + y


class Contrast(nn.Module):
    """What contrastive training adds to a text encoder: a picture tower, a projection and the temperature."""

    def __init__(self, hidden: int, width: int = 128, channels: tuple[int, ...] = (32, 64, 128, 192)):
        super().__init__()
        self.pictures = PictureTower(width, channels)
        self.head = nn.Linear(hidden, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.65))


def contrastive_stage(
    stage: Stage, text, contrast: Contrast, clip_tokenizer, pictures, captions, batch: int, prepare=lambda x, rng: x
) -> None:
    """Symmetric cross-entropy over matching pictures and captions (CLIP, Radford et al. 2021, Fig. 3)."""
    device = contrast.scale.device
    for rng in stage:
        index = np.sort(rng.choice(len(pictures), batch, replace=False))
        x = prepare(as_tensor(pictures[index]).to(device), rng)
        texts = [captions[i][rng.integers(len(captions[i]))] for i in index]
        tokens = clip_tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        with autocast(device):
            pooled = text(input_ids=tokens.input_ids).pooler_output
            a = F.normalize(contrast.head(pooled).float(), dim=-1)
            b = contrast.pictures(x)
        logits = contrast.scale.exp().clamp(max=60) * a @ b.T
        labels = torch.arange(batch, device=device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        stage.descend(loss, accuracy=(logits.argmax(1) == labels).float().mean().item())
