"""What a training draws its rows from: encoded pictures with their prompts, by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..concept import Concept


@dataclass(frozen=True)
class Example:
    """One reference picture, encoded.

    Args:
        latents: scaled latents (C, h, w), float32, on the CPU.
        subject_prompts: what may be said of it; one is drawn each time.
        class_prompts: as many: the same with the class word alone.
        mask: where its loss counts, (1, h, w) in [0, 1].
        flipped: latents of the mirrored picture (C, h, w), drawn half of the time, with the mask mirrored too.
        name: what it is called in errors and reports.
    """

    latents: Tensor
    subject_prompts: tuple[str, ...]
    class_prompts: tuple[str, ...]
    mask: Tensor | None = None
    flipped: Tensor | None = None
    name: str = ""

    def __post_init__(self):
        shape = tuple(self.latents.shape)
        if len(shape) != 3 or not self.latents.is_floating_point():
            raise ValueError(f"latents of {self.name!r} are {shape} {self.latents.dtype}, but it takes float (C, h, w)")
        if not self.subject_prompts or len(self.subject_prompts) != len(self.class_prompts):
            raise ValueError(
                f"{self.name!r} has {len(self.subject_prompts)} subject_prompts and {len(self.class_prompts)} "
                "class_prompts, but it takes as many, and at least one"
            )
        if self.mask is not None and tuple(self.mask.shape) != (1, *shape[1:]):
            raise ValueError(f"mask of {self.name!r} is {tuple(self.mask.shape)}, but it takes {(1, *shape[1:])}")
        if self.flipped is not None and tuple(self.flipped.shape) != shape:
            raise ValueError(f"flipped of {self.name!r} is {tuple(self.flipped.shape)}, but it takes {shape}")


@dataclass(frozen=True)
class Rows:
    """What one draw gives: latents (B, C, h, w), masks (B, 1, h, w) or None, and B prompts and names each."""

    latents: Tensor
    subject_prompts: list[str]
    class_prompts: list[str]
    masks: Tensor | None
    names: list[str]


class Dataset:
    """Examples in buckets of one latent size each, drawn in shuffled epochs.

    Every choice comes from the generator that `draw` is given, in this order, and a choice that has one outcome only
    takes nothing from it: the bucket (with more than one; as likely as it has pictures), then a `randperm` of the
    bucket whenever its deck holds fewer than are drawn, then for each row its prompts (with more than one pair),
    whether they are dropped (if captions are dropped), and whether it is mirrored (if it has mirrored latents). With
    one bucket, one prompt pair and neither option, a draw is thus the deck of `randperm` epochs and nothing else.

    Args:
        examples: at least one; with masks or without, all of them.
        caption_dropout: share of rows, in [0, 1), whose two prompts are both empty.

    Raises:
        ValueError: naming what does not fit.
    """

    def __init__(self, examples: Sequence[Example], caption_dropout: float = 0.0):
        self.examples = tuple(examples)
        self.caption_dropout = check_dropout(caption_dropout)
        if not self.examples:
            raise ValueError("examples holds no picture, but a training takes at least one")
        channels = {len(example.latents) for example in self.examples}
        if len(channels) > 1:
            raise ValueError(f"examples have latents of {sorted(channels)} channels, but one model's are needed")
        masked, bare = ([e.name for e in self.examples if (e.mask is None) is absent] for absent in (False, True))
        if masked and bare:
            raise ValueError(
                f"example {masked[0]!r} has a mask and {bare[0]!r} has none; give all of them one, or none"
            )
        self._buckets: dict[str, list[Example]] = {}
        for example in self.examples:
            self._buckets.setdefault(_bucket(example), []).append(example)
        self.begin()

    @classmethod
    def of_latents(cls, latents: Tensor, concept: Concept) -> Dataset:
        """Pictures of one size, (N, C, h, w), with the concept's two prompts."""
        if latents.ndim != 4 or not len(latents):
            raise ValueError(f"latents is {tuple(latents.shape)}, but it takes (N, C, h, w) with at least one picture")
        own = latents.detach().to("cpu", torch.float32, copy=True)
        prompts = (concept.subject_prompt,), (concept.class_prompt,)
        return cls([Example(row, *prompts, name=f"picture {number}") for number, row in enumerate(own, 1)])

    def begin(self) -> None:
        """Draw from new epochs from now on, as if nothing had been drawn yet."""
        self._decks: dict[str, list[int]] = {name: [] for name in self._buckets}

    def prompts(self) -> list[str]:
        """Every prompt that can be drawn, once, in order; the empty one last if captions are dropped."""
        pairs = [pair for e in self.examples for pair in zip(e.subject_prompts, e.class_prompts)]
        dropped = [""] if self.caption_dropout else []
        return list(dict.fromkeys([prompt for pair in pairs for prompt in pair] + dropped))

    def draw(self, count: int, generator: torch.Generator) -> Rows:
        """`count` rows of one latent size; more than the bucket holds goes on into its next epoch."""
        check_count("count", count)
        name = next(iter(self._buckets))
        if len(self._buckets) > 1:
            name = _bucket(self.examples[_choose(len(self.examples), generator)])
        bucket, deck = self._buckets[name], self._decks[name]
        while len(deck) < count:
            deck += torch.randperm(len(bucket), generator=generator).tolist()
        examples = [bucket[index] for index in deck[:count]]
        del deck[:count]
        rows = [self._row(example, generator) for example in examples]
        latents, masks, subject, class_ = zip(*rows)
        return Rows(
            torch.stack(latents),
            list(subject),
            list(class_),
            None if masks[0] is None else torch.stack(masks),
            [example.name for example in examples],
        )

    def _row(self, example: Example, generator: torch.Generator) -> tuple[Tensor, Tensor | None, str, str]:
        pairs = list(zip(example.subject_prompts, example.class_prompts))
        subject, class_ = pairs[_choose(len(pairs), generator) if len(pairs) > 1 else 0]
        if self.caption_dropout and torch.rand(1, generator=generator).item() < self.caption_dropout:
            subject = class_ = ""
        if example.flipped is not None and _choose(2, generator):
            return example.flipped, None if example.mask is None else example.mask.flip(-1), subject, class_
        return example.latents, example.mask, subject, class_

    def state_dict(self) -> dict[str, list[int]]:
        """What is left of each bucket's epoch, by latent size ("64x48"): with the generator's state, all there is."""
        return {name: list(deck) for name, deck in self._decks.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        """Go on from a `state_dict`; ValueError if it is another dataset's."""
        sizes = {name: len(bucket) for name, bucket in self._buckets.items()}
        fits = state.keys() == sizes.keys() and all(0 <= i < sizes[name] for name in state for i in state[name])
        if not fits:
            raise ValueError(
                f"state is of sizes {', '.join(state)}, but this dataset has {sizes}; give its own pictures"
            )
        self._decks = {name: list(state[name]) for name in sizes}


def check_dropout(caption_dropout: float) -> float:
    """`caption_dropout` as a share in [0, 1)."""
    if check_number("caption_dropout", caption_dropout, minimum=0) >= 1:
        raise ValueError(f"caption_dropout is {caption_dropout!r}, but it takes a share of at least 0 and below 1")
    return float(caption_dropout)


def _bucket(example: Example) -> str:
    height, width = example.latents.shape[1:]
    return f"{height}x{width}"


def _choose(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))
