from __future__ import annotations

import json

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.concept import Concept
from anchor_core.drift import CHUNK, DriftProbe


def test_probe_is_the_plain_average_over_all_points(denoiser, latents, concept, stir):
    """Against a loop over single points, in epsilon space by the definition of epsilon."""
    adapter = denoiser.attach(AdapterConfig(rank=2))
    probe = DriftProbe(denoiser, latents, concept, timesteps=5, noises=3, seed=3)
    stir(adapter)
    result = probe.measure()

    noises = torch.randn((3, *latents.shape[1:]), generator=torch.Generator().manual_seed(3))
    subject = [denoiser.encode_prompt(concept.subject_prompt)]
    class_ = [denoiser.encode_prompt(concept.class_prompt)]

    def epsilon(z_t, t, condition):
        native = denoiser.predict(z_t, t, condition)
        if denoiser.prediction_type == "epsilon":
            return native
        cumulative = denoiser.scheduler.alphas_cumprod[t]
        return (1 - cumulative).sqrt() * z_t + cumulative.sqrt() * native

    expected = []
    with torch.no_grad():
        for t in (100, 300, 500, 700, 900):
            drifts, reconstructions = [], []
            for z0 in latents.split(1):
                for noise in noises.split(1):
                    time = torch.tensor([t])
                    z_t = denoiser.add_noise(z0, noise, time)
                    predicted = epsilon(z_t, time, subject)
                    with denoiser.adapter_disabled():
                        anchor = epsilon(z_t, time, class_)
                    drifts.append((predicted - anchor).norm().item())
                    reconstructions.append((predicted - noise).norm().item())
            expected.append((t, sum(drifts) / len(drifts), sum(reconstructions) / len(reconstructions)))

    assert len(latents) * 3 * 5 > CHUNK  # more than one chunk
    for got, wanted in zip(result.by_timestep, expected, strict=True):
        assert got == pytest.approx(wanted, rel=2e-4)
    assert result.drift == pytest.approx(sum(row[1] for row in expected) / 5, rel=1e-4)
    assert result.reconstruction == pytest.approx(sum(row[2] for row in expected) / 5, rel=1e-4)
    assert result.drift_rms == pytest.approx(result.drift / 16, rel=1e-9)  # sqrt(4 * 8 * 8) = 16


def test_drift_before_training_is_that_between_the_prompts(denoiser, latents, concept):
    """Fig. 8b does not start at 0, as the prompts differ; it does where their embeddings are the same."""
    denoiser.attach(AdapterConfig(rank=2))
    assert DriftProbe(denoiser, latents, concept, timesteps=2, noises=1).measure().drift > 0
    same = Concept(concept.subject_prompt, concept.class_prompt)
    object.__setattr__(same, "class_prompt", same.subject_prompt)
    assert DriftProbe(denoiser, latents, same, timesteps=2, noises=1).measure().drift == 0


def test_probe_is_fixed_and_the_anchor_is_made_once(eps_denoiser, latents, concept, stir):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    calls = []
    eps_denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    probe = DriftProbe(eps_denoiser, latents, concept)  # 3 x 10 x 4 = 120 points, 4 chunks
    assert len(calls) == 4
    first = probe.measure()
    assert len(calls) == 12  # the subject prompt's and the class prompt's pass, with the adapter
    assert probe.measure() == first
    stir(adapter)
    assert probe.measure().drift > first.drift
    assert [row[0] for row in first.by_timestep] == [50.0 + 100 * index for index in range(10)]
    with adapter.disabled():
        assert probe.measure() == first


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_drift_alone_takes_half_the_passes(eps_denoiser, latents, concept, stir, text_encoder):
    probe = DriftProbe(eps_denoiser, latents, concept, timesteps=3, noises=2)
    before = probe.drift()
    stir(eps_denoiser.attach(AdapterConfig(rank=2, text_encoder=text_encoder)))
    calls = []
    eps_denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    alone = probe.drift()
    passes = len(calls)
    assert alone == probe.measure().drift != before
    assert len(calls) == 3 * passes


def test_measuring_leaves_no_trace(eps_denoiser, latents, concept, stir):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    stir(adapter)
    state, weights = torch.get_rng_state(), adapter.state_dict()
    DriftProbe(eps_denoiser, latents, concept, timesteps=2, noises=1).measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in adapter.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in adapter.parameters())
    assert adapter.enabled and torch.is_grad_enabled()


def test_result_is_json_and_carries_its_latents(eps_denoiser, latents, concept):
    probe = DriftProbe(eps_denoiser, latents, concept, timesteps=2, noises=1, latents_are="class")
    read = json.loads(json.dumps(probe.measure().to_dict(), allow_nan=False))
    assert read["latents_are"] == "class" and len(read["by_timestep"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": 0}, "^timesteps is 0"),
        ({"noises": 0}, "^noises is 0"),
        ({"seed": -1}, "^seed is -1"),
        ({"latents_are": "other"}, "^latents_are is 'other'.*references, class"),
    ],
)
def test_bad_options_are_named(eps_denoiser, latents, concept, options, message):
    with pytest.raises(ValueError, match=message):
        DriftProbe(eps_denoiser, latents, concept, **options)


def test_no_latents_is_an_error(eps_denoiser, latents, concept):
    with pytest.raises(ValueError, match="^latents is"):
        DriftProbe(eps_denoiser, latents[:0], concept)
