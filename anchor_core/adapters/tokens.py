"""Trained vectors in the place of a word of the prompt: Textual Inversion (arXiv 2208.01618), the modifier token of
Custom Diffusion (2212.04488).

The word keeps its meaning in the pretrained text encoder: neither vocabulary nor weights change. Only where a prompt
is encoded with the adapter, the embeddings at the word's positions are the trained ones. T5, which has no vectors,
reads such a prompt without the word, as ComfyUI has it read `embedding:name`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..concept import word_pattern

EMBEDDING_KEYS = {"te": "emb_params", "te1": "clip_l", "te2": "clip_g"}
"""Text encoder by its prefix in adapters -> its tensor in an embedding file, as other programs name it."""


class TokenVectors:
    """The vectors that `token` stands for: (count, width) for each text encoder, in float32.

    Args:
        token: a word or more of prompts, whole and in any case.
        vectors: where training starts, by text encoder.
    """

    def __init__(self, token: str, vectors: Mapping[str, Tensor]):
        self.token = token
        self.vectors = {
            prefix: nn.Parameter(start.detach().to(torch.float32, copy=True).contiguous())
            for prefix, start in vectors.items()
        }

    @property
    def count(self) -> int:
        return len(next(iter(self.vectors.values())))

    def split(self, prompt: str) -> list[str]:
        """What stands between the token's places in a prompt: one piece more than it has places."""
        return word_pattern(self.token).split(prompt)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU, `<text encoder>:tokens` each."""
        return {f"{name}:tokens": part.detach().to("cpu", copy=True) for name, part in self.vectors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, part in self.vectors.items():
                part.copy_(state[f"{name}:tokens"])


def is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are an embedding file's tensors."""
    return embedding_of(tensors) is not None


def embedding_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str] | None:
    """An embedding file's tensors by text encoder, and the word that they stand for if it is told; None if it is none.

    Known are `emb_params` (SD1, SD2), `clip_l` and `clip_g` (SDXL, SD3; T5's `t5xxl` is left out), and diffusers'
    `learned_embeds` of one tensor under the word itself, (width,) or (count, width).
    """
    held = {key: tensor for key, tensor in tensors.items() if key != "t5xxl"}
    if not held or not all(isinstance(each, Tensor) and each.ndim in (1, 2) for each in held.values()):
        return None
    if held.keys() <= set(EMBEDDING_KEYS.values()):
        return held, ""
    word = next(iter(held))
    if len(tensors) > 1 or "." in word or not word.strip():
        return None
    return {EMBEDDING_KEYS["te"]: held[word]}, "" if word == "*" else word


def to_embedding(tokens: TokenVectors) -> dict[str, Tensor]:
    """The tensors of an embedding file, (count, width) each, on the CPU."""
    return {EMBEDDING_KEYS[name]: part.detach().to("cpu", copy=True) for name, part in tokens.vectors.items()}


def from_embedding(tensors: Mapping[str, Tensor], encoders: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Vectors by text encoder, (count, width) each, for a model of these text encoders.

    Raises:
        ValueError: if they were made for another model.
    """
    takes = {EMBEDDING_KEYS[name]: _rows(encoder).shape[1] for name, encoder in encoders.items()}
    has = {key: tensor.shape[-1] for key, tensor in tensors.items()}
    # One vector may be written as (width,).
    vectors = {key: tensor.reshape(-1, tensor.shape[-1]) for key, tensor in tensors.items() if tensor.numel()}
    count = max(map(len, vectors.values()), default=0)
    if not vectors.keys() == tensors.keys() or count > 75:
        raise ValueError(f"this embedding has {count if vectors else 'no'} vectors, but a prompt has room for 1 to 75")
    if has != takes or len(set(map(len, vectors.values()))) != 1:
        made, wanted = (", ".join(f"{key} {width}" for key, width in sizes.items()) for sizes in (has, takes))
        raise ValueError(f"this embedding was made for another model: it is of {made}, and this one takes {wanted}")
    return {name: vectors[EMBEDDING_KEYS[name]].to(_rows(encoder).device) for name, encoder in encoders.items()}


def _rows(encoder: nn.Module) -> Tensor:
    """A text encoder's embeddings of all tokens, (vocabulary, width)."""
    return encoder.get_input_embeddings().weight.detach()


def start_vectors(word: str, count: int, encoders: Mapping[str, tuple[Sequence[int], nn.Module]]) -> dict[str, Tensor]:
    """The embedding of `word`, `count` times, (count, width), for each text encoder.

    Args:
        encoders: by prefix, the word's token ids without those of start and end, and the text encoder.

    Raises:
        ValueError: if the word is no single token of each.
    """
    starts = {}
    for prefix, (ids, encoder) in encoders.items():
        if len(ids) != 1:
            raise ValueError(
                f"initial is {word!r}, which is {len(ids)} tokens of this model's text encoder, but it takes a word of "
                "one token, such as the class word"
            )
        starts[prefix] = _rows(encoder)[ids[0]].float().expand(count, -1)
    return starts
