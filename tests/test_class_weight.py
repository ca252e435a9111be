"""The term that holds the class prompt's own prediction: `class_weight` of the anchored objective."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.denoiser import Texts
from anchor_core.drift import DriftProbe
from anchor_core.objectives import OBJECTIVES, make_objective, mse
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

W, V = 0.5, 0.7


def networks(denoiser) -> tuple[torch.nn.Module, torch.nn.Module]:
    return denoiser.network, denoiser.text_encoder


def predicted(denoiser, pair, step, prompt: str) -> torch.Tensor:
    """By a network and a text encoder in float64, past all of ours."""
    network, text_encoder = pair
    ids = denoiser.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    hidden = text_encoder(ids)[0].repeat(len(step.noisy), 1, 1)
    return network(step.noisy.double(), step.timesteps, encoder_hidden_states=hidden).sample


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_gradient_is_that_of_the_formula_in_float64(denoiser, make_step, concept, stir, text_encoder):
    untouched = [deepcopy(network).double() for network in networks(denoiser)]
    adapter = denoiser.attach(AdapterConfig(rank=2, text_encoder=text_encoder))
    stir(adapter, size=0.2)
    step = make_step(denoiser)

    def encode(prompts):
        return denoiser.encode_prompts(prompts, adapted=text_encoder)

    step.subject_conditions = encode([concept.subject_prompt] * 3)
    step._texts = Texts([concept.class_prompt] * 3, encode, concept.subject_prompt)
    terms = make_objective("anchor", w=W, class_weight=V)(step)
    found = torch.autograd.grad(sum(terms.values()), adapter.parameters())

    current = [network.double() for network in networks(denoiser)]
    with torch.no_grad():
        anchor = predicted(denoiser, untouched, step, concept.class_prompt)

    def loss() -> torch.Tensor:
        subject, class_ = (
            predicted(denoiser, current, step, p) for p in (concept.subject_prompt, concept.class_prompt)
        )
        errors = [(subject - step.target.double()), (subject - anchor), (class_ - anchor)]
        return sum(weight * error.square().mean() for weight, error in zip((1, W, V), errors))

    parameters = adapter.parameters()
    assert all(parameter.dtype == torch.float64 for parameter in parameters)
    expected = torch.autograd.grad(loss(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))

    generator, step_size = torch.Generator().manual_seed(1), 1e-5  # and of the formula without autograd
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(parameters, directions):
                parameter += sign * step_size * direction
            ends.append(loss())
    slope = sum((gradient * direction).sum() for gradient, direction in zip(expected, directions))
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step_size), slope, rtol=1e-5, atol=1e-8)


def test_at_0_a_training_is_bit_for_bit_that_of_equation_5(eps_denoiser, latents, concept, monkeypatch):
    def equation_5(step, w=0.5, anchor="pretrained", class_weight=0.0):
        return {
            "reconstruction": mse(step.subject, step.target),
            "anchor": w * mse(step.subject, step.anchor),
        }

    ends = []
    for objective in (OBJECTIVES["anchor"], equation_5):
        monkeypatch.setitem(OBJECTIVES, "anchor", objective)
        adapter = eps_denoiser.attach(AdapterConfig(rank=2, text_encoder=True))
        history = train(eps_denoiser, adapter, latents, concept, TrainSettings(steps=3, batch_size=2))
        ends.append((adapter.state_dict(), history.terms))
        eps_denoiser.detach()
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(tensor, ends[1][0][name]) for name, tensor in ends[0][0].items())


def test_it_holds_the_class_and_is_logged_as_its_own_term(eps_denoiser, latents, concept):
    moved, terms = {}, {}
    for weight in (0.0, 4.0):
        adapter = eps_denoiser.attach(AdapterConfig(rank=4, text_encoder=True))
        probe = DriftProbe(eps_denoiser, latents, concept, timesteps=3, noises=1)
        settings = TrainSettings(
            objective="anchor", w=0.0, class_weight=weight, steps=40, batch_size=2, learning_rate=1e-2, probe_every=40
        )
        history = train(eps_denoiser, adapter, latents, concept, settings, probe=probe)
        eps_denoiser.detach()
        moved[weight], terms[weight] = history.probes[-1][1].class_drift, history.terms
    assert list(terms[0.0]) == ["reconstruction"] and list(terms[4.0]) == ["reconstruction", "class"]
    assert terms[4.0]["class"][0] == pytest.approx(0, abs=1e-9)  # nothing has moved before the first step
    assert moved[4.0] < 0.7 * moved[0.0]


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "anchor"])
def test_an_objective_without_it_refuses_it(objective):
    with pytest.raises(ValueError, match=f"^class_weight is 0.5, but it goes with the objective anchor.*'{objective}'"):
        TrainSettings(objective=objective, class_weight=0.5)
    with pytest.raises(ValueError, match="^class_weight is -1"):
        TrainSettings(class_weight=-1.0)


def test_token_vectors_alone_refuse_it(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(kind="none", vectors=1))
    with pytest.raises(ValueError, match="^objective is 'anchor'.*its own term trains nothing.*class_weight 0"):
        train(eps_denoiser, adapter, latents, concept, TrainSettings(steps=1, class_weight=0.5))
