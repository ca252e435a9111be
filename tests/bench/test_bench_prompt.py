"""A row of the class prompt: what it has become under an adapter."""

from __future__ import annotations

import json

import pytest

from anchor_core.bench import runner
from anchor_core.bench.config import parse, read_config
from anchor_core.bench.rows import PRETRAINED
from anchor_core.bench.sandbox_settings import TUNING_SUBJECTS

RAW = {
    "subjects": ["bolt"], "seeds": [1], "training": {"steps": 1, "batch_size": 1, "objective": "reconstruction"},
    "sampling": {"steps": 2}, "probe": {"timesteps": 1, "noises": 1, "class_pictures": 0},
    "trainings": {"nothing": {"learning_rate": 1e-12}, "much": {"learning_rate": 1e-1}},
    "samplings": {"class": {"of": ["nothing", "much"], "prompt": "class"}},
}  # fmt: skip


def test_it_is_the_untouched_models_until_something_is_learnt(tmp_path):
    runner.run(parse(RAW), tmp_path / "out", jobs=1)
    found = {}
    for file in (tmp_path / "out" / "cells").rglob("*.json"):
        cell = json.loads(file.read_text(encoding="utf-8"))
        (scores,) = cell["scores"].values()
        found[cell["row"]] = scores["picture_similarity"]
    assert found["nothing + class"] == pytest.approx(found[PRETRAINED], abs=1e-3)
    assert abs(found["much + class"] - found[PRETRAINED]) > 1e-2
    assert abs(found["nothing"] - found[PRETRAINED]) > 1e-3  # the subject's prompt has a word more


def test_it_takes_one_of_the_two_prompts():
    with pytest.raises(ValueError, match=r"^samplings.nothing \+ class: prompt is 'null', but it takes one of subject"):
        parse({**RAW, "samplings": {"class": {"of": ["nothing"], "prompt": "null"}}})


def test_the_settings_are_chosen_on_the_tuning_subjects_alone():
    assert set(read_config("tune").subjects) == set(TUNING_SUBJECTS)
