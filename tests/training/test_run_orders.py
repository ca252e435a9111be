"""Orders that change what a training gives: the weights of a saved step, and more steps than planned."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import load_adapter
from anchor_core.data.prepare import prepare
from anchor_core.training.checkpoint import Checkpoints
from anchor_core.training.events import Ended, Measured, PhaseBegun, Saved, StepMade
from anchor_core.training.orders import Orders
from anchor_core.training.run import fit
from anchor_core.training.saving import Files
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

QUICK = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "probe_every": 2, "objective": "reconstruction"}


@pytest.fixture
def go(eps_denoiser, latents, concept, tmp_path):
    """`go(listener, orders, config, **settings)`: (outcome, events)."""

    def training(listen=lambda event: None, orders=None, config=None, **settings):
        events = []

        def tell(event) -> None:
            events.append(event)
            listen(event)

        eps_denoiser.attach(AdapterConfig(rank=2, **(config or {})))
        try:
            probe = {"timesteps": 2, "noises": 1}
            material = prepare(eps_denoiser, latents, concept, class_pictures=None, probe=probe, seed=0)
            chosen = TrainSettings(**{**QUICK, **settings})
            files = Files(tmp_path / "adapter_1_.safetensors", tmp_path / "vectors_1_.safetensors", new=True)
            return fit(eps_denoiser, material, chosen, files=files, tell=tell, orders=orders), events
        finally:
            eps_denoiser.detach()

    return training


def steps(events) -> list[tuple[int, int]]:
    return [(event.step, event.steps) for event in events if isinstance(event, StepMade)]


@pytest.mark.parametrize("config", [{}, {"kind": "none", "vectors": 1}, {"vectors": 1}], ids=str)
def test_a_saved_step_is_the_result(go, tmp_path, config):
    orders = Orders()

    def listen(event) -> None:
        if isinstance(event, StepMade) and event.step == 1:
            orders.save_now()
        if isinstance(event, StepMade) and event.step == 2:
            orders.keep(1)

    outcome, events = go(listen, orders, config)
    assert steps(events) == [(1, 3), (2, 3)] and outcome.how == "stopped"  # it ends the training
    assert events[-1] == Ended("stopped", kept=1, made=2) and outcome.history.kept == 1
    one, _ = go(config=config, steps=1)
    kept = load_adapter(tmp_path / "adapter_1_.safetensors")
    assert kept[1]["anchor.steps"] == "1"
    for name, tensor in one.trained.tensors.items():
        assert torch.equal(tensor, outcome.trained.tensors[name]) and torch.equal(tensor, kept[0][name])
    assert (one.trained.vectors is None) == (outcome.trained.vectors is None)
    for name, vector in (one.trained.vectors or {}).items():
        assert torch.equal(vector, outcome.trained.vectors[name])


def test_only_a_saved_step_can_be_kept_and_a_cancel_outranks_it(go):
    orders = Orders()

    def listen(event) -> None:
        if isinstance(event, StepMade) and event.step == 1:
            with pytest.raises(ValueError, match="step is 1, whose weights were not saved; save now"):
                orders.keep(1)
            orders.save_now()
        if isinstance(event, StepMade) and event.step == 2:
            with pytest.raises(ValueError, match=r"step is 2, .*; take one of \[1\]"):
                orders.keep(2)
            orders.keep(1)
            orders.cancel()

    outcome, events = go(listen, orders)
    assert events[-1] == Ended("cancelled", kept=2, made=2) and outcome.history.kept == 2


def test_a_step_that_cannot_be_read_again_leaves_the_steps_made(go, tmp_path):
    orders = Orders()

    def listen(event) -> None:
        if isinstance(event, StepMade) and event.step == 1:
            orders.save_now()
        if isinstance(event, Saved) and event.step == 1:
            event.files[0].write_bytes(b"cut")
        if isinstance(event, StepMade) and event.step == 2:
            orders.keep(1)

    with pytest.raises(ValueError, match="step 1 cannot be kept: .* the LoRA of the 2 steps made is in"):
        go(listen, orders)
    assert load_adapter(tmp_path / "adapter_1_.safetensors")[1]["anchor.steps"] == "2"


def test_more_steps_are_the_longer_training(go, tmp_path):
    longer, _ = go(steps=5)
    orders = Orders()

    def listen(event) -> None:
        if isinstance(event, StepMade) and event.step == 3:  # the last moment
            orders.extend(2)

    outcome, events = go(listen, orders)
    assert steps(events) == [(1, 3), (2, 3), (3, 3), (4, 5), (5, 5)] and outcome.how == "finished"
    assert [event.step for event in events if isinstance(event, Measured)] == [0, 2, 4, 5]
    assert outcome.history.losses == longer.history.losses
    assert all(torch.equal(longer.trained.tensors[name], each) for name, each in outcome.trained.tensors.items())
    metadata = load_adapter(outcome.files[0])[1]
    assert metadata["anchor.steps"] == metadata["ss_max_train_steps"] == "5"


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_course_to_its_end_takes_no_more_steps(go, schedule):
    orders, said = Orders(), []
    why = f"'{schedule}', whose learning rate ends at 0 after the 3 planned"

    def listen(event) -> None:
        if event == PhaseBegun("training"):
            with pytest.raises(ValueError, match=why) as no:
                orders.extend(10)
            said.append(no)

    _, events = go(listen, orders, schedule=schedule)
    assert said and len(steps(events)) == 3


def test_what_is_no_number_of_steps_is_refused():
    for wrong in (0, -3, 1.5, True, None):
        with pytest.raises(ValueError, match=f"steps is {wrong}, but it takes a whole number of at least 1"):
            Orders().extend(wrong)


@pytest.mark.parametrize("end", ["finished", "failed"])
def test_no_order_is_taken_and_lost_after_the_last_step(go, end):
    orders, late = Orders(), []

    def listen(event) -> None:
        if end == "failed" and isinstance(event, StepMade):
            raise RuntimeError("in the middle")
        if event == PhaseBegun("saving") or isinstance(event, Ended):
            late.append(event)
            for order in (orders.stop, orders.cancel, orders.pause, orders.go_on, orders.picture_now, orders.save_now):
                with pytest.raises(ValueError, match="the training makes no more steps"):
                    order()
            with pytest.raises(ValueError, match="the training makes no more steps"):
                orders.extend(1)

    if end == "failed":
        with pytest.raises(RuntimeError, match="in the middle"):
            go(listen, orders)
    else:
        assert go(listen, orders)[0].how == "finished"
    assert late


def test_a_resumed_training_tells_what_was_before(eps_denoiser, latents, concept, tmp_path):
    told = []
    for steps in (2, 3):
        adapter = eps_denoiser.attach(AdapterConfig(rank=2))
        settings = TrainSettings(**{**QUICK, "steps": steps, "checkpoint_every": 1})
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        history = train(eps_denoiser, adapter, latents, concept, settings, checkpoints=checkpoints, tell=told.append)
        eps_denoiser.detach()
    kinds = [event.event for event in told]
    assert kinds == ["step", "step", "resumed", "step"]
    assert told[2].step == 2 and told[2].history is history and told[3].step == 3
