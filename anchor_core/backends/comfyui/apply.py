"""Adapters in a MODEL, as ComfyUI applies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter
from torch import Tensor

from ...adapters.tokens import is_embedding
from ...checks import check_number

TEXT_PREFIXES = ("lora_te", "text_encoder")


def apply_adapter(model, tensors: Mapping[str, Tensor], strength: float, clip=None) -> tuple:
    """Clones of a MODEL and its CLIP with a LoRA's tensors patched in, as the stock LoraLoader does it.

    Without a CLIP the second is None.

    Raises:
        ValueError: the LoRA was made for another model, which the stock loader only logs; or it adapts the text encoder
            as well, and there is no CLIP.
    """
    check_number("strength", strength)
    if is_embedding(tensors):
        raise ValueError("this is an embedding; put its file among the embeddings and write embedding:name in a prompt")
    if clip is None and any(key.startswith(TEXT_PREFIXES) for key in tensors):
        raise ValueError("clip is not connected, but this LoRA adapts the text encoder too; connect the model's CLIP")
    patches = adapter_patches(model, tensors, clip)
    patched = [each if each is None else each.clone() for each in (model, clip)]
    for each in patched:
        if each is not None:
            each.add_patches(patches, strength)
    return tuple(patched)


def adapter_patches(model, tensors: Mapping[str, Tensor], clip=None) -> dict[str | tuple, Any]:
    """What `add_patches` of a MODEL, and of its CLIP, takes for a LoRA's tensors; ValueError as `apply_adapter`."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = dict(model.model.state_dict())
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
        weights |= clip.cond_stage_model.state_dict()
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), keys, log_missing=False)
    if not patches:
        raise ValueError("this LoRA was made for another model: none of its layers is in this one")
    for key, patch in patches.items():
        made = _update_size(patch) if isinstance(key, str) else None
        if made is not None and made != (own := (len(weights[key]), weights[key][0].numel())):
            raise ValueError(f"this LoRA was made for another model: {key} is {own} here and {made} there")
    return patches


def _update_size(patch) -> tuple[int, int] | None:
    """Rows and columns of the update that a LoRA, LoHa or LoKr makes, where its factors tell."""
    if isinstance(patch, LoKrAdapter):
        one, other, _, *decomposed, tucker, _ = patch.weights
        pairs = ((one, *decomposed[:2]), (other, *decomposed[2:]))
        shapes = [(a.shape[0], b[0].numel()) if full is None else (len(full), full[0].numel()) for full, a, b in pairs]
        size = shapes[0][0] * shapes[1][0], shapes[0][1] * shapes[1][1]
    elif isinstance(patch, (LoRAAdapter, LoHaAdapter)):
        tucker = patch.weights[3 if isinstance(patch, LoRAAdapter) else 5]
        size = patch.weights[0].shape[0], patch.weights[1][0].numel()
    else:
        return None
    return size if tucker is None else None
