"""The report of `bench speed`, from measurements that are there: none is made again."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from anchor_core.bench import peak, speed

CPU = torch.device("cpu")
KEPT = [
    {"method": "comfyui, stock", "seconds": [10.0], "peak": 8e9},
    {"method": "comfyui, plain", "seconds": [2.0, 4.0, 2.0], "peak": 4e9},
    {"method": "comfyui, anchored", "seconds": [5.0], "peak": 4e9},
    {"method": "comfyui, stock CFG", "seconds": [2.0, 2.0], "peak": 4e9},
    {"method": "comfyui, personalization", "seconds": [2.2, 2.2], "peak": 5e9},
    {"method": "comfyui, autoguidance", "seconds": [2.1], "peak": 4e9},
    {"method": "comfyui, mixed", "seconds": [2.9], "peak": 6e9},
]


@pytest.fixture
def report(tmp_path):
    first = {**asdict(speed.Spec()), "machine": speed.machine()}
    rows = [first, *({"round": 0, **row} for row in KEPT)]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = [row["method"] for row in KEPT]
    speed.run(tmp_path, rounds=1, comfyui=tmp_path, python=tmp_path, methods=methods)
    return json.loads((tmp_path / "report.json").read_text())


@pytest.fixture
def ratios(report):
    return report["ratios"]


def test_a_ratio_is_of_medians_of_one_round(ratios):
    assert ratios["ours_over_stock"] == pytest.approx(0.2)
    assert ratios["anchored_over_stock"] == pytest.approx(0.5)
    assert ratios["ours_over_stock_memory"] == pytest.approx(0.5)


def test_guided_over_cfg_is_of_the_slowest_rule_of_two_branches(ratios):
    assert ratios["guided_over_cfg, mixed"] == pytest.approx(1.45)
    assert ratios["guided_over_cfg"] == pytest.approx(1.1)


def test_the_memory_of_a_rule_is_over_that_of_cfg(report):
    assert report["ratios"]["guided_over_cfg, mixed, memory"] == pytest.approx(1.5)
    assert report["ratios"]["guided_over_cfg, personalization, memory"] == pytest.approx(1.25)
    assert report["methods"]["comfyui, personalization"]["peak GB"] == pytest.approx(5)


def test_what_was_not_measured_is_null_with_a_reason(report):
    for name in ("bank_over_plain", "guided_over_cfg, switching", "guided_over_cfg, switching, memory"):
        assert report["ratios"][name] is None
        assert report["reasons"][name] == "not measured in this run"


@pytest.mark.skipif(not peak._RESET.exists(), reason="only Linux can begin anew")
def test_a_peak_is_of_what_came_after_its_beginning():
    def resident(size):
        peak.begin(CPU)
        before = peak.taken(CPU)
        torch.ones(size // 4)
        return peak.taken(CPU) - before

    assert resident(256 << 20) == pytest.approx(256 << 20, rel=0.1)
    assert resident(16 << 20) < 64 << 20
