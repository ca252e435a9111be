"""Semantic collapse: how far a subject's prompts have moved from those of its class, and towards each other.

Distances of sets of text representations, as in the diagnostics of test-time embedding adjustment (arXiv 2506.22685):
P prompts with the subject's token, Q the same ones with the class word, S simple prompts with the token. A subject that
takes over its prompts is far from Q and close to S, and its prompts are close to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number

CHUNK = 512
"""Rows whose distances are held at once: with 10,000 rows, 41 MB."""
SHRINKAGE = 0.01
"""Of the second Mahalanobis distance, as a share of the mean variance of the set's dimensions."""
KL_FLOOR = 1e-8
"""Added to both distributions, as in the authors' notebook."""


def _blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The distances |x_i - y_j| of (N, D) and (M, D), `CHUNK` rows at a time, (CHUNK, M)."""
    for rows in x.split(CHUNK):
        yield torch.cdist(rows, y)


def l2(x: Tensor, y: Tensor) -> float:
    """mean_ij |x_i - y_j| of (N, D) and (M, D); of a set with itself every row's distance of 0 to itself counts."""
    x, y = _checked(x, y)
    return sum(block.sum().item() for block in _blocks(x, y)) / (len(x) * len(y))


def hausdorff(x: Tensor, y: Tensor) -> float:
    """max(max_i min_j |x_i - y_j|, max_j min_i |x_i - y_j|) of (N, D) and (M, D).

    For a set with itself (the same tensor) it is the largest distance to the nearest other row.
    """
    itself = x is y
    x, y = _checked(x, y)
    farthest, nearest, start = 0.0, torch.full((len(y),), torch.inf, dtype=y.dtype, device=y.device), 0
    for block in _blocks(x, y):
        if itself:
            block.diagonal(start).fill_(torch.inf)
        farthest = max(farthest, block.amin(dim=1).max().item())
        nearest, start = torch.minimum(nearest, block.amin(dim=0)), start + len(block)
    return max(farthest, nearest.max().item())


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
    x, y = (torch.nn.functional.normalize(each, dim=1) for each in _checked(x, y))
    total = 0.0
    for rows in zip(x.split(CHUNK), y.split(CHUNK)):
        p, q = (_alike(part, whole, temperature) for part, whole in zip(rows, (x, y)))
        total += (p * (p / q).log()).sum().item()
    return total / len(x)


def _alike(rows: Tensor, unit: Tensor, temperature: float) -> Tensor:
    return (rows @ unit.T / temperature).softmax(dim=1) + KL_FLOOR


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


def shrinkage_of(y: Tensor, share: float = SHRINKAGE) -> float:
    """`share` of the mean variance of a set's dimensions, (M, D): what makes its covariance invertible."""
    return share * y.double().var(dim=0).mean().item()


def collapse(subject: Tensor, class_: Tensor, simple: Tensor | None = None) -> dict[str, dict[str, float]]:
    """The distances of P (N, D) from Q (N, D), from itself, and from S (M, D) if there is one, by name.

    As in the authors' curves, the Mahalanobis distance of P and Q is that of Q's rows from P, and KL is KL(Q | P).
    KL needs sets that go in pairs, so there is none from S. `mahalanobis_shrunk` has P's covariance made invertible by
    `shrinkage_of`, and so says something of few rows too.
    """
    found = {}
    for name, distance in {**DISTANCES, "mahalanobis_shrunk": _shrunk}.items():
        found[name] = {"from_class": distance(class_, subject), "within": distance(subject, subject)}
        if simple is not None and name != "kl":
            found[name]["from_simple"] = distance(simple, subject)
    return found


def _shrunk(x: Tensor, y: Tensor) -> float:
    return mahalanobis(x, y, shrinkage_of(y))


def last_positions(conditions: Sequence[Tensor | Sequence[Tensor]]) -> Tensor:
    """The representation of encoded prompts, (N, D): the text encoder's last position, as in the authors' notebook."""
    return torch.stack([(each if isinstance(each, Tensor) else each[0])[-1] for each in conditions]).float().cpu()


# --- the embedding table --------------------------------------------------------------------------------------------


def token_norms(table: Tensor, vectors: Tensor, class_rows: Tensor) -> dict[str, Any]:
    """Lengths of input embeddings, and where a subject's token stands among them.

    Args:
        table: of the text encoder, (V, D).
        vectors: the token's own, (n, D).
        class_rows: of the class word's tokens, (m, D).
    """
    lengths = table.double().norm(dim=1)
    own, class_ = vectors.double().to(lengths.device), class_rows.double().to(lengths.device)
    cosines = torch.nn.functional.normalize(own, dim=1) @ torch.nn.functional.normalize(class_.mean(dim=0), dim=0)
    return {
        "lengths": lengths.cpu(),
        "token": own.norm(dim=1).tolist(),
        "class": class_.norm(dim=1).tolist(),
        "cosine": cosines.tolist(),
        "share_shorter": [(lengths < length).double().mean().item() for length in own.norm(dim=1)],
    }


def draw_norms(axes, norms: Mapping[str, Any], marked: Mapping[str, Sequence[float]], bins: int = 1000) -> None:
    """The histogram of the lengths of all input embeddings, with a line for each word of `marked`."""
    axes.hist(norms["lengths"].numpy(), bins=bins, color="0.6")
    for number, (word, lengths) in enumerate(marked.items()):
        for length in lengths:
            axes.axvline(length, color=f"C{number}", linewidth=1, label=word)
            word = "_" + word  # one entry in the legend
    axes.set(xlabel="length of an input embedding", ylabel="tokens", title="lengths of the embedding table")
    axes.legend(fontsize=8)
