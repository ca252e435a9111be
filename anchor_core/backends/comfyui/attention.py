"""Where a UNet's cross-attention looks at one word, for masked sampling (Beyond Fine-Tuning)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class WordAttention:
    """softmax(q k^T / sqrt(d)) at one key, averaged over heads and over all `attn2` layers, of some rows of a batch.

    Args:
        position: of the word among the prompt's tokens.
    """

    def __init__(self, position: int):
        self.position = position
        self._maps: list[Tensor] = []

    @contextmanager
    def watch(self, network: nn.Module, rows: slice, size: tuple[int, int]) -> Iterator[None]:
        """Keep the maps of `rows` while a UNet runs, at the (h, w) of its latents."""
        with ExitStack() as stack:
            for transformer in network.modules():
                if isinstance(transformer, SpatialTransformer):
                    for block in transformer.transformer_blocks:
                        if block.attn2 is not None:
                            self._hook(stack, transformer, block.attn2, rows, size)
            yield

    def _hook(
        self, stack: ExitStack, transformer: nn.Module, attention: nn.Module, rows: slice, size: tuple[int, int]
    ) -> None:
        seen: dict[str, Any] = {}

        def keep_shape(layer: nn.Module, arguments: tuple) -> None:
            seen["shape"] = arguments[0].shape[-2:]

        def keep_queries(layer: nn.Module, arguments: tuple, queries: Tensor) -> None:
            seen["queries"] = queries[rows]

        def keep_map(layer: nn.Module, arguments: tuple, keys: Tensor) -> None:
            q, k = (each.float().unflatten(-1, (attention.heads, -1)) for each in (seen.pop("queries"), keys[rows]))
            scores = torch.einsum("bshd,bthd->bhst", q, k) * attention.dim_head**-0.5
            looks = scores.softmax(-1)[..., self.position].mean(1)  # (B, s)
            looks = looks.unflatten(1, seen["shape"]).unsqueeze(1)
            self._maps.append(F.interpolate(looks, size, mode="bilinear", align_corners=False))

        # On the projections, not on ComfyUI's attention patches: those of other packs stay in their places.
        stack.callback(transformer.register_forward_pre_hook(keep_shape).remove)
        stack.callback(attention.to_q.register_forward_hook(keep_queries).remove)
        stack.callback(attention.to_k.register_forward_hook(keep_map).remove)

    def mask(self, quantile: float) -> Tensor:
        """(B, 1, h, w): True where the mean map is above that quantile of its picture."""
        if not self._maps:
            raise ValueError("the class prompt's cross-attention was not seen; take a rule without a mask")
        mean = torch.stack(self._maps).mean(0)
        return mean > mean.flatten(1).quantile(quantile, 1).view(-1, 1, 1, 1)

    def forget(self) -> None:
        self._maps.clear()


def word_position(positive: list[dict[str, Any]], class_conds: list[dict[str, Any]]) -> int:
    """The first position at which two prompts differ, where the class word is in the class prompt.

    CLIP is causal: the embeddings before it are equal.

    Raises:
        ValueError: they are no single prompts of one CLIP, or the same prompt.
    """
    if not len(positive) == len(class_conds) == 1 or any("area" in each for each in (*positive, *class_conds)):
        raise ValueError("positive and class_conditioning take one prompt each, over the whole picture, for a mask")
    one, other = (each["cross_attn"][0].float().cpu() for each in (*positive, *class_conds))
    length = min(len(one), len(other))
    differ = ((one[:length] - other[:length]).norm(dim=-1) > 1e-3 * one[:length].norm(dim=-1)).nonzero()
    if not len(differ):
        raise ValueError("class_conditioning is the same prompt as positive, but a mask needs a class word to look at")
    if (first := int(differ[0])) == 0:
        raise ValueError(
            "class_conditioning differs from positive from its first token on, so that the class word cannot be found; "
            "encode both with the same CLIP"
        )
    return first
