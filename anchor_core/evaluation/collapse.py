"""Semantic collapse: how far a subject's prompts have moved from those of its class, and towards each other.

Distances of sets of text representations, as in the diagnostics of test-time embedding adjustment (arXiv 2506.22685):
P prompts with the subject's token, Q the same ones with the class word, S simple prompts with the token. A subject that
takes over its prompts is far from Q and close to S, and its prompts are close to each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_number

KL_FLOOR = 1e-8
"""Added to both distributions, as in the authors' notebook."""


def l2(x: Tensor, y: Tensor) -> float:
    """mean_ij |x_i - y_j| of (N, D) and (M, D); of a set with itself every row's distance of 0 to itself counts."""
    return torch.cdist(*_checked(x, y)).mean().item()


def hausdorff(x: Tensor, y: Tensor) -> float:
    """max(max_i min_j |x_i - y_j|, max_j min_i |x_i - y_j|) of (N, D) and (M, D).

    For a set with itself (the same tensor) it is the largest distance to the nearest other row.
    """
    distances = torch.cdist(*_checked(x, y))
    if x is y:
        distances.fill_diagonal_(torch.inf)
    return max(distances.amin(dim=1).max().item(), distances.amin(dim=0).max().item())


def mahalanobis(x: Tensor, y: Tensor, shrinkage: float = 0.0) -> float:
    """mean_i sqrt((x_i - mu_Y)^T (Sigma_Y + shrinkage I)^+ (x_i - mu_Y)), Sigma_Y the unbiased covariance of (M, D).

    Without shrinkage the inverse is the pseudo-inverse, which is blind to what lies outside the span of Y. For M - 1
    <= D a set's distance from itself is then (M - 1) / sqrt(M) whatever the points are: it says nothing.
    """
    check_number("shrinkage", shrinkage, minimum=0)
    x, y = _checked(x, y)
    mean = y.mean(dim=0)
    _, singular, axes = torch.linalg.svd(y - mean, full_matrices=False)
    kept = singular > singular[0] * max(y.shape) * torch.finfo(y.dtype).eps
    variances, axes = singular[kept].square() / (len(y) - 1), axes[kept]
    along = (x - mean) @ axes.T  # (N, rank)
    squares = (along.square() / (variances + shrinkage)).sum(dim=1)
    if shrinkage:
        squares = squares + ((x - mean).square().sum(dim=1) - along.square().sum(dim=1)).clamp(min=0) / shrinkage
    return squares.sqrt().mean().item()


def kl(x: Tensor, y: Tensor, temperature: float = 1.0) -> float:
    """mean_i sum_j p_ij log(p_ij / q_ij), p_i = softmax_j(cos(x_i, x_j) / temperature), q_i of y alike.

    It compares which prompts are alike in the two sets, of (N, D) each, row by row; 0 for a set with itself.
    """
    check_number("temperature", temperature, above=0)
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows and y {len(y)}, but the two sets go in pairs; give as many of each")
    p, q = (_alike(each, temperature) for each in _checked(x, y))
    return (p * (p / q).log()).sum(dim=1).mean().item()


def _alike(x: Tensor, temperature: float) -> Tensor:
    unit = torch.nn.functional.normalize(x, dim=1)
    return (unit @ unit.T / temperature).softmax(dim=1) + KL_FLOOR


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, each in (("x", x), ("y", y)):
        if each.ndim != 2 or len(each) < 2:
            raise ValueError(f"{name} is {tuple(each.shape)}, but it takes (N, D) with at least two rows")
    return x.double(), y.double()


DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "l2": l2,
    "hausdorff": hausdorff,
    "mahalanobis": mahalanobis,
    "kl": kl,
}


def collapse(subject: Tensor, class_: Tensor, simple: Tensor | None = None) -> dict[str, dict[str, float]]:
    """The distances of P (N, D) from Q (N, D), from itself, and from S (M, D) if there is one, by name.

    As in the authors' curves, the Mahalanobis distance of P and Q is that of Q's rows from P, and KL is KL(Q | P).
    KL needs sets that go in pairs, so there is none from S.
    """
    found = {}
    for name, distance in DISTANCES.items():
        found[name] = {"from_class": distance(class_, subject), "within": distance(subject, subject)}
        if simple is not None and name != "kl":
            found[name]["from_simple"] = distance(simple, subject)
    return found
