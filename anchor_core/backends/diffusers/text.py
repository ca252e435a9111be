"""A text encoder of transformers with its tokenizer: prompts to outputs, with token vectors in the place of a word."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.tokens import TokenVectors

logger = logging.getLogger(__name__)


class TextEncoder:
    """A frozen text encoder with its tokenizer."""

    def __init__(self, tokenizer: Any, model: nn.Module):
        self.tokenizer = tokenizer
        self.model = model
        self._tokens: TokenVectors | None = None
        self._vectors: Tensor | None = None

    @contextmanager
    def reading(self, tokens: TokenVectors | None, prefix: str | None) -> Iterator[None]:
        """While it is open, prompts have the vectors of this encoder in the place of `tokens`' word, or no word if
        there are none."""
        self._tokens = tokens
        self._vectors = tokens.vectors.get(prefix) if tokens is not None else None
        try:
            yield
        finally:
            self._tokens = self._vectors = None

    def __call__(self, prompt: str, length: int | None = None, **options: Any) -> Any:
        """The model's output for one prompt, padded to `length` tokens (default: the tokenizer's own)."""
        length = length or self.tokenizer.model_max_length
        pieces = [prompt] if self._tokens is None else self._tokens.split(prompt)
        if len(pieces) > 1 and self._vectors is not None:
            return self._with_vectors(*self._expanded(pieces, length), **options)
        if len(pieces) > 1:
            prompt = " ".join(piece.strip() for piece in pieces if piece.strip())
        tokens = self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if self.count(prompt) > length:
            logger.warning("the prompt %r is longer than %d tokens; its end is not used", prompt, length)
        return self.model(tokens.input_ids.to(self.model.device), **options)

    def _with_vectors(self, ids: list[int], places: list[int], **options: Any) -> Any:
        """The model's output for token ids, with the vectors, over and over, as the embeddings at `places`."""
        device = self.model.device
        vectors = self._vectors[torch.arange(len(places), device=device) % len(self._vectors)]
        index = torch.zeros(len(places), dtype=torch.long, device=device), torch.tensor(places, device=device)

        def put(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return output.index_put(index, vectors.to(output))

        hook = self.model.get_input_embeddings().register_forward_hook(put)
        try:
            return self.model(torch.tensor([ids], device=device), **options)
        finally:
            hook.remove()

    def _expanded(self, pieces: Sequence[str], length: int) -> tuple[list[int], list[int]]:
        """Token ids, `length` of them, of the pieces with the vectors' places between them, and these places."""
        start, end = self.tokenizer("").input_ids
        ids, places = [start], []
        for number, piece in enumerate(pieces):
            if number:
                places += range(len(ids), len(ids) + len(self._vectors))
                ids += [0] * len(self._vectors)  # what stands there is replaced
            ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        if len(ids) >= length:
            logger.warning("a prompt is longer than %d tokens with its vectors; its end is not used", length)
        ids = [*ids[: length - 1], end]
        return ids + [self.tokenizer.pad_token_id] * (length - len(ids)), [p for p in places if p < length - 1]

    def pooled(self, prompt: str) -> Tensor:
        """A CLIP's last layer at the prompt's end token, projected where it has a projection, (D,)."""
        output = self(prompt)
        return (output.text_embeds if "text_embeds" in output else output.pooler_output)[0]

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, with those of its start and end."""
        return len(self.tokenizer(prompt).input_ids)
