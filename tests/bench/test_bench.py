"""The demo, run for a few steps, and the means that it prints."""

from __future__ import annotations

import json

import pytest
import torch

from anchor_core.adapters.file import load_adapter
from anchor_core.bench import demo, sandbox_settings
from anchor_core.evaluation import metrics


def test_mean_pairwise_cosine_counts_every_pair():
    generated = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    references = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    expected = (1 + 0.5**0.5 + 0 + 0 + 0.5**0.5 + 1) / 6
    assert metrics.mean_pairwise_cosine(generated, references) == pytest.approx(expected)


def test_text_alignment_pairs_row_with_row():
    pictures, prompts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    assert metrics.text_alignment(pictures, prompts) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="go in pairs"):
        metrics.text_alignment(pictures, prompts[:1])


def test_demo_writes_what_it_promises(tmp_path, monkeypatch):
    monkeypatch.setitem(sandbox_settings.SAMPLING, "steps", 2)
    monkeypatch.setattr(sandbox_settings, "CLASS_PICTURES", 4)
    monkeypatch.setitem(demo.CONFIG, "probe", {"timesteps": 1, "noises": 1, "class_pictures": 0})
    result = demo.run(tmp_path, "bolt", seed=1, steps=2)
    written = json.loads((tmp_path / "report.json").read_text())
    assert set(written["methods"]) == {"dreambooth", "prior_preservation", "anchored"}
    for row in written["methods"].values():
        assert {"subject_fidelity", "text_alignment", "drift", "seconds", "adapter"} <= set(row)
        load_adapter(tmp_path / row["adapter"])
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert demo.table(result).count("\n") == 3


def test_tables_leave_the_tuning_subjects_out():
    assert not set(sandbox_settings.TABLE_SUBJECTS) & set(sandbox_settings.TUNING_SUBJECTS)
    assert len(sandbox_settings.TABLE_SUBJECTS) >= 8
