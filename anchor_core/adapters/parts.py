"""The parts of a layer in adapter files: what each program calls them, which make which kind, and what fits together.

LyCORIS' kinds: arXiv 2309.14859; OFT 2306.07280; BOFT 2311.06243; GLoRA 2306.07967; (IA)^3 2205.05638.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .tokens import is_embedding

Layers = dict[str, dict[str, Tensor]]
"""A module's prefix -> part -> tensor."""

PARTS = {part: part for part in (
    "lora_down.weight", "lora_up.weight", "lora_up.bias", "lora_mid.weight", "lora_magnitude_vector",
    "alpha", "dora_scale", "diff", "diff_b", "set_weight", "reshape_weight", "svd_shift",
    "oft_R.weight", "oft_blocks", "rescale", "on_input", "weight",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight",
    "q_layer.weight", "p_layer.weight", "lambda_layer",
)} | {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_B.bias": "lora_up.bias",
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "w_norm": "diff",
    "b_norm": "diff_b",
}  # fmt: skip
"""The end of a key -> the part that it names."""

_NAMED = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|oft_R)\.[^.]+(?:\.(weight|bias))?")
"""peft's keys with the adapter's name in them: `lora_A.default.weight`, `lora_A.default_0.weight`."""
_PROCESSOR = re.compile(r"(.+\.processor\.)(to_(?:q|k|v|out)|(?:qkv|proj)_lora\d?)(?:_lora)?\.(down|up)\.weight")
"""Keys of attention processors, as diffusers once wrote them and x-flux does."""


def split_key(key: str) -> tuple[str, str | None]:
    """A key as its module's prefix and the name of its part; None if no part of that name is known."""
    words = key.split(".")
    for count in (3, 2, 1):
        part = PARTS.get(".".join(words[-count:])) if len(words) > count else None
        if part is not None and part != "weight":
            return ".".join(words[:-count]), part
    if match := _PROCESSOR.fullmatch(key):
        return match[1] + match[2], f"lora_{match[3]}.weight"
    if match := _NAMED.fullmatch(key):
        part = PARTS.get(f"{match[2]}.{match[3]}" if match[3] else match[2])
        return (match[1], part) if part else (key, None)
    return (".".join(words[:-1]), "weight") if len(words) > 1 and words[-1] == "weight" else (key, None)


def split_layers(tensors: Mapping[str, Tensor]) -> tuple[Layers, list[str]]:
    """The tensors of a file by layer and part, and the keys that name no part of a layer.

    Raises:
        ValueError: if there is no layer at all, or a layer has a part twice.
    """
    if is_embedding(tensors):
        raise ValueError("this file is an embedding, for prompts and not for layers; give a LoRA file")
    layers: Layers = {}
    others = []
    for key, tensor in tensors.items():
        prefix, part = split_key(key)
        if part is None:
            others.append(key)
        elif part in layers.setdefault(prefix, {}):
            raise ValueError(f"this file holds two LoRAs in one: {prefix} has {part} twice; give one with one LoRA")
        else:
            layers[prefix][part] = tensor
    if not layers and not others:
        raise ValueError("this file holds no LoRA: it has no tensor")
    if not layers:
        raise ValueError(f"this file holds no LoRA: {others[0]!r} is no part of a layer; give a LoRA file")
    return layers, others


# --- kinds --------------------------------------------------------------------------------------------------------

_LORA = {"lora_down.weight", "lora_up.weight"}
_KINDS = [
    ("lambda_layer", "tlora", {"lambda_layer"}),
    ("on_input", "ia3", {"weight"}),
    ("lora_magnitude_vector", "dora", _LORA),
    ("lora_", "lora", _LORA),
    ("oft_blocks", "oft_blocks", {"oft_blocks"}),
    ("oft_R", "oft", {"oft_R.weight"}),
    ("lokr_", "lokr", {"lokr_w1", "lokr_w2"}),
    ("hada_", "loha", {"hada_w1", "hada_w2"}),
    ("svd_", "svdiff", {"svd_shift"}),
    ("a1.", "glora", {"a1.weight", "a2.weight", "b1.weight", "b2.weight"}),
    ("set_weight", "set", {"set_weight"}),
    ("diff", "full", set()),
]
"""The beginning of a part that tells the kind, and what a layer of that kind must have; a product's factors `_a` and
`_b` stand for it."""

PIECE = "piece"
"""A part that we add: a layer is (index, count) of a fused layer's parts, whose factors do not divide by rows."""

UNREAD = {
    "tlora": "T-LoRA, whose strength goes by the timestep",
    "set": "a weight that replaces the model's (set_weight)",
}
"""Kinds that are told, and not read."""


def kind_of(prefix: str, parts: Mapping[str, Tensor]) -> str:
    """The kind of a layer, whose parts are whole and fit together: of `KINDS`, of the formulas, or of `UNREAD`.

    Raises:
        ValueError: naming the layer and what is wrong with it.
    """
    present = parts.keys() | {part[:-2] for part in parts if part.endswith("_a") and f"{part[:-2]}_b" in parts}
    told = (each for each in _KINDS if any(part.startswith(each[0]) for part in parts))
    _, kind, needed = next(told, ("", "", set()))
    if not kind:
        raise ValueError(f"this file is no LoRA that can be read: {prefix} has {' and '.join(sorted(parts))} alone")
    if not needed <= present:
        raise ValueError(f"this file is not a whole LoRA: {prefix} lacks {' and '.join(sorted(needed - present))}")
    if kind == "lora" and "dora_scale" in parts:
        kind = "dora"
    if "reshape_weight" in parts or "bm.weight" in parts:
        return "set"
    wrong = _misfit(kind, parts)
    if wrong:
        sizes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items())
        raise ValueError(f"this file is no whole LoRA: {wrong} in {prefix}, which has {sizes}")
    return kind


_DIMENSIONS: Mapping[str, tuple[int, int]] = {
    "lora_down.weight": (2, 5), "lora_up.weight": (2, 5), "lora_mid.weight": (3, 5), "lora_up.bias": (1, 1),
    "lokr_w1": (2, 2), "lokr_w2": (2, 5), "lokr_t2": (3, 5), "hada_t1": (3, 5), "hada_t2": (3, 5),
    "oft_R.weight": (2, 2), "oft_blocks": (3, 4), "svd_shift": (1, 1), "diff": (1, 5), "diff_b": (1, 1),
    "dora_scale": (1, 5), "lora_magnitude_vector": (1, 5), "rescale": (1, 5), "weight": (1, 5),
    **{f"{part}.weight": (2, 5) for part in ("a1", "a2", "b1", "b2")},
    **{f"{part}_{factor}": (2, 2) for part in ("lokr_w1", "lokr_w2", "hada_w1", "hada_w2") for factor in "ab"},
}  # fmt: skip
"""Part -> how few and how many dimensions it may have."""


def _misfit(kind: str, parts: Mapping[str, Tensor]) -> str | None:
    """What does not fit in a layer's parts, in words; None if they do."""
    for part in ("alpha", "on_input"):
        if part in parts and parts[part].numel() != 1:
            return f"{part} has {parts[part].numel()} elements instead of one"
    for part, tensor in parts.items():
        fewest, most = _DIMENSIONS.get(part, (0, 99))
        if not fewest <= tensor.ndim <= most:
            return f"{part} has {tensor.ndim} dimensions"
        if not tensor.numel():
            return f"{part} has no element"
    if "diff" in parts and kind in ("lora", "dora", "loha", "lokr"):
        return "factors and a difference"
    ranks = _RANKS.get(kind, lambda parts: ())(parts)
    if any(len(set(each)) > 1 for each in ranks):
        return "the factors are of different ranks"
    if kind == "loha" and ("hada_t1" in parts) != ("hada_t2" in parts):
        return "one of hada_t1 and hada_t2 is missing"
    if kind == "oft_blocks" and parts["oft_blocks"].shape[-1] != parts["oft_blocks"].shape[-2]:
        return "the blocks are not square"
    return None


def _lora_ranks(parts: Mapping[str, Tensor]) -> Sequence[Sequence[int]]:
    down, up, mid = (parts.get(f"lora_{name}.weight") for name in ("down", "up", "mid"))
    if mid is None:
        return [(down.shape[0], up[0].numel())]
    return [(up[0].numel(), mid.shape[0]), (mid.shape[1], down.shape[0])]


def _product_ranks(names: Sequence[tuple[str, str]]) -> Callable[[Mapping[str, Tensor]], Sequence[Sequence[int]]]:
    def ranks(parts: Mapping[str, Tensor]) -> Sequence[Sequence[int]]:
        found = []
        for name, core in names:
            if f"{name}_a" not in parts or name in parts:
                continue
            one, other = parts[f"{name}_a"], parts[f"{name}_b"]
            if core in parts:  # Tucker's: both factors have the rank first
                found += [(one.shape[0], parts[core].shape[0]), (other.shape[0], parts[core].shape[1])]
            else:
                found.append((one.shape[1], other.shape[0]))
        return found

    return ranks


_RANKS: Mapping[str, Callable[[Mapping[str, Tensor]], Sequence[Sequence[int]]]] = {
    "lora": _lora_ranks,
    "dora": _lora_ranks,
    "lokr": _product_ranks([("lokr_w1", ""), ("lokr_w2", "lokr_t2")]),
    "loha": _product_ranks([("hada_w1", "hada_t1"), ("hada_w2", "hada_t2")]),
}
"""Kind -> of a layer's parts, sizes that must be equal."""


def size_of(kind: str, parts: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of the weight that a layer's parts are for, its columns all but the first dimension; None
    where they do not tell. Nothing is multiplied out."""
    if kind in ("lora", "dora"):
        kernel = parts["lora_mid.weight"][0, 0].numel() if "lora_mid.weight" in parts else 1
        return parts["lora_up.weight"].shape[0], parts["lora_down.weight"][0].numel() * kernel
    if kind == "loha":
        return _product_size(parts, "hada_w1", "hada_t1")
    if kind == "lokr":
        one, other = _product_size(parts, "lokr_w1", ""), _product_size(parts, "lokr_w2", "lokr_t2")
        return one[0] * other[0], one[1] * other[1]
    if kind == "glora" and parts["b1.weight"].shape[1] == parts["b2.weight"].shape[0]:
        return parts["b1.weight"].shape[0], parts["b2.weight"][0].numel()
    if kind == "full" and "diff" in parts:
        return parts["diff"].shape[0], parts["diff"][0].numel()
    return None


def _product_size(parts: Mapping[str, Tensor], name: str, core: str) -> tuple[int, int]:
    if name in parts:
        return parts[name].shape[0], parts[name][0].numel()
    one, other = parts[f"{name}_a"], parts[f"{name}_b"]
    if core in parts:
        return one.shape[1], other.shape[1] * math.prod(parts[core].shape[2:])
    return one.shape[0], other.shape[1]


def scale_of(parts: Mapping[str, Tensor]) -> float:
    """alpha / rank of a LoRA; without alpha it is 1."""
    return float(parts["alpha"]) / parts["lora_down.weight"].shape[0] if "alpha" in parts else 1.0


def row_sizes(rows: int, width: int, count: int) -> list[int]:
    """Rows of each part of a fused layer: of four, q, k and v are as wide as the input, the MLP has the rest.

    Raises:
        ValueError: if a layer of `rows` rows cannot have these.
    """
    sizes = [width] * 3 + [rows - 3 * width] if count == 4 else [rows // count] * count
    if min(sizes) < 1 or sum(sizes) != rows:
        raise ValueError(f"this LoRA was made for another model: {rows} rows are not {count} parts of a fused layer")
    return sizes
