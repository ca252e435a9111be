"""The report of `bench speed`, from measurements that are there: none is made again."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from anchor_core.bench import speed

RULES = {
    "stock": [[2.0, 2.0]],
    "stock again": [[3.0, 3.0]],
    "personalization": [[2.2, 2.2]],
    "autoguidance": [[2.1]],
    "mixed": [[2.9]],
}
KEPT = [
    {"method": "comfyui, stock", "seconds": [10.0], "peak": 8e9},
    {"method": "comfyui, plain", "seconds": [2.0, 4.0, 2.0], "peak": 4e9},
    {"method": "comfyui, anchored", "seconds": [5.0], "peak": 4e9},
    {"method": "comfyui, guidance", "rules": RULES},
]


@pytest.fixture
def ratios(tmp_path):
    first = {**asdict(speed.Spec()), "machine": speed.machine()}
    rows = [first, *({"round": 0, **row} for row in KEPT)]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = [row["method"] for row in KEPT]
    speed.run(tmp_path, rounds=1, comfyui=tmp_path, python=tmp_path, methods=methods)
    return json.loads((tmp_path / "report.json").read_text())


def test_a_ratio_is_of_medians_of_one_round(ratios):
    assert ratios["ratios"]["ours_over_stock"] == pytest.approx(0.2)
    assert ratios["ratios"]["anchored_over_stock"] == pytest.approx(0.5)
    assert ratios["ratios"]["ours_over_stock_memory"] == pytest.approx(0.5)


def test_guided_over_cfg_is_of_the_slowest_rule_of_two_passes_and_not_of_the_control(ratios):
    assert ratios["ratios"]["guided_over_cfg, mixed"] == pytest.approx(1.45)
    assert ratios["ratios"]["guided_over_cfg"] == pytest.approx(1.1)
    assert ratios["ratios"]["guided_over_cfg, stock again"] == pytest.approx(1.5)


def test_what_was_not_measured_is_null_with_a_reason(ratios):
    assert ratios["ratios"]["bank_over_plain"] is None
    assert ratios["reasons"]["bank_over_plain"] == "not measured in this run"
