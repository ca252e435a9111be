"""The distances of semantic collapse, in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from anchor_core.evaluation.collapse import collapse, hausdorff, kl, l2, mahalanobis


def draw(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rows", "width"), [(5, 8), (9, 8), (7, 100)])
def test_a_small_sets_mahalanobis_distance_from_itself_says_nothing(rows, width):
    for seed in range(3):
        x = draw(rows, width, seed) * torch.logspace(-2, 2, width, dtype=torch.float64) + 3
        assert mahalanobis(x, x) == pytest.approx((rows - 1) / math.sqrt(rows), rel=1e-9)
    spread = [
        mahalanobis(draw(rows, width, seed) * (1 + seed), draw(rows, width, seed) * (1 + seed), 1.0) for seed in (0, 1)
    ]
    assert abs(spread[0] - spread[1]) > 1e-3


def test_mahalanobis_is_that_of_the_covariance():
    x, y = draw(4, 3, 1), draw(50, 3, 2)
    for shrinkage in (0.0, 0.5):
        inverse = torch.linalg.inv(torch.cov(y.T) + shrinkage * torch.eye(3, dtype=torch.float64))
        off = x - y.mean(dim=0)
        expected = torch.einsum("nd,de,ne->n", off, inverse, off).sqrt().mean().item()
        assert mahalanobis(x, y, shrinkage) == pytest.approx(expected, rel=1e-9)
    x, y = draw(4, 12, 1), draw(5, 12, 2)  # shrinkage counts what the pseudo-inverse does not see
    inverse = torch.linalg.inv(torch.cov(y.T) + 0.5 * torch.eye(12, dtype=torch.float64))
    off = x - y.mean(dim=0)
    expected = torch.einsum("nd,de,ne->n", off, inverse, off).sqrt().mean().item()
    assert mahalanobis(x, y, 0.5) == pytest.approx(expected, rel=1e-9)


def test_kl_of_a_set_with_itself_is_zero_and_otherwise_positive():
    x, y = draw(6, 4), draw(6, 4, 1)
    assert kl(x, x) == 0 and kl(x, y) > 0 and kl(x, 3 * x) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="^x has 6 rows and y 5"):
        kl(x, y[:5])


def test_hausdorff_is_symmetric_and_reads_the_farthest_row():
    x, y = draw(6, 4), draw(9, 4, 1)
    assert hausdorff(x, y) == hausdorff(y, x)
    line = torch.tensor([[0.0], [1.0], [5.0]])
    assert hausdorff(line, line[:2]) == 4 and hausdorff(line, line) == 4 and hausdorff(line, line.clone()) == 0


def test_l2_counts_a_row_with_itself():
    pair = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert l2(pair, pair) == 2.5 and l2(pair, pair[1:].repeat(2, 1)) == 2.5


def test_collapse_names_which_set_is_measured_against_which():
    p, q, s = draw(6, 4), draw(6, 4, 1), draw(3, 4, 2)
    found = collapse(p, q, s)
    assert found["mahalanobis"] == {
        "from_class": mahalanobis(q, p),
        "within": mahalanobis(p, p),
        "from_simple": mahalanobis(s, p),
    }
    assert found["kl"] == {"from_class": kl(q, p), "within": 0.0}
    assert found["l2"]["from_class"] == l2(p, q) and found["hausdorff"]["within"] == hausdorff(p, p)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4), torch.zeros(4)])
def test_sets_of_other_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match="^x is .*at least two rows"):
        l2(wrong, torch.zeros(3, 4))
