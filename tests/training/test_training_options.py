"""Noise levels, min-SNR, optimizers, schedules, EMA, accumulation, precision, gradient checkpointing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.data.dataset import Dataset, Example
from anchor_core.drift import DriftProbe
from anchor_core.objectives import semantic_anchoring
from anchor_core.training.gradient_checkpointing import checkpointed
from anchor_core.training.keeping import Candidates
from anchor_core.training.noise_levels import min_snr_weights, sample_levels
from anchor_core.training.optimizers import AveragedWeights, make_optimizer, make_schedule
from anchor_core.training.parallel import Workers
from anchor_core.training.settings import OPTIMIZERS, SCHEDULES, TrainSettings
from anchor_core.training.trainer import train
from tests.backends import tiny_models

QUICK = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2}


def run(denoiser, references, concept, config=None, **settings):
    """Attach, train, detach: (history, adapter weights)."""
    options = {name: settings.pop(name) for name in ("class_latents", "probe", "workers") if name in settings}
    adapter = denoiser.attach(config or AdapterConfig(rank=2))
    try:
        history = train(denoiser, adapter, references, concept, TrainSettings(**{**QUICK, **settings}), **options)
        return history, adapter.state_dict()
    finally:
        denoiser.detach()


def levels(count=20000, **settings) -> torch.Tensor:
    return sample_levels(count, torch.Generator().manual_seed(0), TrainSettings(**settings))


def test_levels_have_the_distribution_that_is_asked_for():
    normal = torch.distributions.Normal(0.0, 1.0)
    for settings, median_of in (
        ({}, lambda q: q),
        ({"timestep_sampling": "logit_normal", "timestep_mean": 0.5, "timestep_std": 0.7},
         lambda q: torch.sigmoid(0.5 + 0.7 * normal.icdf(torch.tensor(q))).item()),
        ({"timestep_sampling": "shifted", "timestep_shift": 3.0}, lambda q: 3 * q / (1 + 2 * q)),
        ({"timestep_min": 0.2, "timestep_max": 0.6}, lambda q: 0.2 + 0.4 * q),
    ):  # fmt: skip
        drawn = levels(**settings)
        for quantile in (0.1, 0.5, 0.9):
            assert drawn.quantile(quantile).item() == pytest.approx(median_of(quantile), abs=0.015), settings


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "shifted"])
def test_levels_stay_in_their_range(sampling):
    drawn = levels(timestep_sampling=sampling, timestep_std=20.0, timestep_min=0.3, timestep_max=0.9)
    assert drawn.min() >= 0.3 and drawn.max() < 0.9


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_the_error_on_z_0_by_min_snr_and_gamma(kind):
    """In whichever space the error is taken, on z_0 its weight is min(SNR, gamma)."""
    alpha = torch.tensor([0.99, 0.9, 0.5, 0.1], dtype=torch.float64)
    sigma = (1 - alpha.square()).sqrt()
    snr = (alpha / sigma).square()
    z_0, noise, wrong = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    z_t = alpha * z_0 + sigma * noise
    if kind == "epsilon":
        error = (z_t - alpha * wrong) / sigma - noise
    else:
        error = (alpha * z_t - wrong) / sigma - (alpha * noise - sigma * z_0)
    weighted = min_snr_weights(snr, 5.0, kind) * error.square()
    torch.testing.assert_close(weighted, snr.clamp(max=5.0) * (wrong - z_0).square())


def test_min_snr_weights_the_training(eps_denoiser, latents, concept):
    plain, _ = run(eps_denoiser, latents, concept, steps=1, batch_size=1, objective="reconstruction")
    weighted, _ = run(eps_denoiser, latents, concept, steps=1, batch_size=1, objective="reconstruction", min_snr=5.0)
    generator = torch.Generator().manual_seed(0)
    Dataset.of_latents(latents, concept).draw(1, generator)
    level = sample_levels(1, generator, TrainSettings())
    factor = min_snr_weights(eps_denoiser.snr(eps_denoiser.timesteps(level)), 5.0, "epsilon").item()
    assert weighted.losses[0] == pytest.approx(factor * plain.losses[0], rel=1e-5)


def test_min_snr_on_a_flow_model_is_refused_before_anything_is_measured(tmp_path, latents, concept):
    denoiser = tiny_models.denoiser_of(tiny_models.build("sd3", tmp_path))
    probe, passes = DriftProbe(denoiser, latents, concept, timesteps=1, noises=1), []
    denoiser.network.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match="^min_snr is 5, but it takes 0 on a flow model"):
        run(denoiser, latents, concept, min_snr=5.0, probe=probe)
    assert not passes


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    parameter = torch.nn.Parameter(torch.zeros(1))
    settings = TrainSettings(steps=20, warmup=4, schedule=schedule, learning_rate=0.1)
    optimizer = make_optimizer([parameter], settings)
    steps = make_schedule(optimizer, settings)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.zeros(1)
        optimizer.step()
        steps.step()
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    middle = rates[12]
    assert middle == pytest.approx({"constant": 0.1, "cosine": 0.05, "linear": 0.05}[schedule])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 if schedule == "constant" else 0.0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(eps_denoiser, latents, concept, optimizer):
    rate = 1.0 if optimizer == "prodigy" else 1e-2
    history, _ = run(
        eps_denoiser, latents[:1], concept, AdapterConfig(rank=8, layers="^(?!conv_out)"), objective="reconstruction",
        optimizer=optimizer, learning_rate=rate, steps=40, batch_size=4,
    )  # fmt: skip
    assert sum(history.losses[-8:]) < 0.9 * sum(history.losses[:8])


def test_an_optimizer_whose_package_is_missing_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="optimizer is 'adamw8bit', which needs the package bitsandbytes"):
        make_optimizer([torch.nn.Parameter(torch.zeros(1))], TrainSettings(optimizer="adamw8bit"))


def test_accumulated_gradients_are_the_mean_of_the_passes(eps_denoiser, latents, concept):
    """At a learning rate of nearly 0, two steps and one step of two passes see the same rows on the same weights."""
    gradients = {}
    for accumulation in (1, 2):
        adapter = eps_denoiser.attach(AdapterConfig(rank=2))
        seen = gradients[accumulation] = []
        adapter.parameters()[1].register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        settings = TrainSettings(
            steps=2 // accumulation, accumulation=accumulation, batch_size=1, learning_rate=1e-30, weight_decay=0.0
        )
        history = train(eps_denoiser, adapter, latents, concept, settings)
        gradients[f"loss {accumulation}"] = sum(history.losses) / len(history.losses)
        eps_denoiser.detach()
    torch.testing.assert_close(gradients[2][1], (gradients[1][0] + gradients[1][1]) / 2)
    assert gradients["loss 2"] == pytest.approx(gradients["loss 1"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_near_full_precision_and_keeps_the_adapter_in_float32(
    eps_denoiser, latents, concept, precision
):
    full, _ = run(eps_denoiser, latents, concept, steps=6)
    low, weights = run(eps_denoiser, latents, concept, steps=6, precision=precision)
    assert low.losses != full.losses
    assert low.losses == pytest.approx(full.losses, rel=0.05)
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_fp16_leaves_out_a_step_whose_scaled_gradient_overflows(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    before = adapter.state_dict()
    handle = adapter.parameters()[1].register_hook(lambda gradient: gradient * math.inf)
    settings = TrainSettings(**{**QUICK, "steps": 1}, precision="fp16")
    train(eps_denoiser, adapter, latents, concept, settings, tell=lambda _: handle.remove())
    assert all(torch.equal(before[name], value) for name, value in adapter.state_dict().items())


def test_ema_is_the_running_mean_and_is_what_is_kept():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = AveragedWeights([parameter], 0.9, torch.optim.SGD([parameter], lr=1.0))
    expected = torch.zeros(3)
    for number in range(1, 40):
        with torch.no_grad():
            parameter.add_(1.0)
        average.update()
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * parameter.detach()
    with average:
        torch.testing.assert_close(parameter.detach(), expected)
    assert parameter[0] == 39
    average.apply()
    torch.testing.assert_close(parameter.detach(), expected)


def test_ema_does_not_change_the_training_but_what_is_kept(eps_denoiser, latents, concept):
    plain, weights = run(eps_denoiser, latents, concept)
    smooth, averaged = run(eps_denoiser, latents, concept, ema=0.9)
    assert plain.losses == smooth.losses
    assert any(not torch.equal(weights[name], averaged[name]) for name in weights)


def test_probe_measures_the_averaged_weights(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    probe = DriftProbe(eps_denoiser, latents, concept, timesteps=2, noises=1)
    settings = TrainSettings(**QUICK, ema=0.9, probe_every=4)
    history = train(eps_denoiser, adapter, latents, concept, settings, probe=probe)
    assert history.probes[-1][1] == probe.measure()


def test_gradient_checkpointing_gives_the_same_gradients_and_computes_blocks_again(eps_denoiser, make_step, stir):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2, layers="all_linear"))
    stir(adapter)

    def gradients():
        loss = sum(semantic_anchoring(make_step(eps_denoiser)).values())
        return torch.autograd.grad(loss, adapter.parameters())

    calls = []
    first = eps_denoiser.blocks[1]
    hook = first.register_forward_pre_hook(lambda *_: calls.append(1))
    inner = next(module for module in first.modules() if isinstance(module, torch.nn.Linear))
    inner_hook = inner.register_forward_pre_hook(lambda *_: calls.append(2))
    plain = gradients()
    before = calls.count(2)
    with checkpointed(eps_denoiser.blocks):
        again = gradients()
    hook.remove(), inner_hook.remove()
    assert calls.count(2) - before == 3 and before == 2  # subject, anchor, and the subject's once more
    for one, other in zip(plain, again):
        torch.testing.assert_close(one, other)
    assert all("forward" not in block.__dict__ for block in eps_denoiser.blocks)


def test_gradient_checkpointing_trains_the_same_adapter(eps_denoiser, latents, concept):
    _, plain = run(eps_denoiser, latents, concept)
    _, saved = run(eps_denoiser, latents, concept, gradient_checkpointing=True)
    for name, value in plain.items():
        torch.testing.assert_close(value, saved[name])


def test_rows_train_with_their_own_prompts_and_masks(eps_denoiser, latents, concept):
    """A mask takes the error of what it covers: where two pictures differ outside of it, nothing changes."""
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    prompts = {"subject_prompts": (concept.subject_prompt,), "class_prompts": (concept.class_prompt,)}
    seen = []
    encode = eps_denoiser.encode_prompt
    eps_denoiser.encode_prompt = lambda prompt, adapted=False: seen.append(prompt) or encode(prompt)
    whole, _ = run(eps_denoiser, Dataset([Example(latents[0], **prompts)]), concept, steps=1)
    masked, _ = run(eps_denoiser, Dataset([Example(latents[0], mask=mask, **prompts)]), concept, steps=1)
    assert whole.losses != masked.losses
    ones, _ = run(eps_denoiser, Dataset([Example(latents[0], mask=torch.ones(1, 8, 8), **prompts)]), concept, steps=1)
    assert ones.losses == pytest.approx(whole.losses, rel=1e-6)
    assert set(seen) == {concept.subject_prompt, concept.class_prompt}


def test_two_workers_see_the_halves_of_the_larger_batch(eps_denoiser, latents, concept):
    """Without anything to average between them, each worker's loss is that of its half of the rows."""
    whole, _ = run(eps_denoiser, latents, concept, steps=1, batch_size=4)
    halves = []
    for rank in range(2):
        alone = Workers(rank, 2)
        object.__setattr__(alone, "average", lambda tensors: None)
        halves.append(run(eps_denoiser, latents, concept, steps=1, batch_size=2, workers=alone)[0].losses[0])
    assert whole.losses[0] == pytest.approx(sum(halves) / 2, rel=1e-5)
    assert halves[0] != halves[1]


def test_workers_average_as_many_gradients_whatever_captions_they_drop(eps_denoiser, latents, concept):
    """Else the sizes that two processes add up would differ where one of them saw the token and the other did not."""
    dataset = Dataset.of_latents(latents, concept)
    dataset.caption_dropout, sizes = 0.5, []
    for rank in range(2):
        alone, seen = Workers(rank, 2), []
        object.__setattr__(
            alone, "average", lambda tensors, seen=seen: seen.append([len(t.reshape(-1)) for t in tensors])
        )
        run(eps_denoiser, dataset, concept, AdapterConfig(rank=2, vectors=1), steps=6, batch_size=1, workers=alone)
        sizes.append(seen)
    assert sizes[0] == sizes[1] and len(sizes[0]) == 6


def test_drift_budget_ends_the_training_within_it(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=8, layers="all_linear"))
    probe = DriftProbe(eps_denoiser, latents, concept, timesteps=4, noises=1)
    settings = TrainSettings(w=0.0, steps=40, learning_rate=1e-2, probe_every=2)
    free = train(eps_denoiser, adapter, latents, concept, settings, probe=probe)
    drifts = dict((step, result.drift) for step, result in free.probes)
    budget = (drifts[0] + max(drifts.values())) / 2
    over = next(step for step, drift in drifts.items() if drift > budget)
    eps_denoiser.detach()

    adapter = eps_denoiser.attach(AdapterConfig(rank=8, layers="all_linear"))
    history = train(
        eps_denoiser, adapter, latents, concept, replace(settings, stop_on_drift=budget), probe=probe
    )  # fmt: skip
    assert history.over_budget and len(history.losses) == over and history.kept == over - 2
    assert probe.measure().drift == drifts[over - 2] <= budget


def test_a_budget_below_the_model_itself_is_refused(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    probe = DriftProbe(eps_denoiser, latents, concept, timesteps=2, noises=1)
    with pytest.raises(ValueError, match="^stop_on_drift is 1e-06, but the model alone measures"):
        train(eps_denoiser, adapter, latents, concept, TrainSettings(**QUICK, stop_on_drift=1e-6), probe=probe)


@pytest.mark.parametrize("rate", [3e-2, 3e-3])  # too large a one, and one that goes on learning to the end
def test_best_is_the_earliest_measurement_with_nine_tenths_of_the_gain_in_eq_5(eps_denoiser, latents, concept, rate):
    adapter = eps_denoiser.attach(AdapterConfig(rank=8, layers="all_linear"))
    probe = DriftProbe(eps_denoiser, latents, concept, timesteps=4, noises=1)
    settings = TrainSettings(w=0.75, steps=40, learning_rate=rate, probe_every=4, keep="best")
    history = train(eps_denoiser, adapter, latents, concept, settings, probe=probe)
    scores = {step: r.reconstruction_mse + 0.75 * r.drift_mse for step, r in history.probes}
    best = min(scores.values())
    assert history.kept == next(step for step in scores if scores[step] <= best + 0.1 * (scores[0] - best))
    assert probe.measure().objective(0.75) == scores[history.kept]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([10.0], 0),
        ([10.0, 11.0, 12.0], 0),
        ([10.0, 5.0, 1.0, 0.0], 2),
        ([10.0, 5.0, 0.9, 4.0, 0.0, 0.5], 2),
        ([10.0, 5.0, 1.1, 4.0, 0.0, 0.5], 4),
        ([10.0, 1.0, 2.0, 0.5, -20.0], 4),
    ],
)
def test_which_candidate_is_kept(scores, kept):
    candidates = Candidates("best")
    for step, score in enumerate(scores):
        candidates.offer(step, score, dict)
    assert candidates.kept["step"] == kept
    again = Candidates("best")
    again.load_state_dict(candidates.state_dict())
    again.offer(99, -1000.0, dict)
    assert again.kept["step"] == 99


@pytest.mark.parametrize("scores", [[3.0, 2.0], [3.0, 4.0], [3.0, 4.0, 3.5]])
def test_the_last_candidate_is_kept_however_it_scores(scores):
    """Over the drift budget the last within it is kept, though it fit the pictures worse than the model did."""
    candidates = Candidates("last")
    for step, score in enumerate(scores):
        candidates.offer(step, score, dict)
    assert candidates.kept["step"] == len(scores) - 1


def test_keeping_the_best_needs_a_probe(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    with pytest.raises(ValueError, match="read the drift probe, but there is none"):
        train(eps_denoiser, adapter, latents, concept, TrainSettings(**QUICK, keep="best"))
