from __future__ import annotations

import json
import math

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.drift import DriftProbe
from anchor_core.objectives import OBJECTIVES
from anchor_core.training.events import Event, Measured, StepMade
from anchor_core.training.orders import Orders
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import TrainingDiverged, train

QUICK = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2}


def run(denoiser, latents, concept, *, adapter_seed=0, config=None, class_latents=None, probe=None, **settings):
    """Attach, train, detach: (history, adapter weights)."""
    adapter = denoiser.attach(config or AdapterConfig(rank=2), seed=adapter_seed)
    settings = TrainSettings(**{**QUICK, **settings})
    try:
        history = train(denoiser, adapter, latents, concept, settings, class_latents=class_latents, probe=probe)
        return history, adapter.state_dict()
    finally:
        denoiser.detach()


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_same_seed_same_training_bit_by_bit(denoiser, latents, concept, objective):
    config = AdapterConfig(rank=2, text_encoder=objective == "class_diffusion")
    options = {"objective": objective, "class_latents": latents.flip(0), "config": config}
    torch.manual_seed(1)
    history, weights = run(denoiser, latents, concept, **options)
    torch.manual_seed(2)
    again, weights_again = run(denoiser, latents, concept, **options)
    other, weights_other = run(denoiser, latents, concept, **options, seed=1)
    assert history.losses == again.losses and same(weights, weights_again)
    assert history.losses != other.losses and not same(weights, weights_other)


def test_dropout_is_seeded_too(eps_denoiser, latents, concept):
    config = AdapterConfig(rank=2, dropout=0.5)
    history, weights = run(eps_denoiser, latents, concept, config=config)
    again, weights_again = run(eps_denoiser, latents, concept, config=config)
    _, without = run(eps_denoiser, latents, concept)
    assert history.losses == again.losses and same(weights, weights_again)
    assert not same(weights, without)


def test_global_random_state_is_left_alone(eps_denoiser, latents, concept):
    before = torch.get_rng_state()
    run(eps_denoiser, latents, concept)
    assert torch.equal(torch.get_rng_state(), before)


def test_w_0_trains_what_reconstruction_trains(eps_denoiser, latents, concept):
    plain, plain_weights = run(eps_denoiser, latents, concept, objective="reconstruction")
    anchored, anchored_weights = run(eps_denoiser, latents, concept, objective="anchor", w=0.0)
    assert plain.losses == anchored.losses and same(plain_weights, anchored_weights)


def test_class_pictures_are_drawn_for_no_other_objective(eps_denoiser, latents, concept):
    """So that the references see the same noise whether class pictures were given or not."""
    with_class, weights = run(eps_denoiser, latents, concept, class_latents=latents.flip(0))
    without, weights_without = run(eps_denoiser, latents, concept)
    assert with_class.losses == without.losses and same(weights, weights_without)


def test_first_draws_are_shared_by_all_objectives(eps_denoiser, latents, concept):
    first = [
        run(eps_denoiser, latents, concept, objective=name, class_latents=latents, steps=1)[0].terms["reconstruction"]
        for name in ("reconstruction", "anchor", "prior_preservation")
    ]
    assert first[0] == first[1] == first[2]


@pytest.mark.parametrize(("objective", "passes"), [("reconstruction", 1), ("anchor", 2), ("prior_preservation", 2)])
def test_passes_of_a_step(eps_denoiser, latents, concept, objective, passes):
    calls = []
    hook = eps_denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    run(eps_denoiser, latents, concept, objective=objective, class_latents=latents)
    hook.remove()
    assert len(calls) == passes * QUICK["steps"]


def test_training_memorises_one_picture(denoiser, latents, concept):
    picture = latents[:1]
    adapter = denoiser.attach(AdapterConfig(rank=4, layers="."))  # convolutions too: the network is at random weights
    probe = DriftProbe(denoiser, picture, concept, timesteps=4, noises=4)
    settings = TrainSettings(objective="reconstruction", steps=60, learning_rate=1e-2, batch_size=8)
    history = train(denoiser, adapter, picture, concept, settings, probe=probe)
    assert history.probes[-1][1].reconstruction < 0.6 * history.probes[0][1].reconstruction
    assert sum(history.losses[-5:]) < 0.6 * sum(history.losses[:5])


def test_anchor_keeps_the_prediction_nearer_to_the_pretrained_one(eps_denoiser, latents, concept):
    drift = {}
    for w in (0.0, 1.0):
        adapter = eps_denoiser.attach(AdapterConfig(rank=8, layers="all_linear"))
        probe = DriftProbe(eps_denoiser, latents, concept, timesteps=4, noises=2)
        settings = TrainSettings(w=w, steps=30, learning_rate=1e-2, batch_size=4)
        drift[w] = train(eps_denoiser, adapter, latents, concept, settings, probe=probe).probes[-1][1].drift
        eps_denoiser.detach()
    assert drift[1.0] < drift[0.0]


def test_terms_sum_to_the_loss_and_history_is_json(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    probe = DriftProbe(eps_denoiser, latents, concept, timesteps=2, noises=1)
    events: list[Event] = []
    settings = TrainSettings(steps=5, batch_size=2, probe_every=2)
    history = train(eps_denoiser, adapter, latents, concept, settings, probe=probe, tell=events.append)
    assert set(history.terms) == {"reconstruction", "anchor"}
    reports = [event for event in events if isinstance(event, StepMade)]
    for index, report in enumerate(reports):
        assert (report.step, report.steps, report.loss) == (index + 1, 5, history.losses[index])
        assert report.loss == pytest.approx(sum(report.terms.values()), rel=1e-6)
        assert report.terms == {name: values[index] for name, values in history.terms.items()}
    assert [step for step, _ in history.probes] == [0, 2, 4, 5]
    measured = [event for event in events if isinstance(event, Measured)]
    assert [(event.step, event.result) for event in measured] == history.probes
    order = [(event.event, event.step) for event in events]
    assert order == sorted(order, key=lambda pair: (pair[1], pair[0] == "measured"))  # a step, then its measurement
    read = json.loads(json.dumps(history.to_dict(), allow_nan=False))
    assert read["losses"] == history.losses and read["probes"][1]["step"] == 2 and read["cancelled"] is False
    assert history.seconds > 0


def test_probe_does_not_change_the_training(eps_denoiser, latents, concept):
    plain, weights = run(eps_denoiser, latents, concept)
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    probe = DriftProbe(eps_denoiser, latents, concept, timesteps=3, noises=1)
    measured = train(eps_denoiser, adapter, latents, concept, TrainSettings(**QUICK, probe_every=1), probe=probe)
    assert measured.losses == plain.losses and same(weights, adapter.state_dict())


def test_an_order_to_end_keeps_what_was_learnt(eps_denoiser, latents, concept):
    _, two_steps = run(eps_denoiser, latents, concept, steps=2)
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    probe = DriftProbe(eps_denoiser, latents, concept, timesteps=2, noises=1)
    made = []
    history = train(
        eps_denoiser,
        adapter,
        latents,
        concept,
        TrainSettings(**{**QUICK, "steps": 50}),
        probe=probe,
        tell=made.append,
        orders=Orders(lambda: StepMade in map(type, made) and made[-1].step == 2),
    )
    assert history.cancelled and not history.stopped and len(history.losses) == 2
    assert [step for step, _ in history.probes] == [0, 2]
    assert same(adapter.state_dict(), two_steps)


def test_stop_before_the_first_step(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    before = adapter.state_dict()
    history = train(eps_denoiser, adapter, latents, concept, TrainSettings(), orders=Orders(lambda: True))
    assert history.cancelled and history.losses == [] and same(before, adapter.state_dict())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_of_a_listener_leaves_the_network_restorable(denoiser, latents, concept, make_step, error):
    with torch.no_grad():
        untouched = make_step(denoiser).subject
    parameters = {name: (id(p), p.detach().clone()) for name, p in denoiser.network.named_parameters()}
    adapter = denoiser.attach(AdapterConfig(rank=2, dropout=0.2))

    def fail(event: Event):
        if event.event == "step" and event.step == 2:
            raise error("stop here")

    with pytest.raises(error, match="stop here"):
        train(denoiser, adapter, latents, concept, TrainSettings(**QUICK), tell=fail)
    assert adapter.enabled
    with torch.no_grad():
        assert not torch.equal(make_step(denoiser).subject, untouched)
    denoiser.detach()
    for name, parameter in denoiser.network.named_parameters():
        assert id(parameter) == parameters[name][0] and torch.equal(parameter, parameters[name][1])
        assert parameter.grad is None
    with torch.no_grad():
        assert torch.equal(make_step(denoiser).subject, untouched)


def test_a_training_leaves_the_pretrained_network_as_it_was(denoiser, latents, concept, make_step):
    with torch.no_grad():
        untouched = make_step(denoiser).subject
    adapter = denoiser.attach(AdapterConfig(rank=2))
    train(denoiser, adapter, latents, concept, TrainSettings(**QUICK))
    with torch.no_grad(), denoiser.adapter_disabled():
        assert torch.equal(make_step(denoiser).subject, untouched)
    denoiser.detach()
    with torch.no_grad():
        assert torch.equal(make_step(denoiser).subject, untouched)


def test_nan_names_the_step_and_keeps_finite_weights(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    before = adapter.state_dict()
    bad = latents.clone()
    bad[:] = math.nan
    with pytest.raises(TrainingDiverged, match="loss became nan at step 1 of 4") as caught:
        train(eps_denoiser, adapter, bad, concept, TrainSettings(**QUICK))
    assert "\n" not in str(caught.value)
    assert same(before, adapter.state_dict())


def test_divergence_on_the_way_names_its_step(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))

    def poison(event: Event):
        if event.event == "step" and event.step == 3:
            with torch.no_grad():
                adapter.parameters()[1].fill_(math.inf)

    with pytest.raises(TrainingDiverged, match="at step 4 of 9"):
        train(eps_denoiser, adapter, latents, concept, TrainSettings(**{**QUICK, "steps": 9}), tell=poison)


def test_a_gradient_that_is_not_finite_changes_no_weight(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    before = adapter.state_dict()
    adapter.parameters()[1].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingDiverged, match="the gradient became .* at step 1 of 4"):
        train(eps_denoiser, adapter, latents, concept, TrainSettings(**QUICK))
    assert same(before, adapter.state_dict())


def test_each_epoch_shows_each_reference_once(eps_denoiser, latents, concept, monkeypatch):
    seen = []
    add_noise = eps_denoiser.add_noise
    monkeypatch.setattr(eps_denoiser, "add_noise", lambda z, n, t: seen.append(z) or add_noise(z, n, t))
    run(eps_denoiser, latents, concept, objective="reconstruction", steps=6, batch_size=2)
    rows = torch.cat(seen)
    order = [next(i for i in range(3) if torch.equal(row, latents[i])) for row in rows]
    assert all(sorted(order[start : start + 3]) == [0, 1, 2] for start in range(0, 12, 3))


def test_clipping_is_by_the_norm_of_the_whole_gradient(eps_denoiser, latents, concept):
    """Under a tiny clip, AdamW's own epsilon makes the steps small; without a clip they are not."""
    _, start = run(eps_denoiser, latents, concept, steps=1, learning_rate=1e-30)
    _, clipped = run(eps_denoiser, latents, concept, steps=1, grad_clip=1e-12, weight_decay=0.0)
    _, free = run(eps_denoiser, latents, concept, steps=1, grad_clip=0, weight_decay=0.0)
    name = next(name for name in start if name.endswith("lora_up.weight"))
    assert clipped[name].abs().max() < 0.01 * free[name].abs().max()


def test_training_runs_on_inference_tensors(eps_denoiser, latents, concept):
    """ComfyUI runs its nodes in inference mode and hands them inference tensors."""
    history, weights = run(eps_denoiser, latents, concept)
    with torch.inference_mode():
        given = latents.clone()
        again, weights_again = run(eps_denoiser, given, concept)
    assert history.losses == again.losses and same(weights, weights_again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w": -1}, "^w is -1, but it takes"),
        ({"w": math.nan}, "^w is nan, but it takes"),
        ({"w": "0.5"}, "^w is '0.5', but it takes"),
        ({"w": True}, "^w is True, but it takes"),
        ({"prior_weight": -1}, "^prior_weight is -1"),
        ({"steps": 0}, "^steps is 0, but it takes a whole number of at least 1"),
        ({"steps": -3}, "^steps is -3"),
        ({"steps": math.nan}, "^steps is nan"),
        ({"steps": "many"}, "^steps is 'many'"),
        ({"steps": 1.5}, "^steps is 1.5"),
        ({"learning_rate": 0}, "^learning_rate is 0, but it takes a finite number greater than 0"),
        ({"learning_rate": -1e-3}, "^learning_rate is -0.001"),
        ({"learning_rate": math.nan}, "^learning_rate is nan"),
        ({"learning_rate": "1e-3"}, "^learning_rate is '1e-3'"),
        ({"batch_size": 0}, "^batch_size is 0"),
        ({"weight_decay": -1}, "^weight_decay is -1"),
        ({"grad_clip": -1}, "^grad_clip is -1"),
        ({"beta1": 1.0}, "^beta1 is 1.0, but it takes a number below 1"),
        ({"beta2": -0.1}, "^beta2 is -0.1"),
        ({"ema": 1.0}, "^ema is 1.0"),
        ({"optimizer": "sgd"}, "^optimizer is 'sgd'.*adamw, adamw8bit, prodigy, schedule_free"),
        ({"schedule": "cosine", "optimizer": "schedule_free"}, "^schedule is 'cosine'"),
        ({"warmup": 300}, "^warmup is 300.*the 300 steps"),
        ({"timestep_min": 0.5, "timestep_max": 0.5}, "^timestep_max is 0.5"),
        ({"timestep_max": 1.5}, "^timestep_max is 1.5"),
        ({"gradient_checkpointing": "yes"}, "^gradient_checkpointing is 'yes'"),
        ({"seed": -1}, "^seed is -1"),
        ({"probe_every": 0}, "^probe_every is 0"),
        ({"objective": "dreambooth"}, "^objective is 'dreambooth'.*reconstruction, prior_preservation, anchor"),
        ({"anchor": "none"}, "^anchor is 'none'.*pretrained, current"),
    ],
)
def test_bad_settings_are_named_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        TrainSettings(**options)
    assert "\n" not in str(caught.value)


def test_missing_pictures_are_named(eps_denoiser, latents, concept):
    adapter = eps_denoiser.attach(AdapterConfig(rank=1))
    with pytest.raises(ValueError, match="references is"):
        train(eps_denoiser, adapter, latents[:0], concept, TrainSettings(**QUICK))
    with pytest.raises(ValueError, match="reads class pictures, but class_latents is None"):
        train(eps_denoiser, adapter, latents, concept, TrainSettings(**QUICK, objective="prior_preservation"))
