"""Where a UNet looks at the class word: cross-attention maps, and the mask made of them (Beyond Fine-Tuning)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn


def cross_attentions(network: nn.Module) -> list[Any]:
    """diffusers' attentions of the picture to the text, in the network's order; none where one attention joins both."""
    from diffusers.models.attention_processor import Attention

    modules = (module for name, module in network.named_modules() if name.endswith("attn2"))
    return [module for module in modules if isinstance(module, Attention) and module.is_cross_attention]


def word_positions(subject: Tensor, class_: Tensor) -> Tensor:
    """The first token at which two prompts' embeddings (B, T, D) differ, (B,): the class word's in the class prompt.

    A text encoder with a causal mask, as CLIP's is, gives what stands before it the same embeddings in both.

    Raises:
        ValueError: if two prompts are the same.
    """
    subject, class_ = subject.float(), class_.float()
    apart = (subject - class_).abs().amax(-1) > 1e-3 * class_.abs().amax((1, 2))[:, None]
    if not apart.any(1).all():
        raise ValueError("the class prompt is the subject's, but rule 'masked' takes one without the subject's token")
    return apart.int().argmax(1)


class ClassWordMaps:
    """The maps of one pass: one (B, S) a cross-attention, softmax(Q K^T / sqrt(d)) of the class word, mean over heads.

    Args:
        subject, class_: the rows of the batch with either prompt.
    """

    def __init__(self, subject: slice, class_: slice):
        self.rows = subject, class_
        self.maps: list[Tensor] = []
        self.words: Tensor | None = None

    @contextmanager
    def reading(self, network: nn.Module) -> Iterator[None]:
        """Maps are read from the passes that are made while it is open."""
        hooks = []
        try:
            for attention in cross_attentions(network):
                read: dict[str, Tensor] = {}
                hooks += [
                    attention.to_q.register_forward_hook(self._reader(read, "query")),
                    attention.to_k.register_forward_hook(self._reader(read, "key")),
                    attention.register_forward_hook(self._map_of(read)),
                ]
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _reader(self, read: dict[str, Tensor], name: str):
        subject, class_ = self.rows

        def hook(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            read[name] = output[class_]
            if name == "key" and self.words is None:  # every layer reads the same prompts
                self.words = word_positions(inputs[0][subject], inputs[0][class_])

        return hook

    def _map_of(self, read: dict[str, Tensor]):
        def hook(attention: Any, inputs: tuple, output: Tensor) -> None:
            # (B, T, heads d) to (B, heads, T, d)
            query, key = (
                read[name].float().unflatten(-1, (attention.heads, -1)).transpose(1, 2) for name in ("query", "key")
            )
            weights = (query @ key.transpose(-1, -2) * attention.scale).softmax(-1)  # (B, heads, S, T)
            rows = torch.arange(len(weights), device=weights.device)
            self.maps.append(weights.mean(1)[rows, :, self.words])
            read.clear()

        return hook

    def mask(self, height: int, width: int, quantile: float) -> Tensor:
        """Where the mean of the maps, each brought to the latents' size, is above its `quantile`: bool (B, 1, h, w)."""
        size = height, width
        scaled = [
            nn.functional.interpolate(each.unflatten(1, (1, *_shape(each.shape[1], size))), size, mode="bilinear")
            for each in self.maps
        ]
        mean = torch.stack(scaled).mean(0)
        return mean > torch.quantile(mean.flatten(1), quantile, dim=1).view(-1, 1, 1, 1)


def _shape(positions: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer of so many positions, which halves the latents' some times, rounding up."""
    shape = size
    while prod(shape) > positions:
        shape = tuple(ceil(edge / 2) for edge in shape)
    return shape
