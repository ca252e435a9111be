"""Adapter strength by the row of a batch, over one network that has the adapter in its weights.

A layer of weight W + dW gives y = (W + dW) x. A row that wants W + s dW gets the correction (s - 1) dW x, through the
LoRA's two factors; rows at s = 1 cost nothing. Another adapter's weight W + s dV takes s dV x - dW x. Kinds whose
update is no product of two factors (DoRA, LoKr, LoHa, OFT, differences) are corrected with the dense dW, made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.lora
import comfy.model_patcher
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import plain_values

Patches = Mapping[str | tuple, Any]
"""Of one adapter: ComfyUI's key of a weight, or (key, offset, function), to its patch."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.GroupNorm)


class RowStrengths:
    """Corrects rows on the layers that the adapters change, until `close`.

    Args:
        patcher: the MODEL, with the first adapter patched in.
        adapters: the first is in the weights; the others may take its place.
        strength: at which the adapters are applied; shares are of it.
    """

    def __init__(self, patcher: comfy.model_patcher.ModelPatcher, adapters: Sequence[Patches], strength: float):
        self._patcher, self._strength = patcher, strength
        self._adapters = [_by_layer(patches) for patches in adapters]
        self._networks: dict[nn.Module, _Batch] = {}
        self._hooks = ExitStack()

    def close(self) -> None:
        """Take every hook off the layers, and drop what was made for them."""
        self._hooks.close()
        self._networks.clear()

    @contextmanager
    def rows(self, model: nn.Module, batch: int, shares: Sequence[tuple[float, ...]]) -> Iterator[None]:
        """While `model` (ComfyUI's BaseModel) runs a batch of as many equal chunks as `shares` has.

        Args:
            batch: rows of the network's input.
            shares: of a chunk's rows, how much of each adapter they have; (1, 0, ...) is what the weights say.
        """
        size = batch // len(shares)
        missing = [(share[0] - 1, *share[1:]) for share in shares]
        spans = [
            (chunk * size, (chunk + 1) * size, adapter, coefficient)
            for chunk, coefficients in enumerate(missing)
            for adapter, coefficient in enumerate(coefficients)
            if coefficient
        ]
        if spans and model not in self._networks:
            self._networks[model] = self._hook(model)
        state = self._networks.get(model, _Batch())
        state.rows, state.spans = batch, spans
        try:
            yield
        finally:
            state.spans = []

    def _hook(self, model: nn.Module) -> _Batch:
        state = _Batch()
        for name in dict.fromkeys(name for adapter in self._adapters for name in adapter):
            hook = _Correction(name, state, self._delta)
            self._hooks.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        return state

    # --- what an adapter adds to a layer --------------------------------------------------------------------------

    def _delta(self, adapter: int, name: str, like: Tensor) -> _Delta:
        """In the dtype and on the device of `like`."""
        delta = _Delta()
        for parameter, patches in self._adapters[adapter].get(name, {}).items():
            key = f"{name}.{parameter}"
            present = self._patcher.patches.get(key, [])
            simple = all(_is_sum(patch) and whole == 1 for _, patch, whole, *_ in present)
            if parameter == "weight" and simple and all(_is_product(each) for each in patches):
                delta.factors = [_Factors(*each[:2], self._strength, like) for each in patches]
            else:
                setattr(delta, parameter, self._dense(adapter, key, like))
        return delta

    def _dense(self, adapter: int, key: str, like: Tensor) -> Tensor:
        """The weight with the adapter in its place among the MODEL's other patches, less the weight without it."""
        patcher = self._patcher
        weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
        if key in patcher.backup:  # under a LoRA, or a hook LoRA, the former is the patched one
            weight = patcher.backup[key].weight
        elif key in patcher.hook_backup:
            weight = patcher.hook_backup[key][0]
        present = patcher.patches.get(key, [])
        name, _, parameter = key.rpartition(".")
        own = {id(patch) for patch, *_ in self._adapters[0].get(name, {}).get(parameter, [])}
        others = [each for each in present if id(each[1]) not in own]
        place = next((i for i, each in enumerate(present) if id(each[1]) in own), len(present))
        added = self._adapters[adapter][name][parameter]
        entries = [(self._strength, patch, 1.0, offset, function) for patch, offset, function in added]

        def calculate(patches: list) -> Tensor:
            plain = plain_values(patcher.model.get_submodule(name), weight, like.device)
            return comfy.lora.calculate_weight(patches, plain if convert is None else convert(plain, inplace=True), key)

        return (calculate([*others[:place], *entries, *others[place:]]) - calculate(others)).to(like.dtype)


def check_layers(model: nn.Module, adapters: Sequence[Patches]) -> None:
    """ValueError if an adapter changes what rows cannot be corrected for; names the weight."""
    for patches in adapters:
        for name, parameters in _by_layer(patches).items():
            layer = model.get_submodule(name)
            known = _is_linear(layer) or isinstance(layer, (*CONVOLUTIONS, *NORMS))
            unknown = [each for each in parameters if not known or each not in ("weight", "bias")]
            if unknown:
                raise ValueError(
                    f"this LoRA changes {name}.{unknown[0]} of a {type(layer).__name__}, which cannot differ from row "
                    "to row; take a rule whose branches are all at full strength"
                )


def _by_layer(patches: Patches) -> dict[str, dict[str, list[tuple]]]:
    """Module to parameter to (patch, offset, function)."""
    layers: dict[str, dict[str, list[tuple]]] = {}
    for key, patch in patches.items():
        key, offset, function = (*((key,) if isinstance(key, str) else key), None, None)[:3]
        name, _, parameter = key.rpartition(".")
        layers.setdefault(name, {}).setdefault(parameter, []).append((patch, offset, function))
    return layers


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or hasattr(layer, "in_features")  # ComfyUI's quantised ones are no nn.Linear


def _is_sum(patch: Any) -> bool:
    """Whether a patch adds something that does not depend on the weight."""
    if isinstance(patch, LoRAAdapter):
        return patch.weights[4] is None
    if isinstance(patch, (LoHaAdapter, LoKrAdapter)):
        return patch.weights[-1] is None
    return isinstance(patch, tuple) and (len(patch) == 1 or patch[0] == "diff")


def _is_product(entry: tuple) -> bool:
    """Whether a patch adds the product of two factors to the weight, or to some of its rows or columns."""
    patch, _, function = entry
    return isinstance(patch, LoRAAdapter) and function is None and all(each is None for each in patch.weights[3:])


# --- on a layer ---------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    """What a network is running: its rows, and (first, last, adapter, how much of it is missing) of some of them."""

    rows: int = 0
    spans: list[tuple[int, int, int, float]] = field(default_factory=list)


class _Correction:
    """A forward hook that corrects rows of a layer's output in place.

    It runs at every adapted layer of every step, where on a fast GPU it is the time of Python that counts.
    """

    def __init__(self, name: str, batch: _Batch, make_delta: Callable[[int, str, Tensor], _Delta]):
        self.name, self.batch, self.make_delta = name, batch, make_delta
        self.kind: tuple | None = None
        self.deltas: dict[int, _Delta] = {}

    def __call__(self, layer: nn.Module, arguments: tuple, y: Tensor) -> None:
        spans, rows = self.batch.spans, self.batch.rows
        if not spans:
            return
        scale, rest = divmod(y.shape[0], rows)
        if rest:
            raise ValueError(
                f"{self.name} runs {len(y)} rows for a batch of {rows}, so that strengths cannot differ by row in this "
                "model; take a rule whose branches are all at full strength"
            )
        if self.kind != (y.dtype, y.device):
            self.kind, self.deltas = (y.dtype, y.device), {}
        x = arguments[0]
        if x.dtype != y.dtype:
            x = x.to(y.dtype)
        for first, last, adapter, coefficient in spans:
            if adapter not in self.deltas:
                self.deltas[adapter] = self.make_delta(adapter, self.name, y)
            first, last = first * scale, last * scale
            self.deltas[adapter].add(layer, x[first:last], y[first:last], coefficient)


@dataclass
class _Delta:
    """What an adapter adds to a layer's weight and bias: products of factors, or the dense difference."""

    factors: list[_Factors] = field(default_factory=list)
    weight: Tensor | None = None
    bias: Tensor | None = None

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, coefficient: float) -> None:
        """y += coefficient times what the delta makes of x."""
        for each in self.factors:
            each.add(layer, x, y, coefficient)
        if self.weight is not None or self.bias is not None:
            y.add_(self._output(layer, x, y), alpha=coefficient)

    def _output(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if isinstance(layer, NORMS):  # without its weight, a norm has one of 1
            weight = torch.zeros_like(bias) if weight is None else weight
            if isinstance(layer, nn.GroupNorm):
                return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
            return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        if isinstance(layer, CONVOLUTIONS):
            return bias.view(-1, *[1] * (y.ndim - 2)) if weight is None else layer._conv_forward(x, weight, bias)
        return bias if weight is None else F.linear(x, weight, bias)


class _Factors:
    """strength * alpha / rank * up @ down, of a linear or convolution layer or of some of its inputs or outputs."""

    def __init__(self, patch: LoRAAdapter, offset: tuple[int, int, int] | None, strength: float, like: Tensor):
        up, down, alpha, *_ = patch.weights
        self.scale = strength * (1.0 if alpha is None else alpha / len(down))
        self.up = up.flatten(1).to(like)  # (out, rank)
        self.up_t = self.up.T
        self.down = down.flatten(1).to(like)  # (rank, in ...)
        self.outputs, self.inputs = (offset[1:] if offset and offset[0] == axis else None for axis in (0, 1))

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, coefficient: float) -> None:
        scale = coefficient * self.scale
        if isinstance(layer, CONVOLUTIONS):
            self._convolve(layer, x, y, scale)
            return
        if self.inputs is not None:
            x = x.narrow(-1, *self.inputs)
        if self.outputs is not None:
            y = y.narrow(-1, *self.outputs)
        hidden = F.linear(x, self.down)
        if y.is_contiguous():
            y.view(-1, y.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), self.up_t, alpha=scale)
        else:
            y.add_(F.linear(hidden, self.up), alpha=scale)

    def _convolve(self, layer: nn.Module, x: Tensor, y: Tensor, scale: float) -> None:
        if self.inputs is not None:
            x = x.narrow(1, *self.inputs)
        if self.outputs is not None:
            y = y.narrow(1, *self.outputs)
        hidden = layer._conv_forward(x, self.down.view(len(self.down), x.shape[1], *layer.kernel_size), None)
        up = self.up.expand(len(x), -1, -1)
        if y.is_contiguous():
            y.view(*y.shape[:2], -1).baddbmm_(up, hidden.flatten(2), alpha=scale)
        else:
            y.add_(torch.bmm(up, hidden.flatten(2)).view(y.shape), alpha=scale)
