"""The record of a training: thinned without a bias, whole on disk at every time, and never in the training's way."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from anchor_core.drift import ProbeResult
from anchor_core.training import record as record_module
from anchor_core.training.events import Ended, Measured, PhaseBegun, PictureMade, Resumed, Saved, StepMade
from anchor_core.training.history import History
from anchor_core.training.record import FILE, POINTS, Curve, Record, line, read_record, record_folder
from anchor_core.training.settings import TrainSettings


def step(number: int, steps: int = 400, value: float = 0.5) -> StepMade:
    return StepMade(number, steps, 2 * value, {"reconstruction": value, "anchor": value}, 0.25 * number)


def measured(number: int, drift: float, reconstruction: float = 1.0) -> Measured:
    return Measured(number, ProbeResult(1.0, drift, 0.1, 1.0, 0.2, reconstruction, drift, [(0.5, drift, 1.0)]))


@pytest.fixture
def record(tmp_path):
    states = []
    made = Record(tmp_path / "x.run", {"id": "abc"}, TrainSettings(steps=400), changed=states.append)
    made.states = states
    return made


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, POINTS, POINTS + 1, 2 * POINTS + 7, 10_000])
def test_a_curve_holds_the_means_of_neighbours(count):
    curve, values = Curve(), [math.sin(i / 50) for i in range(count)]
    for i, value in enumerate(values):
        curve.add(i + 1, {"a": value})
    told = curve.to_dict()
    every = told["every"]
    assert len(told["step"]) == math.ceil(count / every) <= POINTS and (every == 1 or len(told["step"]) >= POINTS / 2)
    assert told["step"] == [min(i + every, count) for i in range(0, count, every)]
    for i, value in enumerate(told["values"]["a"]):
        part = values[i * every : (i + 1) * every]
        assert value == pytest.approx(sum(part) / len(part), rel=1e-5, abs=1e-6)


def test_a_curve_has_no_nan():
    curve = Curve()
    curve.add(1, {"a": math.nan, "b": 1.0})
    curve.add(2, {"a": math.inf, "b": 2.0})
    assert json.loads(json.dumps(curve.to_dict(), allow_nan=False))["values"] == {"a": [None, None], "b": [1.0, 2.0]}


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_the_record_is_what_was_told(record, tmp_path):
    record(PhaseBegun("training"))
    for number in range(1, 401):
        record(step(number))
        if number % 100 == 0:
            record(measured(number, 0.1 * number))
    record(PictureMade(400, "a sks dog", torch.rand(3, 16, 8)))
    record(Saved(100, (tmp_path / "x_step000100.safetensors",)))
    record(Ended("stopped", 400, 400))
    state = read_record(tmp_path / "x.run" / FILE)
    assert state == json.loads(json.dumps(record.states[-1], allow_nan=False))
    assert (state["id"], state["phase"], state["how"], state["kept"]) == ("abc", "ended", "stopped", 400)
    assert (state["step"], state["steps"], state["seconds_per_step"]) == (400, 400, 0.25)
    assert state["losses"]["step"][-1] == 400 and state["losses"]["values"].keys() == {"reconstruction", "anchor"}
    assert state["probes"]["step"] == [100, 200, 300, 400] and state["drift"] == 40
    assert state["saved"] == [{"step": 100, "file": "x_step000100.safetensors"}]
    assert state["pictures"] == [{"step": 400, "file": "step-000400.jpg", "prompt": "a sks dog"}]
    with Image.open(tmp_path / "x.run/step-000400.jpg") as picture:
        assert picture.size == (256, 512)


def test_the_best_step_is_the_one_that_keep_best_would_keep(record):
    for number, (drift, reconstruction) in enumerate([(0, 10), (0.5, 5), (0.6, 1.2), (0.7, 1), (9, 1)]):
        record(measured(number * 50, drift, reconstruction))
    record(PhaseBegun("training"))
    assert record.state["best"] == 100  # at least nine tenths of the gain, and the earliest


def test_no_step_over_the_limit_is_the_best(tmp_path):
    record = Record(tmp_path / "x.run", {}, TrainSettings(stop_on_drift=1.0))
    for number, (drift, reconstruction) in enumerate([(0, 10), (0.5, 5), (1.1, 0.1)]):
        record(measured(number * 50, drift, reconstruction))
    record(PhaseBegun("saving"))
    assert record.state["best"] == 50


def test_the_time_of_a_step_is_of_the_last_ones(record):
    seconds = 0.0
    for number in range(1, 101):
        seconds += 10.0 if number < 50 else 0.5
        record(StepMade(number, 400, 1.0, {"reconstruction": 1.0}, seconds))
    record(PhaseBegun("paused"))
    assert record.state["seconds_per_step"] == 0.5
    assert line(record.state) == "step 100 of 400, paused, 0.50 s a step, 2 min 30 s left"


def test_a_training_that_goes_on_shows_what_was_before(record, tmp_path):
    history = History([2.0, 1.0], {"reconstruction": [1.5, 0.5], "anchor": [0.5, 0.5]}, seconds=3.0)
    history.probes = [(0, measured(0, 0.1).result), (2, measured(2, 0.2, 0.1).result)]
    assert json.loads(json.dumps(Resumed(2, history).to_dict(), allow_nan=False))["history"]["losses"] == [2.0, 1.0]
    record(Resumed(2, history))
    assert record.state["step"] == 2 and not (tmp_path / "x.run").exists()
    record(step(3, value=0.25))
    record(PhaseBegun("paused"))
    assert record.state["losses"]["step"] == [1, 2, 3]
    assert record.state["losses"]["values"] == {"reconstruction": [1.5, 0.5, 0.25], "anchor": [0.5, 0.5, 0.25]}
    assert record.state["probes"]["step"] == [0, 2] and record.state["best"] == 2


# --- where it goes ----------------------------------------------------------------------------------------------------


def test_steps_are_thinned_in_time_and_all_else_is_told_at_once(record, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(record_module.time, "monotonic", lambda: clock[0])
    record(PhaseBegun("training"))
    told = len(record.states)
    for number in range(1, 101):
        clock[0] += 0.125
        record(step(number))
    assert len(record.states) - told == 25  # twice a second
    assert 84 <= read_record(tmp_path / "x.run" / FILE)["step"] <= 100
    record(PhaseBegun("paused"))
    assert record.states[-1]["step"] == read_record(tmp_path / "x.run" / FILE)["step"] == 100


def test_states_are_never_changed_afterwards(record):
    record(step(1))
    record(PhaseBegun("paused"))
    before, text = record.state, json.dumps(record.state)
    record(PictureMade(1, "a", torch.rand(3, 8, 8)))
    record(step(2))
    record(Ended("finished", 2, 2))
    assert json.dumps(before) == text and record.state["step"] == 2


def test_nothing_is_written_before_a_step(record, tmp_path):
    record(PhaseBegun("class_pictures"))
    record(measured(0, 0.1))
    record(Ended("cancelled", 0, 0))
    assert list(tmp_path.iterdir()) == [] and record.state["how"] == "cancelled"


def test_leftovers_of_a_training_without_a_file_are_cleared_and_others_stay(record, tmp_path):
    folder = tmp_path / "x.run"
    folder.mkdir()
    for name in (FILE, "step-000050.jpg", "mine.txt"):
        (folder / name).write_text("old")
    record(step(1))
    record(PhaseBegun("paused"))
    assert {file.name for file in folder.iterdir()} == {FILE, "mine.txt"} and read_record(folder / FILE)["step"] == 1


def test_a_record_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, caplog):
    (tmp_path / "x.run").write_text("a file is in the way")
    record = Record(tmp_path / "x.run", {}, TrainSettings())
    for event in (step(1), PictureMade(1, "a", torch.rand(3, 8, 8)), step(2), Ended("finished", 2, 2)):
        record(event)
    assert record.state["step"] == 2 and record.state["pictures"] == []
    assert [each.getMessage()[:14] for each in caplog.records] == ["the record in "]


def test_a_record_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / FILE).write_text('{"id": "ab')
    assert read_record(tmp_path / FILE) is None and read_record(tmp_path / "missing") is None
    assert record_folder(tmp_path / "a_00001_.safetensors") == tmp_path / "a_00001_.run"
