"""What an adapter changes of each weight: how much, and over how many directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .formulas import adapted, lokr_factors
from .kinds import NAME
from .parts import scale_of
from .prefixes import module_of

_STAGES = (
    ("down_blocks", "input_blocks", "joint_blocks", "double_blocks", "transformer_blocks"),
    ("mid_block", "middle_block", "single_"),
    ("up_blocks", "output_blocks"),
    ("conv_norm_out", "conv_out", "out.", "norm_out", "proj_out", "final_layer"),
    ("text_encoder",),
)
"""What the layers of each part of a network begin with, in the order of its forward pass; embeddings come before."""

DIRECTIONS = 1e-7
"""Singular values below this share of the largest are rounding, and count as 0."""


@dataclass(frozen=True)
class Change:
    """The change D = W_adapted - W of one weight (out, in, ...), taken as a matrix (out, in ...).

    Attributes:
        layer: the module's name in adapter files, by network and dotted name: the same whatever program wrote the file.
        block: of the network, such as `down_blocks.1`.
        kind: of the adapter's layer.
        norm: Frobenius norm |D|, with that of a bias's change where there is one.
        relative: norm / |W|, 0 where W is 0.
        effective_rank: exp(H(p)), p_i = s_i / sum(s), of D's singular values s (Roy & Vetterli, EUSIPCO 2007): how
            many directions the change is spread over, from 1 to D's rank; 0 where D is 0.
    """

    layer: str
    block: str
    kind: str
    norm: float
    relative: float
    effective_rank: float


def changes(adapter: Adapter, file_keys: dict[str, str], weight_of: Callable[[Any], Tensor]) -> Iterator[Change]:
    """The change of each adapted module at strength 1, one at a time, so that no two dense ones are held together.

    Args:
        file_keys: `Denoiser.file_keys()`.
        weight_of: `Denoiser.weight_of`, what a module's weight stands for where it is quantised.
    """
    for name in adapter.module_names:
        with torch.no_grad():
            values, bias, weight = _singular_values(adapter, name, weight_of)
        network, module = module_of(file_keys[name]) or ("", name)
        norm = math.hypot(values.norm().item(), bias)
        base = 0.0 if weight is None else weight
        relative = norm / base if base else 0.0
        layer = f"{network}.{module}" if network else module
        yield Change(layer, _block(layer), adapter.config.kind_of(name), norm, relative, effective_rank(values))


def place(layer: str) -> tuple[int, list[tuple[int, str]]]:
    """What sorts layers in the order of the forward pass, whatever order a backend registers its modules in."""
    stage = next((i for i, beginnings in enumerate(_STAGES) if layer.startswith(beginnings)), -1)
    return stage, [(int(word), "") if word.isdecimal() else (-1, word) for word in layer.split(".")]


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of singular values over their sum (Roy & Vetterli, EUSIPCO 2007); 0 if all are 0."""
    values = values[values > DIRECTIONS * values.max()] if values.numel() else values
    if not values.numel():
        return 0.0
    shares = values.double() / values.double().sum()
    return math.exp(-(shares * shares.log()).sum().item())


def _block(layer: str) -> str:
    """The words of a layer's name up to its first number: `down_blocks.1`; a middle block has none that counts."""
    words = layer.split(".")
    if middle := next((word for word in words if word in ("mid_block", "middle_block")), None):
        return middle
    number = next((i for i, word in enumerate(words) if word.isdecimal()), None)
    return ".".join(words[: number + 1]) if number else words[0]


def _singular_values(adapter: Adapter, name: str, weight_of: Callable[[Any], Tensor]) -> tuple[Tensor, float, float]:
    """Of the change of a module's weight in float64 on the CPU; the norm of its bias's change; that of its weight."""
    kind, parts, layer = adapter.config.kind_of(name), adapter.parts(name), adapter.layer(name)
    module = adapter.base_module(name)
    held = getattr(module, "weight", None)
    weight = None if held is None else weight_of(module).detach()
    norm = 0.0 if weight is None else torch.linalg.vector_norm(weight.float()).item()
    bias = parts["lora_up.bias"].norm().item() * scale_of(parts) if "lora_up.bias" in parts else 0.0
    if kind in ("lora", "lora_bias"):
        up, down = (parts[f"lora_{part}.weight"].flatten(1) for part in ("up", "down"))
        return scale_of(parts) * _of_product(up, down), bias, norm
    if kind == "lokr":  # those of a Kronecker product are the products of both factors'
        one, other = lokr_factors(parts)
        scale = layer.scaling[NAME] if "lokr_w1" in parts and "lokr_w2" in parts else 1.0
        values = torch.outer(_of_matrix(one), _of_matrix(other.flatten(1))).flatten()
        return abs(scale) * values, bias, norm
    if kind == "loha" and parts["hada_w1_b"].shape[0] * parts["hada_w2_b"].shape[0] < min(
        parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1]
    ):
        up = torch.einsum("or,os->ors", parts["hada_w1_a"], parts["hada_w2_a"]).flatten(1)
        down = torch.einsum("ri,si->rsi", parts["hada_w1_b"], parts["hada_w2_b"]).flatten(0, 1)
        return abs(layer.scaling[NAME]) * _of_product(up, down), bias, norm
    if kind == "full" and "bias" in parts:
        bias = (parts["bias"] - module.bias.detach().float().cpu()).norm().item()
    if "weight" not in parts and kind == "full":
        return torch.zeros(0, dtype=torch.float64), bias, norm
    return _of_matrix(_dense(kind, parts, layer, weight)), bias, norm


def _dense(kind: str, parts: dict[str, Tensor], layer: Any, weight: Tensor) -> Tensor:
    """W_adapted - W in float32, on the weight's device, as a matrix."""
    weight = weight.float()
    if kind == "oft":
        rotation = layer.get_delta_weight(NAME).to(weight)
        change = weight.flatten(1) @ rotation.T - weight.flatten(1)
    elif kind == "svdiff":
        change = layer.change()
    elif kind == "full":
        change = parts["weight"].to(weight) - weight
    else:
        change = adapted(kind, parts, weight) - weight
    return change.reshape(len(change), -1) if change.ndim > 1 else change.reshape(1, -1)


def _of_product(up: Tensor, down: Tensor) -> Tensor:
    """Of up (out, r) down (r, in), without multiplying it out: those of the r x r product of their triangles."""
    one, other = (torch.linalg.qr(part.double(), mode="r").R for part in (up, down.T))
    return torch.linalg.svdvals(one @ other.T)


def _of_matrix(matrix: Tensor) -> Tensor:
    """Of (rows, columns), by its Gram matrix of the shorter side in float64, a fraction of the cost."""
    matrix = matrix.double()
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().cpu()
