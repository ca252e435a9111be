"""Weights with a layer of an adapter file in them, for the kinds that no layer of peft's or ours computes.

W (out, in, ...) is the module's own weight in float32; what a kind makes of it is its writer's definition: LyCORIS'
(arXiv 2309.14859), which ComfyUI's loader follows but where it says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .parts import PIECE, kind_of, row_sizes, scale_of, size_of

Parts = Mapping[str, Tensor]
SCALARS = ("alpha", "on_input", PIECE)
"""Parts that are numbers, and stay on the CPU."""


def adapted(kind: str, parts: Parts, weight: Tensor, by_adapted_norm: bool = False) -> Tensor:
    """The weight that a layer's parts make of `weight`, of its shape.

    Args:
        kind: of `kind_of`.
        parts: that fit the weight (`size_of`).
        weight: (out, in, ...), float32.
        by_adapted_norm: of `dora_scale` by output row, whether it is over the norm of the adapted weight
            (`divides_by_adapted_norm`).

    Raises:
        ValueError: if parts and weight do not fit; says their sizes.
    """
    parts = {part: tensor if part in SCALARS else tensor.to(weight) for part, tensor in parts.items()}
    if PIECE in parts:
        return _pieces(parts, weight, by_adapted_norm)
    try:
        made = _FORMULAS[kind](parts, weight)
        if "dora_scale" in parts:
            made = decomposed(parts["dora_scale"], made, weight, by_adapted_norm)
        elif "lora_magnitude_vector" in parts:  # peft's, of output rows whatever its shape
            made = decomposed(parts["lora_magnitude_vector"].flatten(), made, weight, True)
        return made.reshape(weight.shape)
    except (RuntimeError, IndexError) as error:  # torch's words for sizes that do not fit
        sizes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items())
        raise ValueError(f"a weight of {tuple(weight.shape)} does not go with {sizes}") from error


def on_rows(scale: Tensor, weight: Tensor) -> bool:
    """Whether a magnitude is of output rows, (out, 1, ...) or (out,), and not of input channels, (1, in, ...)."""
    return scale.shape[0] == weight.shape[0]


def decomposed(scale: Tensor, made: Tensor, weight: Tensor, by_adapted_norm: bool) -> Tensor:
    """DoRA (arXiv 2402.09353): `made` with each output row, or each input channel, brought to `scale`.

    Over input channels every program divides by the norm of `made`.
    """
    rows = on_rows(scale, weight)
    made = made.reshape(weight.shape)
    divisor = made if by_adapted_norm or not rows else weight
    kept = 0 if rows else 1
    others = [axis for axis in range(weight.ndim) if axis != kept]
    shape = [-1 if axis == kept else 1 for axis in range(weight.ndim)]
    norm = torch.linalg.vector_norm(divisor, dim=others, keepdim=True) + torch.finfo(weight.dtype).eps
    return made * (scale.reshape(shape) / norm)


# --- what each kind adds, or turns the weight into ----------------------------------------------------------------


def plain_lora(parts: Parts) -> dict[str, Tensor]:
    """A LoRA's parts without Tucker's core, which goes into `lora_down`: (rank, rank', ...) with (rank', in)."""
    if "lora_mid.weight" not in parts:
        return dict(parts)
    mid, down = parts["lora_mid.weight"], parts["lora_down.weight"].flatten(1)
    rest = {part: tensor for part, tensor in parts.items() if part != "lora_mid.weight"}
    merged = torch.einsum("mn...,ni->mi...", mid.float(), down.float())
    if "alpha" in parts:  # alpha counts over the rank of lora_down, which is now mid's
        rest["alpha"] = parts["alpha"].float() * mid.shape[0] / down.shape[0]
    return {**rest, "lora_down.weight": merged}


def _lora(parts: Parts, weight: Tensor) -> Tensor:
    parts = plain_lora(parts)
    update = parts["lora_up.weight"].flatten(1) @ parts["lora_down.weight"].flatten(1)
    return weight + scale_of(parts) * update.reshape(weight.shape)


def _product(parts: Parts, name: str, core: str) -> Tensor:
    """A factor, or what its two make, with Tucker's core between them."""
    if name in parts:
        return parts[name]
    one, other = parts[f"{name}_a"], parts[f"{name}_b"]
    return torch.einsum("ij...,ip,jr->pr...", parts[core], one, other) if core in parts else one @ other


def _loha(parts: Parts, weight: Tensor) -> Tensor:
    one, other = _product(parts, "hada_w1", "hada_t1"), _product(parts, "hada_w2", "hada_t2")
    scale = float(parts["alpha"]) / parts["hada_w1_b"].shape[0] if "alpha" in parts else 1.0
    return weight + scale * (one * other).reshape(weight.shape)


def lokr_factors(parts: Parts) -> tuple[Tensor, Tensor]:
    """LoKr's two full factors, the first with alpha / rank in it; where both are full in the file, alpha is unused."""
    one, other = _product(parts, "lokr_w1", ""), _product(parts, "lokr_w2", "lokr_t2")
    rank = next((parts[part].shape[0] for part in ("lokr_w2_b", "lokr_w1_b") if part in parts), None)
    scale = float(parts["alpha"]) / rank if rank and "alpha" in parts else 1.0
    return scale * one.float(), other.float().contiguous()  # as torch.kron wants it


def _lokr(parts: Parts, weight: Tensor) -> Tensor:
    one, other = lokr_factors(parts)
    one = one.reshape(*one.shape, *[1] * (other.ndim - 2))
    return weight + torch.kron(one, other).reshape(weight.shape)


def _glora(parts: Parts, weight: Tensor) -> Tensor:
    """W + alpha / rank (W A + B), A = a1 a2, B = b1 b2; the first LyCORIS wrote them the other way round."""
    a1, a2, b1, b2 = (parts[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    width = weight.shape[1]
    if a1.shape[0] != width or (b1.shape[0] != weight.shape[0] and b2.shape[0] == weight.shape[0]):
        a1, a2, b1, b2 = a2, a1, b2, b1
    scale = float(parts["alpha"]) / a1.shape[1] if "alpha" in parts else 1.0
    by_input = torch.einsum("oi...,ij->oj...", weight, a1)
    return weight + scale * (torch.einsum("oj...,ji->oi...", by_input, a2) + (b1 @ b2).reshape(weight.shape))


def _rotations(blocks: Tensor, constraint: float) -> Tensor:
    """Cayley's (I + Q)(I - Q)^-1 of each block, Q = B - B^T, kept within `constraint` where that is above 0."""
    skew = blocks - blocks.mT
    norm = skew.norm() + 1e-8
    if 0 < constraint < norm:
        skew = skew * (constraint / norm)
    unit = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return (unit + skew) @ torch.linalg.inv(unit - skew)


def _oft_blocks(parts: Parts, weight: Tensor) -> Tensor:
    """LyCORIS' Diag-OFT (blocks of output rows), and BOFT, whose stages i mix rows within 2^i block sizes."""
    blocks, size = parts["oft_blocks"], parts["oft_blocks"].shape[-1]
    # Its alpha is the constraint, over the output rows.
    turn = _rotations(blocks, float(parts["alpha"]) * weight.shape[0] if "alpha" in parts else 0.0)
    if blocks.ndim == 3:
        made = torch.einsum("knm,kn...->km...", turn, weight.unflatten(0, (-1, size))).flatten(0, 1)
    else:
        made = weight
        for stage, each in enumerate(turn):
            half = 2**stage * (size // 2)
            made = made.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
            made = torch.einsum("bij,bj...->bi...", each, made).flatten(0, 1)
            made = made.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    return made * parts["rescale"].reshape(-1, *[1] * (weight.ndim - 1)) if "rescale" in parts else made


def _ia3(parts: Parts, weight: Tensor) -> Tensor:
    shape = [1] * weight.ndim
    shape[1 if bool(parts["on_input"].item()) else 0] = -1
    return weight * (1 + parts["weight"].reshape(shape))


def _full(parts: Parts, weight: Tensor) -> Tensor:
    return weight + parts["diff"].reshape(weight.shape) if "diff" in parts else weight


def _difference(parts: Parts, weight: Tensor) -> Tensor:
    """Of our OFT and SVDiff, whose files hold the change of the weight beside what trained."""
    if "diff" not in parts:
        raise ValueError(f"{' and '.join(sorted(parts))} do not go together without diff")
    return _full(parts, weight)


_FORMULAS = {
    "oft": _difference,
    "svdiff": _difference,
    "lora": _lora,
    "dora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft_blocks": _oft_blocks,
    "ia3": _ia3,
    "full": _full,
}


def _pieces(parts: Parts, weight: Tensor, by_adapted_norm: bool) -> Tensor:
    """A fused layer of separate ones' parts (`<index>/<part>`), or a piece of one whose factors do not divide."""
    index, count = parts[PIECE].tolist()
    width = weight.shape[1]
    rest = {part: tensor for part, tensor in parts.items() if part != PIECE}
    if not any("/" in part for part in rest):
        kind = kind_of("a fused layer", rest)
        rows, columns = size_of(kind, rest)
        if (columns, rows) != (width, sum(sizes := row_sizes(rows, columns, count))) or sizes[index] != len(weight):
            raise ValueError(f"a weight of {tuple(weight.shape)} is no part of a fused one of {rows} rows")
        whole = adapted(kind, rest, weight.new_zeros(rows, columns))
        return weight + whole.split(sizes)[index]
    made = list(weight.split(row_sizes(len(weight), width, count)))
    for place in {int(part.partition("/")[0]) for part in rest}:
        own = {part.partition("/")[2]: tensor for part, tensor in rest.items() if part.startswith(f"{place}/")}
        kind = kind_of("a part of a fused layer", own)
        check_size(kind, own, made[place])
        made[place] = adapted(kind, own, made[place], by_adapted_norm)
    return torch.cat(made)


def check_size(kind: str, parts: Parts, weight: Tensor, name: str = "a layer") -> None:
    """ValueError, before anything is multiplied out, if parts are for a weight of another size."""
    if PIECE in parts:
        return
    made, own = size_of(kind, parts), (weight.shape[0], math.prod(weight.shape[1:])) if weight.ndim else (1, 1)
    if made is not None and made != own:
        raise ValueError(f"this LoRA was made for another model: {name} is {own} here and {made} there")
    rows, channels = own[0], weight.shape[1] if weight.ndim > 1 else 1
    takes = {
        "dora_scale": (rows, channels), "lora_magnitude_vector": (rows,), "rescale": (rows,), "diff_b": (rows,),
        "lora_up.bias": (rows,), "weight": (channels if parts.get("on_input") else rows,),
    }  # fmt: skip
    for part, sizes in takes.items():
        if part in parts and parts[part].numel() not in sizes:
            there = tuple(parts[part].shape)
            raise ValueError(f"this LoRA was made for another model: {name} is {own} here, and its {part} {there}")


def is_dense(kind: str, parts: Parts, weight: Tensor) -> bool:
    """Whether a layer is none of `KINDS` and goes by its weight: another kind, or one with a part that they lack."""
    if PIECE in parts or kind in ("glora", "oft_blocks", "ia3"):
        return True
    scale = parts.get("dora_scale")
    if scale is not None and (kind != "dora" or not on_rows(scale, weight)):
        return True
    return kind == "loha" and "hada_t1" in parts
