"""An adapter's strength, of a whole batch or of each row: a layer's outputs with and without the adapter, blended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


class Blend:
    """Hooks on one of peft's layers: base + strength (adapted - base), until `remove`.

    A layer's output is linear in its own weight, so this is the output of W + strength (W_adapted - W) for every kind.
    Most kinds run the base module on their own input, and then its output is kept instead of made a second time.

    Args:
        name: of the layer, for errors.
        strength: of the batch, or of each row, (B,).
        early: indices of the rows that run with the early checkpoint in the adapter's place, or all or none of them.
        exchanged: gives a context in which the layer holds the early checkpoint.
    """

    def __init__(
        self,
        name: str,
        layer: Any,
        strength: float | Tensor,
        early: bool | Tensor,
        exchanged: Callable[[str], AbstractContextManager[None]],
    ):
        self.name = name
        self.strength = strength
        self.early = early
        self.exchanged = exchanged
        self._kept: tuple[Tensor, Tensor] | None = None
        base = layer.get_base_layer()
        self._hooks = [
            base.register_forward_hook(self._keep),
            layer.register_forward_hook(self._blend, with_kwargs=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, base: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._kept = (inputs[0], output)

    def _blend(self, layer: Any, inputs: tuple, options: dict[str, Any], adapted: Tensor) -> Tensor:
        rows = len(self.strength) if isinstance(self.strength, Tensor) else len(adapted)
        if len(adapted) != rows:
            raise ValueError(
                f"strength is of {rows} rows, but layer {self.name} runs {len(adapted)}; give one for each row"
            )
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] is inputs[0]:
            base = kept[1]
        else:
            base = layer.get_base_layer()(*inputs, **options)
        if self.early is not False:
            adapted = self._with_early(layer, inputs, options, adapted)
        strength = self.strength
        if isinstance(strength, Tensor):
            strength = strength.to(adapted).view(-1, *[1] * (adapted.ndim - 1))
        self._kept = None
        return torch.lerp(base.to(adapted), adapted, strength)  # exact at 0 and at 1

    def _with_early(self, layer: Any, inputs: tuple, options: dict[str, Any], adapted: Tensor) -> Tensor:
        with self.exchanged(self.name):
            if self.early is True:
                return layer.forward(*inputs, **options)
            early = layer.forward(inputs[0].index_select(0, self.early), *inputs[1:], **options)
        return adapted.index_copy(0, self.early, early)
