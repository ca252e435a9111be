"""Adapters in a MODEL, as ComfyUI applies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor, nn

from ...adapters.formulas import SCALARS, adapted, check_size, on_rows
from ...adapters.parts import scale_of, split_key
from ...adapters.prefixes import identity, module_of
from ...adapters.reading import divides_by_adapted_norm, read_layers, tell_unread
from ...adapters.tokens import is_embedding
from ...checks import check_number


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
    if clip is None and any(_is_text(split_key(key)[0]) for key in tensors):
        raise ValueError("clip is not connected, but this LoRA adapts the text encoder too; connect the model's CLIP")
    patches = adapter_patches(model, tensors, clip)
    patched = [each if each is None else each.clone() for each in (model, clip)]
    for each in patched:
        if each is not None:
            each.add_patches(patches, strength)
    return tuple(patched)


def adapter_patches(model, tensors: Mapping[str, Tensor], clip=None) -> dict[str | tuple, Any]:
    """What `add_patches` of a MODEL, and of its CLIP, takes for a LoRA's tensors.

    Layers of text encoders are left out where there is no CLIP; which others are, because the model has no such, is
    logged.

    Raises:
        ValueError: as `apply_adapter`.
    """
    metadata = getattr(tensors, "metadata", None) or {}
    # ComfyUI reads `set_weight` and `reshape_weight` itself.
    layers, kinds, unread = read_layers(comfy.lora_convert.convert_lora(dict(tensors)), metadata, also=("set",))
    if clip is None:
        layers = {prefix: parts for prefix, parts in layers.items() if not _is_text(prefix)}
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = _weights(model.model)
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
        weights |= _weights(clip.cond_stage_model)
    places = _places(layers, keys)
    unread += [prefix for prefix in layers if prefix not in places]
    by_adapted_norm = divides_by_adapted_norm(metadata)
    patches: dict[str | tuple, Any] = {}
    for prefix, key in places.items():
        kind, parts, to = kinds[prefix], layers[prefix], keys[key]
        shape = _shape(weights, to)
        if kind != "set" and shape is not None:
            check_size(kind, parts, torch.empty(shape, device="meta"), prefix)
        made = comfy.lora.load_lora(_stock_parts(key, parts, shape), {key: to}, log_missing=False)
        if shape is not None and not _is_stock(kind, parts, shape, by_adapted_norm):
            made[to] = FileLayer.of(kind, parts, by_adapted_norm)
        if (change := _bias_change(parts)) is not None:
            made[_bias(to)] = ("diff", (change,))
        if not made:  # of peft's OFT, say, ComfyUI reads nothing
            unread.append(prefix)
        for place, patch in made.items():
            name = place if isinstance(place, str) else place[0]
            if name not in weights:
                raise ValueError(f"this LoRA was made for another model: {prefix} changes {name}, which it has not")
            patches[place] = patch
    tell_unread(len(layers.keys() - set(unread)), unread)
    if not patches:
        raise ValueError("this LoRA was made for another model: none of its layers is in this one")
    return patches


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """By name; quantised ones have the shape of what they stand for, which those of a state dict have not."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _is_text(prefix: str) -> bool:
    found = module_of(prefix)
    return found is not None and found[0] != ""


def _places(layers: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, str]:
    """The file's prefixes that name a weight of the model, to the stock loader's spelling of them."""
    places = {prefix: prefix for prefix in layers if prefix in keys}
    if len(places) < len(layers):
        by_identity = {name: key for key in keys if (name := identity(key)) is not None}
        for prefix in layers.keys() - places.keys():
            if (name := identity(prefix)) in by_identity:
                places[prefix] = by_identity[name]
    return places


def _shape(weights: Mapping[str, Tensor], to: str | tuple) -> tuple[int, ...] | None:
    """Of the weight, or the part of it, that a patch is for."""
    name, offset = (to, None) if isinstance(to, str) else (to[0], to[1])
    shape = list(weights[name].shape) if name in weights else None
    if shape and offset is not None:
        shape[offset[0]] = offset[2]
    return tuple(shape) if shape else None


def _stock_parts(key: str, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None) -> dict[str, Tensor]:
    """A layer's parts as the stock loader spells them, without those for the bias."""
    spelled = {f"{key}.{part}": tensor for part, tensor in parts.items() if part not in ("lora_up.bias", "diff_b")}
    if "diff" in parts and shape is not None:
        spelled[f"{key}.diff"] = parts["diff"].reshape(shape)  # the stock loader takes no other shape
    return spelled


def _bias_change(parts: Mapping[str, Tensor]) -> Tensor | None:
    return parts["lora_up.bias"] * scale_of(parts) if "lora_up.bias" in parts else parts.get("diff_b")


def _bias(to: str | tuple) -> str | tuple:
    """Where the bias is whose weight is at `to`, or the part of it."""
    name, *rest = (to,) if isinstance(to, str) else to
    name = f"{name.removesuffix('.weight')}.bias"
    return (name, *rest) if rest else name


def _is_stock(kind: str, parts: Mapping[str, Tensor], shape: tuple[int, ...], by_adapted_norm: bool) -> bool:
    """Whether the stock loader makes of a layer what its writer meant."""
    if kind in ("glora", "ia3", "oft_blocks") or not parts.keys().isdisjoint(("hada_t1", "lokr_t2", "lora_mid.weight")):
        return False
    if "dora_scale" in parts:
        return not (by_adapted_norm and on_rows(parts["dora_scale"], torch.empty(shape, device="meta")))
    return "lora_magnitude_vector" not in parts


class FileLayer(WeightAdapterBase):
    """A layer that the stock loader reads otherwise than its writer, or not at all, by our formulas."""

    name = "anchor"

    def __init__(self, loaded_keys: set[str], weights: tuple):
        # ComfyUI makes a copy of these arguments with `weights` on another device.
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, kind: str, parts: Mapping[str, Tensor], by_adapted_norm: bool) -> FileLayer:
        numbers = {part: float(parts[part]) for part in SCALARS if part in parts}
        tensors = {part: tensor for part, tensor in parts.items() if part not in SCALARS}
        return cls(set(), (kind, by_adapted_norm, tuple(numbers.items()), tuple(tensors), tuple(tensors.values())))

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=None, original_weight=None
    ):
        kind, by_adapted_norm, numbers, names, tensors = self.weights
        parts = {**{part: torch.tensor(number) for part, number in numbers}, **dict(zip(names, tensors))}
        plain = weight.float()
        weight += function((strength * (adapted(kind, parts, plain, by_adapted_norm) - plain)).to(weight.dtype))
        return weight
