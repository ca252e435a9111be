"""Options by family of models, and how they go with what is given."""

from __future__ import annotations

from dataclasses import fields

import pytest

from anchor_core import cli
from anchor_core.adapters.config import AdapterConfig
from anchor_core.commands.training import with_preset
from anchor_core.families import FAMILIES, unet_family
from anchor_core.training.presets import PRESETS, preset_options
from anchor_core.training.settings import TrainSettings
from tests.backends import tiny_models


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_preset_of_known_options_with_its_source(family):
    preset, known = PRESETS[family], {}
    for part in (TrainSettings, AdapterConfig):
        names = {field.name for field in fields(part)} & preset.options.keys()
        known |= {name: preset.options[name] for name in names}
        part(**{name: preset.options[name] for name in names})
    assert preset.options.keys() - known.keys() <= {"resolution"}
    wanted = {"learning_rate", "steps", "rank", "batch_size", "layers", "timestep_sampling", "gradient_checkpointing"}
    assert wanted <= preset.options.keys() and preset.source


def test_none_is_left_over():
    assert set(PRESETS) == set(FAMILIES)


def test_what_is_given_wins_over_the_preset():
    assert preset_options("auto", "sdxl")["learning_rate"] == 1e-4
    assert preset_options("auto", "sdxl", given={"learning_rate", "rank"}).keys().isdisjoint({"learning_rate", "rank"})
    assert preset_options("flux", "sdxl")["steps"] == 2000
    assert preset_options("none", "sdxl") == preset_options("auto", "") == {}
    assert preset_options("auto", "sd1", optimizer="prodigy")["learning_rate"] == 1.0
    assert preset_options("auto", "sd1", kind="full")["learning_rate"] == 5e-6
    with pytest.raises(ValueError, match="^preset is 'sd9', but it takes one of auto, none, sd1"):
        preset_options("sd9", "sd1")


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_the_diffusers_backend_names_its_families(tmp_path, name):
    family = tiny_models.denoiser_of(tiny_models.build(name, tmp_path)).family
    assert family == {"sd2_v": "sd1"}.get(name, name)  # that UNet is as narrow as the other, and not 1024


def test_unets_are_told_by_the_width_of_their_text():
    assert [unet_family(width) for width in (768, 1024, 128, 32)] == ["sd1", "sd2", "sandbox", "sd1"]


@pytest.fixture
def taken(monkeypatch):
    """`taken(option, ...)`: the settings and the adapter of `train` on the embedded model, with these options."""

    def settings_of(*options: str) -> tuple[TrainSettings, AdapterConfig]:
        seen = []
        monkeypatch.setattr(cli.commands, "train", lambda given: seen.append(given))
        call = ["train", "--model", "sandbox", "--references", "x", "--subject", "a sks star", "--class", "a star"]
        assert cli.main([*call, "--out", "x", *options]) == 0
        return with_preset(seen[0], "sandbox", told=False)

    return settings_of


def test_the_command_line_takes_the_preset_of_the_model(taken):
    settings, config = taken()
    assert (settings.learning_rate, settings.steps, config.rank, config.layers) == (1e-3, 150, 8, "all_linear_conv")


def test_what_is_given_wins_on_the_command_line_also_where_it_is_the_default(taken):
    assert taken("--learning_rate", "1e-3", "--steps", "7")[0].learning_rate == TrainSettings.learning_rate
    assert taken("--no-gradient-checkpointing", "--preset", "flux")[0].gradient_checkpointing is False
    assert taken("--preset", "none")[0] == TrainSettings(preset="none")


def test_a_methods_own_options_win_over_the_preset(taken):
    settings, config = taken("--method", "semantic_anchoring", "--rank", "3")
    assert (settings.learning_rate, settings.steps, config.rank) == (1e-4, 500, 3)
