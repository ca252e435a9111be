"""Test-time embedding adjustment on ComfyUI's CONDITIONING, and the class word's rows for embedding files."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ...embeddings import WHOLE, Adjustment, Part, adjust_pooled, adjust_prompt, align_rows, side_by_side

Conditioning = list[list[Any]]
"""ComfyUI's: encodings, each a tensor (1, tokens, width) and a dict."""

CLIP_L, CLIP_G, T5 = 768, 1280, 4096
ENCODERS = ("clip_l", "clip_g", "clip_h", "t5xxl")
"""The text encoders that read embedding files, as their tensors in these files are called."""


def adjust_conditioning(
    subject: Conditioning,
    class_: Conditioning,
    adjustment: Adjustment,
    pooled: bool = False,
    tokens: Sequence[dict[str, Any]] | None = None,
) -> Conditioning:
    """The subject prompt's conditioning, adjusted to the class prompt's; everything else in it stays.

    Args:
        class_: of one encoding, or of as many as the subject's.
        pooled: adjust the pooled outputs too, which the paper leaves out.
        tokens: what the CLIP's `tokenize` makes of the subject prompt, the class prompt and the empty one, to compare
            each word with itself; None to compare by index, as published.

    Raises:
        ValueError: naming the input that does not fit.
    """
    if not subject or len(class_) not in (1, len(subject)):
        raise ValueError(
            f"class_conditioning has {len(class_)} encodings and the subject's {len(subject)}; connect both "
            "straight from their text encoders"
        )
    others = class_ * len(subject) if len(class_) == 1 else class_
    return [_adjust(own, other, adjustment, pooled, tokens) for own, other in zip(subject, others)]


def _adjust(own: list, other: list, adjustment: Adjustment, pooled: bool, tokens) -> list:
    (ours, extras), (theirs, class_extras) = own, other
    parts, class_parts = _parts(ours[0], extras), _parts(theirs[0], class_extras)
    alignment = None if tokens is None else _alignment(ours[0], theirs[0], parts, class_parts, tokens)
    rows = [adjust_prompt(row, theirs[0], parts, class_parts, adjustment, alignment) for row in ours]
    if pooled:
        mine, of_class = (each.get("pooled_output") for each in (extras, class_extras))
        if mine is None or of_class is None:
            raise ValueError("pooled is on, but a conditioning has no pooled output; switch it off")
        widths = [CLIP_L, CLIP_G] if mine.shape[-1] == CLIP_L + CLIP_G else [mine.shape[-1]]
        extras = extras | {"pooled_output": adjust_pooled(mine, of_class, widths, adjustment)}
    return [torch.stack(rows), dict(extras)]


def _parts(rows: Tensor, extras: dict[str, Any]) -> list[Part]:
    """The encoders in (tokens, width): SDXL and SD3 are told by both widths, SD3's CLIPs by the zeros after them."""
    pooled = extras.get("pooled_output")
    widths = rows.shape[-1], None if pooled is None else pooled.shape[-1]
    if widths == (CLIP_L + CLIP_G, CLIP_G):
        return side_by_side([CLIP_L, CLIP_G], WHOLE, ["l", "g"])
    if widths == (T5, CLIP_L + CLIP_G):
        filled = (rows[:, CLIP_L + CLIP_G :] == 0).all(dim=-1).tolist()
        count = len(list(takewhile(bool, filled)))
        if count:
            clips = side_by_side([CLIP_L, CLIP_G], slice(count), ["l", "g"])
            return clips if count == len(rows) else [*clips, Part(slice(count, None), WHOLE, "t5xxl")]
    return [Part(WHOLE, WHOLE, None)]


def _alignment(own: Tensor, other: Tensor, parts, class_parts, tokens) -> dict[Hashable, Tensor]:
    found, counts = {}, {key: [sum(map(len, each[key])) for each in tokens[:2]] for key in tokens[0]}
    for mine, theirs in zip(parts, class_parts):
        lengths = [len(own[mine.rows]), len(other[theirs.rows])]
        fitting = [key for key in counts if counts[key] == lengths and mine.encoder in (None, key)]
        if len(fitting) != 1:
            given = ", ".join(f"{one} and {other} ({key})" for key, (one, other) in counts.items())
            raise ValueError(
                f"the conditionings have {lengths[0]} and {lengths[1]} tokens, but for this clip subject_prompt and "
                f"class_prompt have {given}; give the prompts and the clip that they were encoded with"
            )
        sections = [[[_key(token) for token, *_ in part] for part in each[fitting[0]]] for each in tokens]
        found[mine.encoder] = align_rows(sections[0], sections[1], sections[2][0])
    return found


def _key(token: Any) -> Hashable:
    """A token id, or the vector of an embedding file as something that can be compared."""
    return tuple(token.flatten()[:8].tolist()) if isinstance(token, Tensor) else token


def word_rows(clip, word: str) -> dict[str, Tensor]:
    """Rows of the input embeddings of a word's tokens, (tokens, width), by text encoder as embedding files name it.

    Raises:
        ValueError: if no text encoder of the CLIP reads embedding files.
    """
    clip.load_model()
    found, device = {}, clip.patcher.load_device
    for name in ENCODERS:
        encoder, tokenizer = (getattr(each, name, None) for each in (clip.cond_stage_model, clip.tokenizer))
        if encoder is not None and tokenizer is not None:
            ids = tokenizer.tokenizer(word, add_special_tokens=False)["input_ids"]
            embed = encoder.transformer.get_input_embeddings()
            found[name] = embed(torch.tensor(ids, device=device, dtype=torch.long), out_dtype=torch.float32).cpu()
    if not found:
        raise ValueError("the clip has none of the text encoders that read embedding files: CLIP-L, G, H or T5")
    return found
