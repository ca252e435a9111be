"""A training that is broken off and resumed is the unbroken one."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.torch_file import read_torch
from anchor_core.drift import DriftProbe
from anchor_core.training.checkpoint import KEPT, Checkpoints
from anchor_core.training.orders import Orders
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import TrainingDiverged, train

SETTINGS = {"steps": 9, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 2, "probe_every": 3}


def run(denoiser, latents, concept, folder=None, stop_after=None, config=None, with_probe=False, **settings):
    """Attach, train, detach: (history, adapter weights)."""
    adapter = denoiser.attach(config or AdapterConfig(rank=2, dropout=0.3))
    probe = DriftProbe(denoiser, latents, concept, timesteps=2, noises=1) if with_probe else None
    made = 0

    def count(event):
        nonlocal made
        made += event.event == "step"

    try:
        history = train(
            denoiser, adapter, latents, concept, TrainSettings(**{**SETTINGS, **settings}), probe=probe,
            class_latents=latents.flip(0), orders=Orders(lambda: made == stop_after), tell=count,
            checkpoints=None if folder is None else Checkpoints(folder),
        )  # fmt: skip
        return history, adapter.state_dict()
    finally:
        denoiser.detach()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "prior_preservation"},
        {"ema": 0.9, "schedule": "cosine", "warmup": 2},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"optimizer": "schedule_free"},
        {"optimizer": "adamw8bit"},
        {"precision": "fp16", "accumulation": 2},
        {"keep": "best", "with_probe": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "plain",
)
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_resumed_is_unbroken(eps_denoiser, latents, concept, tmp_path, settings, stop_after):
    unbroken, weights = run(eps_denoiser, latents, concept, **settings)
    first, _ = run(eps_denoiser, latents, concept, tmp_path, stop_after, **settings)
    assert first.cancelled and len(first.losses) == stop_after
    resumed, weights_resumed = run(eps_denoiser, latents, concept, tmp_path, **settings)
    assert resumed.losses == unbroken.losses and resumed.terms == unbroken.terms
    assert [step for step, _ in resumed.probes if step not in (1, 4, 7)] == [step for step, _ in unbroken.probes]
    assert resumed.kept == unbroken.kept and not resumed.cancelled
    assert same(weights, weights_resumed)


def test_a_longer_training_goes_on_from_a_finished_one(eps_denoiser, latents, concept, tmp_path):
    long, weights = run(eps_denoiser, latents, concept, steps=12)
    run(eps_denoiser, latents, concept, tmp_path, steps=7)
    resumed, weights_resumed = run(eps_denoiser, latents, concept, tmp_path, steps=12)
    assert resumed.losses == long.losses and same(weights, weights_resumed)


def test_a_finished_training_is_only_read(eps_denoiser, latents, concept, tmp_path):
    _, weights = run(eps_denoiser, latents, concept, tmp_path)
    history, again = run(eps_denoiser, latents, concept, tmp_path)
    assert len(history.losses) == 9 and same(weights, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": 0.25}, "its w is 0.5, and 0.25 here"),
        ({"seed": 1}, "its seed is 0, and 1 here"),
        ({"config": AdapterConfig(rank=3)}, "its adapter is "),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(eps_denoiser, latents, concept, tmp_path, change, message):
    run(eps_denoiser, latents, concept, tmp_path, 4)
    with pytest.raises(ValueError, match="^checkpoint in .* is of another training: " + message) as caught:
        run(eps_denoiser, latents, concept, tmp_path, **change)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_or_other_pictures_is_refused(
    eps_denoiser, model_folders, latents, concept, tmp_path
):
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

    run(eps_denoiser, latents, concept, tmp_path, 4)
    with pytest.raises(ValueError, match="its pictures is"):
        run(eps_denoiser, latents[:2], concept, tmp_path)
    other = DiffusersDenoiser.from_pretrained(model_folders["other"])
    with pytest.raises(ValueError, match="of another training: its base model is"):
        run(other, latents, concept, tmp_path)


def test_the_newest_readable_checkpoint_counts(eps_denoiser, latents, concept, tmp_path):
    unbroken, weights = run(eps_denoiser, latents, concept)
    run(eps_denoiser, latents, concept, tmp_path, 6)
    files = Checkpoints(tmp_path).files()
    assert [file.name for file in files] == ["step-000004.ckpt", "step-000006.ckpt"] and len(files) == KEPT
    files[-1].write_bytes(files[-1].read_bytes()[:1000])
    resumed, weights_resumed = run(eps_denoiser, latents, concept, tmp_path)
    assert resumed.losses == unbroken.losses and same(weights, weights_resumed)


def test_unreadable_checkpoints_are_not_taken_for_none(eps_denoiser, latents, concept, tmp_path):
    (tmp_path / "step-000002.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="none of the 1 in .* can be read"):
        run(eps_denoiser, latents, concept, tmp_path)


def test_nan_keeps_the_last_good_checkpoint(eps_denoiser, latents, concept, tmp_path):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))

    def poison(report) -> None:
        if report.step == 5:
            with torch.no_grad():
                adapter.parameters()[1].fill_(math.inf)

    with pytest.raises(TrainingDiverged, match="at step 6 of 9"):
        train(
            eps_denoiser, adapter, latents, concept, TrainSettings(**SETTINGS), tell=poison,
            checkpoints=Checkpoints(tmp_path),
        )  # fmt: skip
    eps_denoiser.detach()
    state = read_torch(Checkpoints(tmp_path).files()[-1])
    assert len(state["history"]["losses"]) == 4
    assert all(torch.isfinite(value).all() for value in state["adapter"].values())


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint folder .* cannot be written"):
        Checkpoints(tmp_path / "file" / "run")


def test_a_full_disk_leaves_the_older_checkpoints_and_no_part(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": torch.zeros(3)})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="cannot be written .No space left on device"):
        checkpoints.save(2, {"x": torch.zeros(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["step-000001.ckpt"]


def test_killed_at_random_moments(eps_denoiser, latents, concept, tmp_path):
    """SIGKILL: every time what is there can be resumed, and the end is the unbroken run's, bit by bit."""
    options = {"steps": 12, "checkpoint_every": 1}
    started = time.perf_counter()
    _, weights = run(eps_denoiser, latents, concept, tmp_path / "unbroken", **options)
    whole = time.perf_counter() - started
    fork, draw = multiprocessing.get_context("fork"), random.Random(0)
    made = []
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        process = fork.Process(target=run, args=(eps_denoiser, latents, concept, folder), kwargs=options)
        process.start()
        time.sleep(draw.uniform(0, whole))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        files = Checkpoints(folder).files() if folder.is_dir() else []
        made.append(len(read_torch(files[-1])["history"]["losses"]) if files else 0)
        _, resumed = run(eps_denoiser, latents, concept, folder, **options)
        assert same(weights, resumed), f"killed after step {made[-1]}"
        assert not list(folder.glob("*.part"))
    assert len(set(made)) > 3, f"the kills were not spread over the run: {made}"


def test_history_goes_through_json(eps_denoiser, latents, concept):
    from anchor_core.training.history import History

    history, _ = run(eps_denoiser, latents, concept, with_probe=True)
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history
