"""An adapter's strength, of a whole batch or of each row: a layer's outputs with and without the adapter, blended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import NAME


class EarlyWeights:
    """The weights of an early checkpoint beside those of the adapter: `state`, a `state_dict()` that fits it."""

    def __init__(self, kinds: Mapping[str, Any], layers: Mapping[str, Any], state: Mapping[str, Tensor]):
        self._kinds, self._layers = kinds, layers
        self._held: dict[str, dict[str, Any]] = {}
        with torch.inference_mode(False):
            for name, layer in layers.items():
                kind = kinds[name]
                factors = kind.factors(layer)
                self._held[name] = {part: state[f"{name}.{part}"].to(factor, copy=True) for part, factor in factors}
                if kind.alpha:
                    self._held[name]["scaling"] = float(state[f"{name}.alpha"]) / layer.r[NAME]

    @contextmanager
    def in_place(self, name: str) -> Iterator[None]:
        """The layer `name` has them while it is open."""
        self._exchange(name)
        try:
            yield
        finally:
            self._exchange(name)

    def _exchange(self, name: str) -> None:
        layer, kind, held = self._layers[name], self._kinds[name], self._held[name]
        for part, factor in kind.factors(layer):
            factor.data, held[part] = held[part].to(factor), factor.data
        if kind.alpha:
            layer.scaling[NAME], held["scaling"] = held["scaling"], layer.scaling[NAME]


class Blend:
    """Hooks on an adapter's layer: base + strength (adapted - base), until `remove`.

    A layer's output is linear in its own weight, so this is the output of W + strength (W_adapted - W) for every kind.
    Most kinds run the base module on their own input, and then its output is kept instead of made a second time.

    Args:
        name: of the layer.
        strength: of the batch, or of each row, (B,).
        early: where these weights stand in for the adapter's: in rows of these indices, in all (True) or in none.
    """

    def __init__(
        self,
        name: str,
        layer: Any,
        strength: float | Tensor,
        rows: bool | Tensor = False,
        early: EarlyWeights | None = None,
    ):
        self.name, self.strength, self.rows, self.early = name, strength, rows, early
        self._base = layer.get_base_layer()
        self._weight = getattr(self._base, "weight", None)
        self._kept: tuple[Tensor, Tensor] | None = None
        self._hooks = [
            self._base.register_forward_hook(self._keep),
            layer.register_forward_hook(self._blend, with_kwargs=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, base: nn.Module, inputs: tuple, output: Tensor) -> None:
        if getattr(base, "weight", None) is self._weight:  # some kinds run it with a weight of theirs
            self._kept = inputs[0], output

    def _blend(self, layer: Any, inputs: tuple, options: dict[str, Any], adapted: Tensor) -> Tensor:
        strength = self.strength
        if isinstance(strength, Tensor):
            if len(strength) != len(adapted):
                raise ValueError(
                    f"strength is of {len(strength)} rows, but layer {self.name} runs {len(adapted)}; give one a row"
                )
            strength = strength.to(adapted).view(-1, *[1] * (adapted.ndim - 1))
        (input_, base), self._kept = self._kept or (None, None), None
        if input_ is not inputs[0]:
            base = self._base(*inputs, **options)
        if self.rows is not False:
            adapted = self._with_early(layer, inputs, options, adapted)
        self._kept = None
        return torch.lerp(base.to(adapted), adapted, strength)  # exact at 0 and at 1

    def _with_early(self, layer: Any, inputs: tuple, options: dict[str, Any], adapted: Tensor) -> Tensor:
        with self.early.in_place(self.name):
            if self.rows is True:
                return layer.forward(*inputs, **options)
            early = layer.forward(inputs[0].index_select(0, self.rows), *inputs[1:], **options)
        return adapted.index_copy(0, self.rows, early)
