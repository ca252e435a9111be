"""Prompts for ComfyUI's CLIP with trained vectors in the place of a word, as `embedding:name` puts them there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from comfy.sd1_clip import SDTokenizer

from ...adapters.tokens import TokenVectors

Tokens = dict[str, list[list[tuple[Any, float]]]]
"""ComfyUI's: by text encoder, batches of (id or vector, weight)."""


def word_ids(tokenizer: SDTokenizer, word: str) -> list[int]:
    """Token ids of a word, without those of start and end."""
    return tokenizer.tokenizer(word, add_special_tokens=False)["input_ids"]


def tokenize(
    clip, prompt: str, tokens: TokenVectors | None, tokenizers: Mapping[str, tuple[str, SDTokenizer]]
) -> Tokens:
    """A prompt's tokens, with the vectors at the places of the word; encoders without vectors read it without the word.

    Prompts and captions of a training are plain text, in diffusers too: `(sks:1.2)` is no weight, and its parentheses
    are escaped here. The breaking of long prompts is ComfyUI's own: the vectors' places are first held by a word of one
    token that the prompt does not have.
    """
    prompt = prompt.replace("(", r"\(").replace(")", r"\)")
    pieces = [prompt] if tokens is None else tokens.split(prompt)
    if len(pieces) == 1:
        return clip.tokenize(prompt)
    used = {token for batches in clip.tokenize(prompt).values() for token in _ids(batches)}
    holder = _unused_word([tokenizer for _, tokenizer in tokenizers.values()], used)
    held = clip.tokenize(f" {' '.join([holder] * tokens.count)} ".join(pieces))
    result = clip.tokenize(" ".join(piece.strip() for piece in pieces if piece.strip()))
    for prefix, (key, tokenizer) in tokenizers.items():
        (place,), vectors, number = word_ids(tokenizer, holder), tokens.vectors[prefix], count()
        result[key] = [
            [(vectors[next(number) % len(vectors)] if token == place else token, *rest) for token, *rest in batch]
            for batch in held[key]
        ]
    return result


def _ids(batches: Iterable[Sequence[tuple]]) -> list[int]:
    return [token for batch in batches for token, *_ in batch if isinstance(token, int)]


def _unused_word(tokenizers: Sequence[SDTokenizer], used: set[int]) -> str:
    end = "</w>"
    for token in tokenizers[0].inv_vocab.values():
        word = token.removesuffix(end)
        if token.endswith(end) and word.isascii() and word.isalpha():
            read = [word_ids(tokenizer, word) for tokenizer in tokenizers]
            if all(len(ids) == 1 and ids[0] not in used for ids in read):
                return word
    raise ValueError("this model's tokenizer has no words of one token; give a CLIP text encoder")
