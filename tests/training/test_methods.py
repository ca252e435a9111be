"""Methods by name, and the combinations of options that would train nothing."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.concept import Concept
from anchor_core.data.dataset import Dataset, Example
from anchor_core.training.methods import METHODS, check_combination, method_settings
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train
from tests.backends import tiny_models
from tests.comfyui import contract
from tests.training.parts import CONCEPT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "none"}, "^kind is 'none' and vectors is 0"),
        ({"kind": "none", "vectors": 1, "text_encoder": True}, "^text_encoder is True, but with kind 'none'"),
        ({"kind": "loha", "layers": "everything"}, "^layers is 'everything', which has norms too, but kind 'loha'"),
        ({"kind": "full", "dropout": 0.5}, "^dropout is 0.5, but with kind 'full' it takes 0"),
        ({"vectors": -1}, "^vectors is -1"),
        ({"vectors": 1, "token": " "}, "^token is ' ', but it takes a word"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**options)


PROMPTS = [("a photo of a sks dog", "a photo of a dog")]


@pytest.mark.parametrize(
    ("settings", "options", "arguments", "message"),
    [
        ({"objective": "prior_preservation"}, {}, {}, "^objective is 'prior_preservation', but with kind 'none'"),
        ({}, {"token": "zwx"}, {}, "^token is 'zwx', but the subject prompt 'a photo of a sks dog' does not have"),
        ({}, {"token": "sk"}, {}, "^token is 'sk', but the subject prompt"),
        ({}, {"token": "dog"}, {}, "^token is 'dog', but the class prompt 'a photo of a dog' has that word too"),
        ({}, {}, {"caption_dropout": 0.1}, "^caption_dropout is 0.1, but with kind 'none'"),
    ],
)
def test_a_combination_that_trains_nothing_is_refused(settings, options, arguments, message):
    config = AdapterConfig(**{"kind": "none", "vectors": 1, **options})
    with pytest.raises(ValueError, match=message) as error:
        check_combination(TrainSettings(**settings), config, PROMPTS, **arguments)
    assert "\n" not in str(error.value)


def test_the_trainer_refuses_before_its_first_step(pipelines):
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    adapter = denoiser.attach(AdapterConfig(kind="none", vectors=1))
    latents = contract.draw(denoiser, tiny_models.LATENT, 1)[0].cpu()
    captions = Dataset([Example(latents, ("a sks dog", "a photo"), ("a dog", "a photo"))])
    with pytest.raises(ValueError, match="^token is 'sks', but the subject prompt 'a photo' does not have"):
        train(denoiser, adapter, captions, Concept("a sks dog", "a dog"), TrainSettings(steps=1))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_from_its_options(pipelines, name):
    settings, config, _ = method_settings(name, steps=2, rank=4)
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    adapter = denoiser.attach(config)
    start = adapter.state_dict()
    latents = contract.draw(denoiser, tiny_models.LATENT, 2)
    history = train(denoiser, adapter, latents, CONCEPT, settings, class_latents=latents.flip(0))
    assert len(history.losses) == 2
    assert any(not torch.equal(start[key], tensor) for key, tensor in adapter.state_dict().items())
    denoiser.detach()


def test_a_methods_options_are_defaults():
    settings, config, data = method_settings("custom_diffusion", steps=7)
    assert (settings.objective, settings.steps, settings.learning_rate) == ("prior_preservation", 7, 4e-5)
    assert (config.kind, config.layers, config.vectors, data.flip) == ("full", "cross_attention_kv", 1, True)
    with pytest.raises(ValueError, match="^method is 'dreambooth2', but it takes one of semantic_anchoring, "):
        method_settings("dreambooth2")
    with pytest.raises(ValueError, match="^stepps is no option"):
        method_settings("oft", stepps=3)
