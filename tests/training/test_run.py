"""One training from pictures to a file: what it tells, what it is told, and what it leaves, on a tiny network."""

from __future__ import annotations

import json
import math
import threading

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import load_adapter
from anchor_core.data.pictures import References
from anchor_core.data.prepare import ClassPictures
from anchor_core.drift import ProbeResult
from anchor_core.training.events import PHASES, Described, Ended, Measured, PhaseBegun, PictureMade, Saved, StepMade
from anchor_core.training.orders import Orders
from anchor_core.training.run import run
from anchor_core.training.saving import Files
from anchor_core.training.settings import DataSettings, TrainSettings
from anchor_core.training.trainer import TrainingDiverged

QUICK = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "probe_every": 2, "objective": "prior_preservation"}
ORDERS = ("stop", "cancel", "pause", "picture_now", "save_now")


@pytest.fixture
def references():
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return References(list(pictures), ["one", "two", "three"])


@pytest.fixture
def train(eps_denoiser, references, concept, tmp_path):
    """`train(listener, orders, **settings)`: (outcome, events); the network is given back without an adapter."""

    def go(listen=lambda event: None, orders=None, *, picture_every=0, probe=True, **settings):
        events = []

        def tell(event) -> None:
            events.append(event)
            listen(event)

        go.events = events
        try:
            outcome = run(
                eps_denoiser, references, concept, TrainSettings(**{**QUICK, **settings}), AdapterConfig(rank=2),
                DataSettings(), files=Files.beside(tmp_path / "adapter.safetensors"),
                class_pictures=ClassPictures(2, sampling={"steps": 1, "batch_size": 1}),
                probe={"timesteps": 2, "noises": 1} if probe else None, tell=tell, orders=orders,
                picture_every=picture_every,
            )  # fmt: skip
            return outcome, events
        finally:
            eps_denoiser.detach()

    return go


def kinds(events) -> list[str]:
    return [event.phase if isinstance(event, PhaseBegun) else event.event for event in events]


def test_the_whole_story(train, tmp_path):
    outcome, events = train(picture_every=3)
    assert kinds(events) == [
        "preparing", "class_pictures", "measuring", "training", "measured", "step", "step", "measured", "step",
        "picture", "step", "measured", "picture", "saving", "saved", "described", "ended",
    ]  # fmt: skip
    assert [event.step for event in events if isinstance(event, StepMade)] == [1, 2, 3, 4]
    assert [(e.step, e.result) for e in events if isinstance(e, Measured)] == outcome.history.probes
    pictures = [(event.step, tuple(event.pixels.shape)) for event in events if isinstance(event, PictureMade)]
    assert pictures == [(3, (3, 16, 16)), (4, (3, 16, 16))]
    assert events[-1] == Ended("finished", kept=4, made=4)
    assert outcome.files == (tmp_path / "adapter.safetensors",) == events[-3].files
    assert events[-2].provenance == outcome.made_with and outcome.made_with["settings"]["steps"] == 4
    tensors, metadata = load_adapter(outcome.files[0])
    assert metadata["anchor.steps"] == "4" and all(
        torch.equal(tensors[name], outcome.trained.tensors[name]) for name in tensors
    )


def test_every_event_is_json_with_nan_as_null(tmp_path):
    bad = ProbeResult(math.nan, 1.0, math.inf, 1.0, 1.0, 1.0, 1.0, [(0.5, math.nan, 2.0)])
    events = [
        PhaseBegun("training"), StepMade(1, 4, math.nan, {"anchor": math.inf}), Measured(2, bad),
        PictureMade(2, "a sks dog", torch.zeros(3, 4, 5)), Saved(2, (tmp_path / "x.safetensors",)),
        Described({"versions": {}}), Ended("failed", 1, 2, "out of memory"),
    ]  # fmt: skip
    told = [json.loads(json.dumps(event.to_dict(), allow_nan=False)) for event in events]
    assert [each["event"] for each in told] == ["phase", "step", "measured", "picture", "saved", "described", "ended"]
    assert told[1]["loss"] is None and told[1]["terms"] == {"anchor": None}
    assert told[2]["result"]["reconstruction"] is None and told[2]["result"]["by_timestep"] == [[0.5, None, 2.0]]
    assert told[3]["pixels"] == [3, 4, 5] and told[4]["files"] == [str(tmp_path / "x.safetensors")]


# --- orders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase not in ("paused", "saving")])
def test_an_order_at_every_phase_is_answered_at_the_next_gap(train, phase, order):
    orders, given, steps_after = Orders(), [], []

    def listen(event) -> None:
        if event == PhaseBegun(phase) and not given:
            given.append(order)
            getattr(orders, order)()
        if isinstance(event, StepMade):
            steps_after.append(event.step)
        if event == PhaseBegun("paused"):
            assert not steps_after  # it waits before another step is made
            orders.go_on()

    outcome, events = train(listen, orders)
    told = kinds(events)
    if order in ("stop", "cancel"):
        how = {"stop": "stopped", "cancel": "cancelled"}[order]
        assert outcome.how == how and not steps_after and not outcome.files
        assert events[-1] == Ended(how, kept=0, made=0)
    else:
        assert outcome.how == "finished" and steps_after == [1, 2, 3, 4]
        answer = {"pause": "paused", "picture_now": "picture", "save_now": "step"}[order]  # nothing to save before one
        assert told.count(answer) == (4 if order == "save_now" else 1)
        if order != "save_now":
            assert told.index(answer) < told.index("step")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("step", [1, 4])
def test_an_order_in_the_loop_is_answered_before_another_step(train, tmp_path, order, step):
    orders = Orders()

    def listen(event) -> None:
        if isinstance(event, StepMade) and event.step == step:
            getattr(orders, order)()
        if event == PhaseBegun("paused"):
            orders.go_on()

    outcome, events = train(listen, orders)
    told = kinds(events)
    after = told[[i for i, event in enumerate(events) if isinstance(event, StepMade)][step - 1] + 1 :]
    if order in ("stop", "cancel"):
        made = {"stop": "stopped", "cancel": "cancelled"}[order] if step < 4 else "finished"  # nothing was left to end
        assert outcome.how == made and "step" not in after and outcome.history.kept == step
        assert load_adapter(outcome.files[0])[1]["anchor.steps"] == str(step)
    elif order == "pause":
        assert ("paused" in after) == (step < 4)
    else:
        answer = {"picture_now": "picture", "save_now": "saved"}[order]
        assert answer in after and ("step" not in after or after.index(answer) < after.index("step"))
    if order == "save_now":
        own = tmp_path / f"adapter_step{step:06}.safetensors"
        assert load_adapter(own)[1]["anchor.steps"] == str(step)


def test_a_pause_answers_pictures_and_files_and_changes_nothing(train, tmp_path):
    plain, _ = train()
    orders = Orders()

    def listen(event) -> None:
        if isinstance(event, StepMade) and event.step == 2:
            orders.pause()
        if event == PhaseBegun("paused"):  # from another thread, as a server does
            threading.Thread(target=lambda: (orders.picture_now(), orders.save_now())).start()
        if isinstance(event, Saved) and event.step == 2:
            orders.go_on()

    outcome, events = train(listen, orders)
    told = kinds(events)
    assert told[told.index("paused") :][:4] == ["paused", "picture", "saved", "training"]
    assert outcome.history.losses == plain.history.losses
    assert all(torch.equal(plain.trained.tensors[name], each) for name, each in outcome.trained.tensors.items())


def test_cancel_outranks_stop_and_both_end_a_pause(train):
    orders = Orders()

    def listen(event) -> None:
        if isinstance(event, StepMade) and event.step == 1:
            orders.pause()
        if event == PhaseBegun("paused"):
            orders.cancel()
            orders.stop()

    outcome, _ = train(listen, orders)
    assert outcome.how == "cancelled" and len(outcome.history.losses) == 1


# --- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError, MemoryError])
def test_whatever_ends_a_training_keeps_the_steps_made(train, tmp_path, error):
    def listen(event) -> None:
        if isinstance(event, StepMade) and event.step == 3:
            raise error("in the middle")

    with pytest.raises(error, match="in the middle") as caught:
        train(listen)
    assert load_adapter(tmp_path / "adapter.safetensors")[1]["anchor.steps"] == "3"
    assert caught.value.__notes__ == [f"the LoRA of the 3 steps before is in {tmp_path / 'adapter.safetensors'}"]
    assert train.events[-1] == Ended("failed", 3, 3, "in the middle")


def test_a_failing_picture_keeps_the_steps_made(train, eps_denoiser, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no memory for a picture")

    monkeypatch.setattr(eps_denoiser, "decode_latents", broken)
    with pytest.raises(RuntimeError, match="no memory for a picture"):
        train(picture_every=2)
    assert load_adapter(tmp_path / "adapter.safetensors")[1]["anchor.steps"] == "2"


def test_divergence_says_where_the_steps_before_are(train, eps_denoiser, tmp_path):
    def listen(event) -> None:
        if isinstance(event, StepMade) and event.step == 2:
            eps_denoiser.adapter.parameters()[0].register_hook(lambda gradient: gradient * math.nan)

    with pytest.raises(TrainingDiverged, match=r"at step 3 of 4; .*; the LoRA of the 2 steps before is in"):
        train(listen)
    assert load_adapter(tmp_path / "adapter.safetensors")[1]["anchor.steps"] == "2"
    assert train.events[-1].how == "diverged"


def test_an_error_before_the_first_step_writes_nothing(train, tmp_path):
    def listen(event) -> None:
        if event == PhaseBegun("training"):
            raise RuntimeError("too early")

    with pytest.raises(RuntimeError, match="too early"):
        train(listen)
    assert list(tmp_path.iterdir()) == []
