"""Test-time embedding adjustment on a diffusers model: of prompts, and the class word's rows for embedding files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from ...checks import check_choice
from ...denoiser import Condition
from ...embeddings import ALIGNMENTS, Adjustment, adjust_pooled, adjust_prompt, align_rows
from .denoiser import DiffusersDenoiser
from .text import TextEncoder

ANCHORS = ("current", "pretrained")
"""The text encoder that encodes the class prompt: with the adapter as it is, or without."""


@torch.no_grad()
def encode_adjusted(
    denoiser: DiffusersDenoiser,
    prompt: str,
    class_prompt: str,
    adjustment: Adjustment,
    *,
    align: str = "index",
    pooled: bool = False,
    anchor: str = "current",
) -> Condition:
    """The condition of a prompt by the adapted text encoders, adjusted to that of its class prompt.

    Args:
        align: `index` compares each position with the class prompt's of that index, as published; after the subject's
            token these are neighbours. `token` compares each word with itself (`align_rows`).
        pooled: adjust the pooled outputs too, which the paper leaves out.
        anchor: the text encoder of the class prompt, `current` as published, or `pretrained`.

    Raises:
        ValueError: naming the option; see `adjust_prompt`.
    """
    check_choice("align", align, ALIGNMENTS)
    check_choice("anchor", anchor, ANCHORS)
    family = denoiser._family
    if pooled and not family.pooled_widths:
        raise ValueError("pooled is on, but this model's prompts have no pooled output; leave it off")
    subject, ids = _encoded(denoiser, prompt, True)
    class_, class_ids = _encoded(denoiser, class_prompt, anchor == "current")
    alignment = None
    if align == "token":
        empty = {number: family.encoders[number].tokenizer("").input_ids for number in ids}
        alignment = {number: align_rows([ids[number]], [class_ids[number]], empty[number]) for number in ids}
    parts = family.parts(subject)
    own, other = (each if isinstance(each, Tensor) else each[0] for each in (subject, class_))
    adjusted = adjust_prompt(own, other, parts, parts, adjustment, alignment)
    if isinstance(subject, Tensor):
        return adjusted
    return adjusted, adjust_pooled(subject[1], class_[1], family.pooled_widths, adjustment) if pooled else subject[1]


def _encoded(denoiser: DiffusersDenoiser, prompt: str, adapted: bool) -> tuple[Condition, dict[int, list[int]]]:
    """A condition, and by number of the text encoder the token ids that it was given."""
    ids: dict[int, list[int]] = {}
    with ExitStack() as stack:
        for number, encoder in enumerate(denoiser._family.encoders):
            if encoder is not None:
                hook = encoder.model.register_forward_pre_hook(
                    lambda _, inputs, number=number: ids.update({number: inputs[0][0].tolist()})
                )
                stack.callback(hook.remove)
        return denoiser.encode_prompt(prompt, adapted), ids


def word_rows(denoiser: DiffusersDenoiser, word: str) -> dict[str, Tensor]:
    """Rows of the input embeddings of a word's tokens, (tokens, width), by text encoder as embedding files name it."""
    ids = {name: encoder.tokenizer(word, add_special_tokens=False).input_ids for name, encoder in _named(denoiser)}
    return {name: table[ids[name]].float().cpu() for name, table in embedding_tables(denoiser).items()}


def embedding_tables(denoiser: DiffusersDenoiser) -> dict[str, Tensor]:
    """All input embeddings, (tokens, width), by text encoder as embedding files name it."""
    return {name: encoder.model.get_input_embeddings().weight.detach() for name, encoder in _named(denoiser)}


def _named(denoiser: DiffusersDenoiser) -> Iterator[tuple[str, TextEncoder]]:
    names = iter(("clip_l", "clip_g"))
    for encoder in denoiser._family.encoders:
        if encoder is not None:
            yield "t5xxl" if encoder.model.config.model_type == "t5" else next(names), encoder
