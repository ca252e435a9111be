"""Means over subjects with their intervals: what a figure of a benchmark says of subjects that were not in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..checks import check_count

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean over subjects and its percentile bootstrap interval (Efron 1979).

    Attributes:
        mean: of the subjects' means, each subject counting once.
        low, high: of `LEVEL`; None for one subject, which says nothing of others.
        subjects, runs: how many there are, and how many values they have together.
    """

    mean: float
    low: float | None
    high: float | None
    subjects: int
    runs: int


def bootstrap(values: Mapping[str, Sequence[float]], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The interval of the mean of values by subject, one a seed or picture.

    Subjects are drawn with replacement, with all of their values: those of one subject are alike, so that it is
    subjects that are the sample. Percentile intervals of fewer than ten subjects are somewhat too narrow.

    Raises:
        ValueError: without a value.
    """
    check_count("resamples", resamples)
    means = np.array([np.mean(each, dtype=np.float64) for each in values.values() if len(each)])
    if not len(means):
        raise ValueError("values holds none, but an interval takes one at least")
    runs = sum(map(len, values.values()))
    if len(means) == 1:
        return Interval(float(means[0]), None, None, 1, runs)
    drawn = np.random.default_rng(seed).integers(len(means), size=(resamples, len(means)))
    low, high = np.quantile(means[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(means.mean()), float(low), float(high), len(means), runs)
