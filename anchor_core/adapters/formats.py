"""Key formats of adapter files, and the conversion between them.

- `comfyui`: `lora_unet_<name>` for UNets, `diffusion_model.<name>` for transformers (the original names, with fused
  projections), each with `.lora_down.weight`, `.lora_up.weight` and `.alpha`; text encoders `lora_te_`, or `lora_te1_`
  and `lora_te2_`.
- `kohya`: the same, but `lora_unet_<name>` for transformers too.
- `diffusers`: `unet.`, `transformer.` and `text_encoder.` before diffusers' names, with `.lora_A.weight` and
  `.lora_B.weight`, into which alpha is folded.

UNets go by diffusers' names in `comfyui` and `kohya` files of SD1 and SD2, by the original ones in those of SDXL.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import check_choice
from .names import dotted, network_family, swapped_rows, to_diffusers, to_original
from .tokens import is_embedding

FORMATS = ("comfyui", "kohya", "diffusers")
DIFFUSERS_PREFIXES = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")

_PARTS = {
    "lora_down.weight": "lora_down.weight",
    "lora_up.weight": "lora_up.weight",
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
} | {
    part: part
    for part in (
        *("alpha", "dora_scale", "lora_magnitude_vector", "oft_R.weight", "svd_shift", "diff", "diff_b"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    )
}
# Parts that tell the kind, and what a layer of that kind must have; factors `_a` and `_b` stand for their product.
_LORA = {"lora_down.weight", "lora_up.weight"}
_KINDS = [
    ("lora_magnitude_vector", "dora", _LORA),
    ("dora_scale", "dora", _LORA),
    ("lora_", "lora", _LORA),
    ("oft_", "oft", {"oft_R.weight"}),
    ("lokr_", "lokr", {"lokr_w1", "lokr_w2"}),
    ("hada_", "loha", {"hada_w1", "hada_w2"}),
    ("svd_", "svdiff", {"svd_shift"}),
    ("diff", "full", {"diff"}),
]

# Which network a key is of: the denoiser's by "", a text encoder by diffusers' component name.
_PREFIXES = {
    "lora_unet_": "",
    "lora_transformer_": "",
    "diffusion_model.": "",
    "unet.": "",
    "transformer.": "",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}

STATED = "lora_adapter_metadata"  # where diffusers writes peft's config
Layers = dict[str, dict[str, Tensor]]


def split_key(key: str) -> tuple[str, str | None]:
    """A key as its module's prefix and the name of its part; None if no part of that name is known."""
    for suffix, part in _PARTS.items():
        if key.endswith(f".{suffix}"):
            return key[: -len(suffix) - 1], part
    return key, None


def split_layers(tensors: Mapping[str, Tensor]) -> Layers:
    """The tensors of a file as prefix -> part -> tensor, in any of the formats.

    Raises:
        ValueError: if there is none, or one is no part of an adapter that can be read.
    """
    layers: Layers = {}
    if is_embedding(tensors):
        raise ValueError("this file is an embedding, for prompts and not for layers; give a LoRA file")
    for key, tensor in tensors.items():
        prefix, part = split_key(key)
        if part is None:
            raise ValueError(f"this LoRA was made for another model: {key} belongs to no module of this network")
        layers.setdefault(prefix, {})[part] = tensor
    if not layers:
        raise ValueError("this file holds no LoRA: it has no tensor")
    return layers


def kind_of(prefix: str, parts: Mapping[str, Tensor]) -> str:
    """The kind of adapter that a layer's parts make; ValueError if they are not whole."""
    present = parts.keys() | {part[:-2] for part in parts if part.endswith("_a") and f"{part[:-2]}_b" in parts}
    for beginning, kind, needed in _KINDS:
        if any(part.startswith(beginning) for part in parts):
            if needed <= present:
                return kind
            raise ValueError(f"this file is not a whole LoRA: {prefix} lacks {' and '.join(sorted(needed - present))}")
    raise ValueError(f"this file is no LoRA that can be read: {prefix} has {' and '.join(sorted(parts))} alone")


def format_of(prefixes: list[str]) -> str:
    """The format of a file with these prefixes."""
    for format, beginnings in {"diffusers": ("unet.", "transformer."), "comfyui": ("diffusion_model.",)}.items():
        if any(prefix.startswith(beginnings) for prefix in prefixes):
            return format
    return "kohya"


def with_stated_alphas(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a diffusers file with an `.alpha` for each layer whose alpha only the metadata states."""
    stated, result = json.loads(metadata.get(STATED, "{}")), dict(tensors)
    for prefix, parts in split_layers(tensors).items() if stated else ():
        component, _, name = prefix.partition(".")
        alpha = stated.get(f"{component}.lora_alpha")
        if alpha is None or "alpha" in parts or "lora_down.weight" not in parts:
            continue
        patterns = stated.get(f"{component}.alpha_pattern") or {}
        alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), alpha)
        if stated.get(f"{component}.use_rslora"):
            alpha *= math.sqrt(parts["lora_down.weight"].shape[0])
        result[f"{prefix}.alpha"] = torch.tensor(float(alpha))
    return result


def diffusers_form(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a LoRA under diffusers' names: alpha / rank goes into B. Other kinds stay as they are."""
    if "lora_down.weight" not in parts:
        return dict(parts)
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    rest = {
        part: tensor for part, tensor in parts.items() if part not in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    return {"lora_A.weight": down, "lora_B.weight": up * scale_of(parts), **rest}


def scale_of(parts: Mapping[str, Tensor]) -> float:
    """alpha / rank of a LoRA; without alpha it is 1."""
    return float(parts["alpha"]) / parts["lora_down.weight"].shape[0] if "alpha" in parts else 1.0


def convert(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, to: str) -> dict[str, Tensor]:
    """An adapter file's tensors in another format, of the same effect.

    A LoRA on a fused projection splits exactly (the rows of `up`, with the same `down`), and separate ones fuse
    exactly into block form of the sum of their ranks; splitting such a one gives back the separate ones.

    Args:
        tensors: in any of `FORMATS`, of SD1, SD2, SDXL, SD3 or Flux.
        metadata: the file's; its `modelspec.architecture` is asked where names and shapes do not tell, and its
            alphas are taken where diffusers stated them there.
        to: one of `FORMATS`.

    Raises:
        ValueError: if a key is not understood, or the adapter's kind has no form in that format.
    """
    check_choice("to", to, FORMATS)
    for prefix, parts in split_layers(tensors).items():
        kind = kind_of(prefix, parts)
        if to == "diffusers" and kind != "lora" or kind == "dora" and "dora_scale" not in parts:
            raise ValueError(f"to is {to!r}, but this is a {kind} file, and {_NOT_CONVERTED[kind]}")
    return renamed(tensors, metadata, to)


def renamed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, to: str) -> dict[str, Tensor]:
    """As `convert`, for our own reading: under the names of a format, whether its programs read the kind or not."""
    layers = split_layers(with_stated_alphas(tensors, metadata or {}))
    for parts in layers.values():
        parts.pop("lora_magnitude_vector", None)
    named: dict[str, Layers] = {}
    for prefix, parts in layers.items():
        component, name = _component(prefix)
        named.setdefault(component, {})[name] = parts
    network = named.pop("", {})
    family = network_family(network, (metadata or {}).get("modelspec.architecture", ""), "text_encoder_2" in named)
    if to == "diffusers":
        network, prefix = _split_all(network, family), "unet." if family in ("sd", "sdxl") else "transformer."
    elif family == "sd":
        network, prefix = {to_diffusers(name, family)[0]: parts for name, parts in network.items()}, "lora_unet_"
    else:
        network, prefix = _fuse_all(network, family), "lora_unet_"
        if to == "comfyui" and family != "sdxl":
            prefix = "diffusion_model."
    result = _joined(network, prefix)
    one = family == "sd" and not any(prefix.startswith("lora_te1_") for prefix in layers)
    for component, parts in named.items():
        prefix = f"{component}."
        if to != "diffusers":
            prefix = "lora_te_" if one else {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
        result |= _joined(parts, prefix)
    return result


_NOT_CONVERTED = {
    "dora": "its magnitudes depend on the base weights, so that they cannot be rewritten without the model",
    "lokr": "diffusers reads LoRA only",
    "loha": "diffusers reads LoRA only",
    "oft": "diffusers reads LoRA only",
    "full": "diffusers reads LoRA only",
    "svdiff": "diffusers reads LoRA only",
}


def _component(prefix: str) -> tuple[str, str]:
    for beginning, component in _PREFIXES.items():
        if prefix.startswith(beginning):
            name = prefix[len(beginning) :]
            return component, name if "." in beginning else dotted(name)
    raise ValueError(f"this file is in no known format: {prefix} is of neither ComfyUI's, kohya's nor diffusers' keys")


def _joined(layers: Layers, prefix: str) -> dict[str, Tensor]:
    """File keys again. Every tensor of its own memory, as safetensors wants them."""
    tensors = {}
    for name, parts in layers.items():
        if "." not in prefix:
            name = name.replace(".", "_")
        else:
            parts = parts if prefix == "diffusion_model." else diffusers_form(parts)
        if "lora_down.weight" in parts:
            parts = {"alpha": torch.tensor(float(parts["lora_down.weight"].shape[0])), **parts}
        tensors |= {f"{prefix}{name}.{part}": tensor.clone().contiguous() for part, tensor in parts.items()}
    return tensors


def _split_all(layers: Layers, family: str) -> Layers:
    result: Layers = {}
    for name, parts in layers.items():
        names = to_diffusers(name, family)
        pieces = [swapped_rows(parts, name, family)] if len(names) == 1 else _split(parts, len(names))
        result |= {name: piece for name, piece in zip(names, pieces, strict=True) if piece is not None}
    return result


def _fuse_all(layers: Layers, family: str) -> Layers:
    result: Layers = {}
    groups: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, parts in layers.items():
        original, index = to_original(name, family)
        if index is None:
            result[original] = parts if original == name else swapped_rows(parts, original, family)
        else:
            result.setdefault(original, {})  # keeps the order
            groups.setdefault(original, {})[index] = parts
    for original, pieces in groups.items():
        result[original] = _fuse(original, pieces, len(to_diffusers(original, family)))
    return result


def _split(parts: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor] | None]:
    """One fused layer's as `count` separate ones; None for a LoRA that is 0 while others are not."""
    if "diff" in parts:
        sizes = _sizes(*parts["diff"].shape[:2], count)
        rows = {part: tensor.split(sizes) for part, tensor in parts.items()}
        return [{part: pieces[index] for part, pieces in rows.items()} for index in range(count)]
    if "lora_down.weight" not in parts:
        raise ValueError("a fused layer's adapter of this kind cannot be split")
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    rows = up.split(_sizes(up.shape[0], down.shape[1], count))
    used = [piece.flatten(1).any(0) for piece in rows]  # (rank,) each
    block_form = torch.stack(used).sum(0).eq(1).all()  # every rank serves one part alone
    scale = scale_of(parts)
    pieces: list[dict[str, Tensor] | None] = []
    for piece, mask in zip(rows, used, strict=True):
        if not block_form:
            mask = torch.ones_like(mask)
        rank = int(mask.sum())
        alpha = {"alpha": torch.tensor(scale * rank)} if "alpha" in parts else {}
        made = {"lora_down.weight": down[mask], "lora_up.weight": piece[:, mask], **alpha}
        pieces.append(made if rank else None)
    return pieces


def _sizes(rows: int, width: int, count: int) -> list[int]:
    """Rows of each part of a fused layer: of four, q, k and v are as wide as the input, the MLP has the rest."""
    return [width] * 3 + [rows - 3 * width] if count == 4 else [rows // count] * count


def _fuse(name: str, pieces: Mapping[int, Mapping[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Separate LoRAs as the fused one: with one `down` if theirs are equal, else in block form; of full, their rows."""
    kinds = {kind_of(name, piece) for piece in pieces.values()}
    if kinds == {"full"}:
        return _fuse_rows(pieces, count)
    if kinds != {"lora"}:
        kind = min(kinds - {"lora"})
        raise ValueError(f"{name} is one fused layer there, and {kind} factors of its parts cannot be fused")
    order = sorted(pieces)
    downs = [pieces[index]["lora_down.weight"] for index in order]
    ups = {index: pieces[index]["lora_up.weight"] for index in order}
    scales = {index: scale_of(pieces[index]) for index in order}
    width = downs[0].shape[1]
    if len(set(scales.values())) > 1:
        ups, scales = {index: up * scales[index] for index, up in ups.items()}, dict.fromkeys(order, 1.0)
    shared = len(order) == count and all(torch.equal(down, downs[0]) for down in downs)
    sizes = _rows_of(ups, width, count)
    down = downs[0] if shared else torch.cat(downs)
    up = down.new_zeros(sum(sizes), down.shape[0])
    column = 0
    for index, piece in ups.items():
        row = sum(sizes[:index])
        up[row : row + sizes[index], column : column + piece.shape[1]] = piece
        column += 0 if shared else piece.shape[1]
    alpha = torch.tensor(scales[order[0]] * down.shape[0])
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}


def _fuse_rows(pieces: Mapping[int, Mapping[str, Tensor]], count: int) -> dict[str, Tensor]:
    """The changes of separate layers' weights and biases as that of the fused layer, 0 where one is not changed."""
    weights = {index: piece["diff"] for index, piece in pieces.items()}
    sizes = _rows_of(weights, next(iter(weights.values())).shape[1], count)
    result = {}
    for part in ("diff", "diff_b"):
        held = {index: piece[part] for index, piece in pieces.items() if part in piece}
        if held:
            like = next(iter(held.values()))
            rows = [held.get(index, like.new_zeros(size, *like.shape[1:])) for index, size in enumerate(sizes)]
            result[part] = torch.cat(rows)
    return result


def _rows_of(held: Mapping[int, Tensor], width: int, count: int) -> list[int]:
    """Rows of each of a fused layer's parts; of one that is not held, those that it has with an input of `width`."""
    sizes = [width] * 3 + [4 * width] if count == 4 else [next(iter(held.values())).shape[0]] * count
    return [held[index].shape[0] if index in held else size for index, size in enumerate(sizes)]
