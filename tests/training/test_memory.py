"""The memory of a step, estimated from small ones, and what is chosen by it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.data.cache import Cache
from anchor_core.data.dataset import Dataset
from anchor_core.training import memory
from anchor_core.training.memory import GB, OVERHEAD, check_memory, growth, measure, optimizer_bytes
from anchor_core.training.settings import TrainSettings
from tests.backends import tiny_models

SHAPE = (4, 24, 24)
SETTINGS = TrainSettings(steps=4, batch_size=4)
FULL_SIZE = {
    "one row": (64, {"batch_size": 1}, {"rank": 8}),
    "checkpointing": (64, {"batch_size": 1, "gradient_checkpointing": True}, {"rank": 8}),
    "every layer, two rows": (
        40,
        {"batch_size": 2, "objective": "reconstruction"},
        {"rank": 16, "layers": "all_linear_conv"},
    ),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(memory, "EDGES", (8, 16))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A tiny SD1 with an adapter."""
    denoiser = tiny_models.denoiser_of(tiny_models.build("sd1", tmp_path_factory.mktemp("memory")))
    denoiser.attach(AdapterConfig(rank=4))
    return denoiser


@pytest.fixture
def room(prepared, monkeypatch, concept):
    """`room(bytes, settings)`: what `check_memory` makes of the settings where that many are free."""
    dataset = Dataset.of_latents(torch.zeros(2, *SHAPE), concept)

    def check(free: float, settings: TrainSettings = SETTINGS) -> TrainSettings:
        monkeypatch.setattr(prepared, "make_room", lambda needed: int(free), raising=False)
        return check_memory(settings, prepared, dataset, concept)

    return check


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_small_batches_tell_what_a_large_one_takes(tmp_path, concept, family, checkpointing):
    denoiser = tiny_models.denoiser_of(tiny_models.build(family, tmp_path))
    denoiser.attach(AdapterConfig(rank=4))
    settings, cache = replace(SETTINGS, gradient_checkpointing=checkpointing), Cache(denoiser)
    grown = growth(denoiser, concept, settings, SHAPE, cache)
    for rows, shape in ((3, (4, 24, 20)), (1, (4, 32, 16))):
        peak = measure(denoiser, concept, settings, shape, rows, cache)
        assert grown.peak(rows, shape[1] * shape[2]) == pytest.approx(OVERHEAD * peak, rel=0.05)


def test_measuring_leaves_nothing_behind(prepared, concept):
    before, random = prepared.adapter.state_dict(), torch.get_rng_state()
    settings = replace(SETTINGS, gradient_checkpointing=True, objective="prior_preservation")
    assert measure(prepared, concept, settings, SHAPE, 1, Cache(prepared)) > 0
    assert all(torch.equal(before[name], value) for name, value in prepared.adapter.state_dict().items())
    assert all(parameter.grad is None for parameter in prepared.adapter.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert not any("forward" in vars(block) for block in prepared.blocks)


def test_optimizer_bytes_are_what_adamw_keeps(prepared):
    parameters = prepared.adapter.parameters()
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    kept += [parameter.grad for parameter in parameters]
    optimizer.zero_grad(set_to_none=True)
    assert optimizer_bytes(prepared.adapter, SETTINGS) == sum(tensor.nbytes for tensor in kept)


def test_what_fits_stays_as_it_is(room):
    assert room(1e12) == SETTINGS


def needed(prepared, concept, **changed) -> float:
    settings = replace(SETTINGS, **changed)
    peak = growth(prepared, concept, settings, SHAPE, Cache(prepared))
    rows = settings.micro_batch or settings.batch_size
    return peak.peak(rows, SHAPE[1] * SHAPE[2]) + optimizer_bytes(prepared.adapter, settings)


def test_parts_come_first_and_checkpointing_after(room, prepared, concept, caplog):
    with caplog.at_level("INFO", logger="anchor_core"):
        assert room(1.01 * needed(prepared, concept, micro_batch=2)) == replace(SETTINGS, micro_batch=2)
    assert "so that it fits: micro_batch 2" in caplog.text
    least = {"micro_batch": 1, "gradient_checkpointing": True}
    assert room(1.01 * needed(prepared, concept, **least)) == replace(SETTINGS, **least)


def test_what_cannot_fit_is_refused_with_what_would(room, prepared, concept):
    alone = replace(SETTINGS, micro_batch=1, gradient_checkpointing=True)
    free = 0.8 * needed(prepared, concept, micro_batch=1, gradient_checkpointing=True)
    with pytest.raises(
        ValueError, match="^memory is .fit., but a step with .* micro_batch 1 takes .* free on cpu; take"
    ):
        room(free, alone)
    with pytest.raises(ValueError, match="a smaller rank"):
        room(1000.0)
    with pytest.raises(ValueError, match="^memory is .refuse., but a step takes about"):
        room(free, replace(SETTINGS, memory="refuse"))
    assert room(1000.0, replace(SETTINGS, memory="off")).micro_batch == 0


def test_the_resolution_that_would_fit_does(prepared, concept, monkeypatch):
    shape = (4, 512, 512)  # 1024 pixels at this model's downscale
    dataset = Dataset.of_latents(torch.zeros(1, *shape), concept)
    settings = replace(SETTINGS, batch_size=1, gradient_checkpointing=True)
    grown = growth(prepared, concept, settings, shape, Cache(prepared))
    free = grown.peak(1, 200 * 200) + optimizer_bytes(prepared.adapter, settings)
    monkeypatch.setattr(prepared, "make_room", lambda needed: int(free), raising=False)
    with pytest.raises(ValueError, match="take resolution 384 or less"):  # of 400
        check_memory(settings, prepared, dataset, concept)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("case", FULL_SIZE)
def test_the_estimate_of_sd15_is_within_a_fifth_of_the_peak(case):
    side, settings, config = FULL_SIZE[case]
    call = [sys.executable, "-m", "tests.training.sd15_memory", str(side), json.dumps(settings), json.dumps(config)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=Path(memory.__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(case, {name: f"{value / GB:.2f} GB" for name, value in found.items()})
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.2)
