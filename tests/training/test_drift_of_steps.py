"""Fig. 8a to 8c from a training's own steps, and the readings of Fig. 2: what they are, and what they cost."""

from __future__ import annotations

import json

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.drift import LEVELS, QUANTITIES, DriftProbe, ProbeResult, tally
from anchor_core.objectives import make_objective
from anchor_core.training.events import StepMade
from anchor_core.training.history import History
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train


def counted(denoiser) -> list[int]:
    """Grows by one at each forward of the network."""
    calls: list[int] = []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    return calls


def epsilon(denoiser, prediction, noisy, timesteps):
    """By the definition of epsilon, in the model's own schedule."""
    if denoiser.prediction_type == "epsilon":
        return prediction
    cumulative = denoiser.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return (1 - cumulative).sqrt() * noisy + cumulative.sqrt() * prediction


def test_a_tally_is_of_predictions_that_are_there(denoiser, make_step, stir):
    stir(denoiser.attach(AdapterConfig(rank=2)))
    step = make_step(denoiser)
    make_objective("anchor", w=0.5)(step)
    calls = counted(denoiser)
    count, error, drift = tally(step).double()
    assert not calls
    with torch.no_grad():
        subject, anchor = (
            epsilon(denoiser, each, step.noisy, step.timesteps).double() for each in (step.subject, step.anchor)
        )
        level = (step.timesteps * LEVELS // 1000).long()
        for i in range(LEVELS):
            own = level == i
            assert count[i] == own.sum()
            expected = (subject - step.noise)[own].flatten(1).norm(dim=1).sum()
            torch.testing.assert_close(error[i], expected, rtol=1e-4, atol=1e-5)
            expected = (subject - anchor)[own].flatten(1).norm(dim=1).sum()
            torch.testing.assert_close(drift[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("objective", "passes"), [("anchor", 2), ("blended_target", 2), ("reconstruction", 1)])
def test_a_training_makes_no_pass_for_them(eps_denoiser, latents, concept, objective, passes):
    adapter, calls, told = eps_denoiser.attach(AdapterConfig(rank=2)), counted(eps_denoiser), []
    settings = TrainSettings(objective=objective, steps=3, batch_size=2, accumulation=2, micro_batch=1)
    history = train(eps_denoiser, adapter, latents, concept, settings, tell=told.append)
    assert len(calls) == 3 * 2 * 2 * passes  # of one row each
    assert sum(level[0] for level in history.levels) == 3 * 2 * 2
    names = ["reconstruction", "drift"] if passes == 2 else ["reconstruction"]
    assert {name: len(values) for name, values in history.distances.items()} == dict.fromkeys(names, 3)
    for i, event in enumerate(event for event in told if isinstance(event, StepMade)):
        assert event.distances == {name: history.distances[name][i] for name in names}
    rows = history.by_timestep()
    assert len(rows) == sum(level[0] > 0 for level in history.levels)
    for place, name in ((1, "reconstruction"), (2, "drift")):
        if name in names:
            every = sum(level[place] for level in history.levels) / 12
            assert every == pytest.approx(sum(history.distances[name]) / 3, rel=1e-6)
        else:
            assert [row[place] for row in rows] == [None] * len(rows)
    read = History.from_dict(json.loads(json.dumps(history.to_dict(), allow_nan=False)))
    assert read == history


def test_the_terms_of_one_picture_are_its_distances(eps_denoiser, latents, concept):
    """Fig. 8c: on one row of an epsilon model the terms are the squares of 8a and 8b over C h w."""
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    history = train(eps_denoiser, adapter, latents, concept, TrainSettings(steps=4, batch_size=1))
    size = latents[0].numel()
    for name, term, weight in (("reconstruction", "reconstruction", 1.0), ("drift", "anchor", 0.5)):
        squares = [weight * value**2 / size for value in history.distances[name]]
        assert squares == pytest.approx(history.terms[term], rel=1e-4)
    assert history.losses == pytest.approx([sum(each) for each in zip(*history.terms.values())])


def test_the_readings_of_figure_2(denoiser, latents, concept, stir):
    """Against a loop over single points, in epsilon by its definition."""
    adapter, samples = denoiser.attach(AdapterConfig(rank=2)), latents.flip(0)[:2] + 0.5
    stir(adapter)
    result = DriftProbe(denoiser, latents, concept, timesteps=2, noises=2, seed=5, class_latents=samples).measure()
    noises, others = (
        torch.randn((2, *latents.shape[1:]), generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)
    )
    subject, class_ = (denoiser.encode_prompt(prompt) for prompt in (concept.subject_prompt, concept.class_prompt))

    def predicted(z0, noise, t, condition):
        time = torch.tensor([t])
        noisy = denoiser.add_noise(z0[None], noise[None], time)
        return epsilon(denoiser, denoiser.predict(noisy, time, [condition]), noisy, time)

    curves = {"paired": [], "independent": []}
    with torch.no_grad():
        for t in (250, 750):
            found = {"paired": [], "independent": []}
            for i, z0 in enumerate(latents):
                for own, other in zip(noises, others):
                    ours = predicted(z0, own, t, subject)
                    with denoiser.adapter_disabled():
                        for name, noise in (("paired", own), ("independent", other)):
                            found[name].append((ours - predicted(samples[i % 2], noise, t, class_)).norm().item())
            for name, values in found.items():
                curves[name].append(sum(values) / len(values))
    for name, expected in curves.items():
        assert result.curves[name] == pytest.approx(expected, rel=2e-4)
        assert getattr(result, name) == pytest.approx(sum(expected) / 2, rel=2e-4)
    assert result.independent > result.drift


def test_they_add_no_pass_to_a_measurement(eps_denoiser, latents, concept):
    eps_denoiser.attach(AdapterConfig(rank=2))
    probe = DriftProbe(eps_denoiser, latents, concept, timesteps=2, noises=1, class_latents=latents[:1])
    calls = counted(eps_denoiser)
    result = probe.measure()
    assert len(calls) == 2  # the subject prompt's and the class prompt's, with the adapter
    assert set(result.curves) == {*QUANTITIES, "reconstruction_mse", "drift_mse"}
    by_step = [result.objective_by_timestep(0.5)[i] for i in range(2)]
    assert sum(by_step) / 2 == pytest.approx(result.objective(0.5), rel=1e-9)


def test_without_class_samples_two_readings_are_missing(eps_denoiser, latents, concept):
    result = DriftProbe(eps_denoiser, latents, concept, timesteps=1, noises=1).measure()
    assert result.paired is None and result.independent is None
    old = {name: value for name, value in result.to_dict().items() if name not in ("curves", "paired", "independent")}
    assert ProbeResult.from_dict(old).drift == result.drift
    with pytest.raises(ValueError, match="^class_latents is"):
        DriftProbe(eps_denoiser, latents, concept, class_latents=latents[..., :4])
