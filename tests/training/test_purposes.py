"""What a preset decides for a family, the number of pictures, and what was given besides."""

from __future__ import annotations

from dataclasses import fields

import pytest

from anchor_core.adapters.config import AdapterConfig
from anchor_core.families import FAMILIES
from anchor_core.training.presets import PRESETS
from anchor_core.training.purposes import DECIDED, MANUAL, PURPOSES, purpose_options
from anchor_core.training.settings import TrainSettings

WORKING = [purpose for purpose in PURPOSES if purpose != MANUAL]


@pytest.mark.parametrize("purpose", WORKING)
@pytest.mark.parametrize("family", (*FAMILIES, ""))
def test_every_purpose_decides_the_same_options_of_every_family(family, purpose):
    options = purpose_options(purpose, family, 5, flow=True)
    assert options.keys() == DECIDED.keys()
    for kind in (TrainSettings, AdapterConfig):
        kind(**{field.name: options[field.name] for field in fields(kind) if field.name in options})


def test_what_is_decided_has_the_defaults_of_the_settings_where_a_family_says_nothing():
    """But for those that each family says, and the rate of the sandbox, which the settings have."""
    everywhere = set.intersection(*(set(preset.options) for preset in PRESETS.values()))
    defaults = {field.name: field.default for kind in (TrainSettings, AdapterConfig) for field in fields(kind)}
    assert all(DECIDED[name] == defaults[name] for name in DECIDED.keys() - everywhere)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_is_the_table(family):
    options = purpose_options("auto", family, 5)
    told = {name: value for name, value in PRESETS[family].options.items() if name != "resolution"}
    assert {name: options[name] for name in told} == told


def test_manual_decides_nothing_and_what_is_given_wins():
    assert purpose_options(MANUAL, "sd1", 0) == {}
    left = purpose_options("auto", "flux", 5, given={"timestep_mean", "rank"})
    assert left.keys() == DECIDED.keys() - {"timestep_mean", "rank"}
    assert purpose_options("auto", "", 5, optimizer="prodigy")["learning_rate"] == 1.0
    assert purpose_options("auto", "sd1", 5, kind="oft")["learning_rate"] == 6e-5
    with pytest.raises(ValueError, match="^preset is 'fast', but it takes one of auto, quick try, subject"):
        purpose_options("fast", "sd1", 5)
    with pytest.raises(ValueError, match="^pictures is 0"):
        purpose_options("auto", "sd1", 0)


def test_each_purpose_is_turned_towards_what_it_says():
    auto = {family: purpose_options("auto", family, 5) for family in FAMILIES}
    for family, usual in auto.items():
        quick, subject, style, low = (purpose_options(each, family, 7) for each in WORKING[1:])
        assert quick["steps"] == usual["steps"] // 4 and quick["rank"] <= usual["rank"]
        assert subject["steps"] == 7 * (30 if family == "sandbox" else 100)
        assert style["rank"] >= 32 and style["layers"] != "attention"
        # Not one row less a step, one after another.
        assert (low["batch_size"], low["micro_batch"]) == (1, 1) and low["gradient_checkpointing"]
        assert low["accumulation"] == usual["batch_size"] * usual["accumulation"]
    assert not purpose_options("low memory", "", 5)["gradient_checkpointing"]  # its blocks may not be known
    assert purpose_options("auto", "", 5, flow=True)["timestep_sampling"] == "logit_normal"
    assert purpose_options("auto", "", 5, flow=False)["timestep_sampling"] == "uniform"
