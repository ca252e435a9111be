"""What tells contents apart: sha256 of tensors and texts, and of what a training is given."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from .dataset import Dataset
from .pictures import References


def digest(*parts: str | Tensor) -> str:
    """sha256 of texts and tensors, with their lengths, shapes and dtypes."""
    made = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            content = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            made.update(f"tensor {tuple(part.shape)} {part.dtype} ".encode())
        else:
            content = part.encode()
            made.update(f"text {len(content)} ".encode())
        made.update(content)
    return made.hexdigest()


def digests(references: References, dataset: Dataset | None = None) -> list[dict[str, str]]:
    """Of each picture its name and the sha256 of its pixels, its mask and its caption, as they are trained on.

    With the `dataset` that was made of them, `latents` too: what the autoencoder made of the pixels.
    """
    parts: dict[str, Any] = {"picture": references.pixels, "mask": references.masks, "caption": references.captions}
    if dataset is not None:
        parts["latents"] = [example.latents for example in dataset.examples]
    given = {kind: each for kind, each in parts.items() if each is not None}
    return [
        {"name": name, **{kind: digest(each[i]) for kind, each in given.items()}}
        for i, name in enumerate(references.names)
    ]
