"""Textual-inversion files: read, adjusted to a class word (TEA on the token's vectors), written as safetensors.

Known are safetensors with `emb_params` (SD1, SD2), with `clip_l` and `clip_g` (SDXL, SD3), and with one tensor under
the token itself (diffusers); and .pt and .bin files with these, or with A1111's `string_to_param`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ..embeddings import Adjustment
from .file import load_adapter

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_embedding(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Vectors (count, width) by name, in their dtype, and the file's metadata.

    Raises:
        ValueError: if it is no readable file of an embedding. Of .pt and .bin files nothing but tensors is read.
    """
    tensors, metadata = load_adapter(path)
    if not tensors:
        raise ValueError(f"{path} holds no tensor, but it takes a textual-inversion file of vectors (count, width)")
    for name, each in tensors.items():
        if each.ndim not in (1, 2) or not each.numel() or each.dtype not in DTYPES:
            told = f"holds {name!r} of shape {tuple(each.shape)} in {each.dtype}".replace("torch.", "")
            raise ValueError(f"{path} {told}, but it takes a textual-inversion file of vectors (count, width)")
        if not each.any(dim=-1).all():
            raise ValueError(f"{path} has zeros for a vector in {name!r}, which have no direction; train it again")
    # One vector may be written as (width,).
    return {name: each.reshape(-1, each.shape[-1]) for name, each in tensors.items()}, metadata


def adjust_embedding(
    vectors: Mapping[str, Tensor], word: str, word_rows: Mapping[str, Tensor], adjustment: Adjustment
) -> dict[str, Tensor]:
    """An embedding's vectors, each adjusted to the class word's own (TEA, Eq. 1); several vectors to the same one.

    Args:
        vectors: (count, width), by name in the file.
        word: the class word, for errors.
        word_rows: by text encoder (`clip_l`, `clip_g`, ...), the rows of the input embeddings of the word's tokens as
            the tokenizer emits them, (tokens, width).

    Raises:
        ValueError: if the vectors are of another model, or the word is not one token of an encoder that has some.
    """
    return {
        name: adjustment(each, _anchor(name, each, word, word_rows).to(each.device)) for name, each in vectors.items()
    }


def encoder_of(name: str, vectors: Tensor, word_rows: Mapping[str, Tensor]) -> str:
    """The text encoder that vectors belong to: of their name in the file, else the only one of their width.

    Raises:
        ValueError: if there is none, or more than one.
    """
    width = vectors.shape[-1]
    fitting = [
        key for key, rows in word_rows.items() if rows.shape[-1] == width and (name == key or name not in word_rows)
    ]
    if len(fitting) != 1:
        known = ", ".join(f"{key} of {rows.shape[-1]}" for key, rows in word_rows.items())
        raise ValueError(
            f"this embedding was made for another model: its {name!r} has a width of {width}, but this model's text "
            f"encoders are {known}"
        )
    return fitting[0]


def _anchor(name: str, vectors: Tensor, word: str, word_rows: Mapping[str, Tensor]) -> Tensor:
    encoder = encoder_of(name, vectors, word_rows)
    rows = word_rows[encoder]
    if len(rows) != 1:
        raise ValueError(
            f"class_word is {word!r}, which is {len(rows)} tokens of {encoder}, but it takes a word of one token; "
            "give one that says the class, such as animal for stuffed animal"
        )
    return rows[0]


def describe(before: Mapping[str, Tensor], after: Mapping[str, Tensor], word_rows: Mapping[str, Tensor]) -> dict:
    """By name, a list a vector: length and cosine to the class word before and after, as plain numbers."""
    told = {}
    for name, each in before.items():
        anchor = _anchor(name, each, "", word_rows).double()
        told[name] = [
            {
                f"{what}_{when}": value.item()
                for when, row in (("before", one.double()), ("after", other.double()))
                for what, value in (("length", vector_norm(row)), ("cosine", torch.cosine_similarity(row, anchor, -1)))
            }
            for one, other in zip(each, after[name])
        ]
    return told
