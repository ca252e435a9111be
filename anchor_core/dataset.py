"""Placeholder of the interface, until the data branch is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Concept


@dataclass(frozen=True)
class Example:
    latents: Tensor
    subject_prompts: tuple[str, ...]
    class_prompts: tuple[str, ...]
    mask: Tensor | None = None
    flipped: Tensor | None = None
    name: str = ""


@dataclass(frozen=True)
class Rows:
    latents: Tensor
    subject_prompts: list[str]
    class_prompts: list[str]
    masks: Tensor | None
    names: list[str]


class Dataset:
    def __init__(self, examples: Sequence[Example], caption_dropout: float = 0.0):
        self.examples, self._deck = list(examples), []

    @classmethod
    def of_latents(cls, latents: Tensor, concept: Concept) -> Dataset:
        own = latents.detach().to("cpu", torch.float32, copy=True)
        return cls([Example(row, (concept.subject_prompt,), (concept.class_prompt,)) for row in own])

    def prompts(self) -> list[str]:
        return list(dict.fromkeys(p for e in self.examples for p in (*e.subject_prompts, *e.class_prompts)))

    def draw(self, count: int, generator: torch.Generator) -> Rows:
        while len(self._deck) < count:
            self._deck += torch.randperm(len(self.examples), generator=generator).tolist()
        drawn = [self.examples[self._deck.pop(0)] for _ in range(count)]
        return Rows(
            torch.stack([e.latents for e in drawn]),
            [e.subject_prompts[0] for e in drawn],
            [e.class_prompts[0] for e in drawn],
            torch.stack([e.mask for e in drawn]) if drawn[0].mask is not None else None,
            [e.name for e in drawn],
        )

    def state_dict(self) -> dict[str, list[int]]:
        return {"deck": list(self._deck)}

    def load_state_dict(self, state) -> None:
        self._deck = list(state["deck"])
