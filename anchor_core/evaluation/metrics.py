"""Scores of generated pictures from their embeddings (DreamBench's CLIP-I, CLIP-T and DINO), whatever made those."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .intervals import bootstrap

METRICS = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO"}
"""Of each metric, larger is better."""

PUBLISHED_REAL = {"clip_i": 0.885, "dino": 0.774}
"""Real pictures with one another over DreamBench's 30 subjects (DreamBooth, Table 1)."""

PictureEncoder = Callable[[Sequence[Tensor]], Tensor]
"""Pictures (3, H, W) in [0, 1], of any sizes, to embeddings (N, D) of any norm."""
TextEncoder = Callable[[Sequence[str]], Tensor]
"""Prompts to embeddings (N, D) in the space of the pictures' ones."""


@dataclass(frozen=True)
class Encoders:
    """What gives the embeddings; a metric without its encoder is left out.

    Args:
        clip: picture half of CLIP, for CLIP-I and CLIP-T.
        text: text half of the same CLIP, for CLIP-T.
        dino: for DINO.
        names: metric -> what stands behind it, for reports.
    """

    clip: PictureEncoder | None = None
    text: TextEncoder | None = None
    dino: PictureEncoder | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.clip is None and self.dino is None:
            raise ValueError("encoders holds no picture encoder, but a comparison takes one at least: CLIP, DINO")
        if self.text is not None and self.clip is None:
            raise ValueError("encoders holds CLIP's text encoder alone, but CLIP-T takes its picture encoder too")

    @property
    def metrics(self) -> list[str]:
        """The metrics that these encoders give, in the order of `METRICS`."""
        given = {"clip_i": self.clip, "clip_t": self.text, "dino": self.dino}
        return [name for name in METRICS if given[name] is not None]

    def embed(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        """Pictures to their embeddings (N, D) by encoder, `clip` and `dino`."""
        encoders = {"clip": self.clip, "dino": self.dino}
        return {name: encode(pictures) for name, encode in encoders.items() if encode is not None}


def mean_pairwise_cosine(generated: Tensor, references: Tensor) -> float:
    """Mean cosine over all pairs of generated (N, D) and reference (M, D) embeddings: CLIP-I and DINO (DreamBooth)."""
    return float(_cosines(generated, references).mean())


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """(N, M), in double precision: a mean of thousands is then the same in every order."""
    return F.normalize(one.double(), dim=-1) @ F.normalize(other.double(), dim=-1).T


def real_against_real(references: Tensor) -> float:
    """Mean cosine over all pairs i != j of one subject's real pictures (M, D): what CLIP-I and DINO can reach.

    DreamBooth's Table 1 has 0.885 (CLIP-I) and 0.774 (DINO) over DreamBench, which tells whether an encoder and its
    preprocessing are the paper's. ValueError for fewer than two pictures.
    """
    count = len(references)
    if count < 2:
        raise ValueError(f"references holds {count} picture, but real against real takes two or more")
    cosines = _cosines(references, references)
    return float(cosines[~torch.eye(count, dtype=torch.bool, device=cosines.device)].mean())


def text_alignment(pictures: Tensor, prompts: Tensor) -> float:
    """Mean cosine of each picture (N, D) with its own prompt (N, D): CLIP-T."""
    if pictures.shape != prompts.shape:
        raise ValueError(f"pictures is {tuple(pictures.shape)}, prompts {tuple(prompts.shape)}, but they go in pairs")
    return float(F.cosine_similarity(pictures.double(), prompts.double(), dim=-1).mean())


@dataclass(frozen=True)
class Average:
    """A metric over subjects.

    Attributes:
        mean: of the subjects' means, each subject counting once (the default of the table).
        spread: standard deviation of the subjects' means; None for one subject.
        pooled: over all pairs of all subjects, so that subjects with more pictures count more (OFT's evaluation).
        low, high: the 95 % interval of the mean by a bootstrap over subjects; None for one subject.
    """

    mean: float
    spread: float | None
    pooled: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], counts: Sequence[int]) -> Average:
        """Of each subject's mean and the number of pairs that it is the mean of."""
        spread = statistics.stdev(values) if len(values) > 1 else None
        pooled = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
        interval = bootstrap({str(number): [value] for number, value in enumerate(values)})
        return cls(statistics.fmean(values), spread, pooled, interval.low, interval.high)


def rank(table: Sequence[Sequence[float]]) -> tuple[list[float], list[int]]:
    """The mean rank and the place of each row (system) of a table with a column a metric, of which larger is better.

    Rows are ranked in each column from 1, equal values at the mean of their ranks; places go by the mean over the
    columns, 1 first. Rows of the same mean keep their order, as the tables of arXiv 2511.22245 do.
    """
    columns = [list(column) for column in zip(*table, strict=True)]
    if not columns:
        raise ValueError("table is empty, but ranks take one row and one column at least")

    def position(value: float, column: list[float]) -> float:
        return 1 + sum(other > value for other in column) + (column.count(value) - 1) / 2

    means = [statistics.fmean(position(value, column) for value, column in zip(row, columns)) for row in table]
    order = sorted(range(len(means)), key=means.__getitem__)  # stable
    return means, [order.index(row) + 1 for row in range(len(means))]
