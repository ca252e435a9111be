"""Ranks and averages of the protocol, against the tables printed in the paper."""

from __future__ import annotations

import pytest
import torch

from anchor_core.evaluation import metrics

# CLIP-I, CLIP-T, DINO as printed in arXiv 2511.22245, in the order of its rows.
TABLE_1 = {
    "Ours": (0.7821, 0.3059, 0.6031),
    "IP-Adapter": (0.8311, 0.2646, 0.6290),
    "SuDe": (0.7791, 0.3044, 0.5931),
    "DreamBooth (FT)": (0.7751, 0.3035, 0.5870),
    "SVDiff": (0.7455, 0.3162, 0.5144),
    "DreamBooth (LoRA)": (0.7302, 0.3191, 0.4839),
    "Custom Diffusion": (0.6479, 0.3154, 0.5568),
    "Textual Inversion": (0.7579, 0.2633, 0.5287),
    "BLIP-Diffusion": (0.7016, 0.2949, 0.4544),
}
TABLE_1_MEANS = [2.667, 3.333, 3.667, 4.667, 5.0, 5.333, 5.667, 6.667, 8.0]
TABLE_2_SDXL = [(0.7939, 0.3107, 0.6586), (0.7874, 0.3140, 0.6429), (0.8005, 0.3154, 0.6661)]
TABLE_2_SD3 = [(0.7465, 0.3182, 0.5130), (0.7461, 0.3211, 0.4997), (0.7579, 0.3187, 0.5679)]


def test_ranks_of_the_papers_first_table():
    means, places = metrics.rank(list(TABLE_1.values()))
    assert means == pytest.approx(TABLE_1_MEANS, abs=5e-4)
    assert places == list(range(1, 10))
    turned, backwards = metrics.rank(list(TABLE_1.values())[::-1])
    assert turned == means[::-1] and backwards == places[::-1]


def test_ranks_of_the_papers_second_table_with_its_tie():
    assert metrics.rank(TABLE_2_SDXL)[1] == [2, 3, 1]
    means, places = metrics.rank(TABLE_2_SD3)
    assert means == pytest.approx([7 / 3, 7 / 3, 4 / 3])
    assert places == [2, 3, 1]  # DreamBooth and BFT tie: the row above comes first
    assert metrics.rank([TABLE_2_SD3[i] for i in (1, 0, 2)])[1] == [2, 3, 1]


def test_equal_values_share_the_mean_of_their_ranks():
    assert metrics.rank([[1.0], [3.0], [1.0], [2.0]])[0] == [3.5, 1.0, 3.5, 2.0]
    with pytest.raises(ValueError, match="table is empty"):
        metrics.rank([])


def test_real_against_real_leaves_each_picture_itself_out():
    references = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert metrics.real_against_real(references) == pytest.approx((0 + 2 * 0.5**0.5) / 3)
    with pytest.raises(ValueError, match="two or more"):
        metrics.real_against_real(references[:1])


def test_subjects_count_once_and_pairs_once_when_pooled():
    average = metrics.Average.of([0.2, 0.8], [3, 1])
    assert (average.mean, average.pooled) == (pytest.approx(0.5), pytest.approx(0.35))
    assert average.spread == pytest.approx(0.6 / 2**0.5)
    assert metrics.Average.of([0.2], [3]).spread is None
    assert (average.low, average.high) == (pytest.approx(0.2), pytest.approx(0.8))  # one of four resamples each
    assert metrics.Average.of([0.2], [3]).low is None
