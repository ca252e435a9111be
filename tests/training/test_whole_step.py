"""A step of the optimizer is made whole or not at all, whatever breaks it off in the middle."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.training import memory, optimizers
from anchor_core.training.checkpoint import Checkpoints
from anchor_core.training.optimizers import AveragedWeights, make_optimizer
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

BROKEN = {  # what each optimizer does in the middle of a step, and at which call of it some weights are changed
    "adamw": (torch.Tensor, "addcdiv_", 2),
    "prodigy": (torch.Tensor, "addcdiv_", 2),
    "schedule_free": (torch, "_foreach_sub_", 1),
}


def break_off(patch, owner, name: str, at: int, error: type[BaseException]) -> None:
    """The `at`-th call of a function of torch's, from now on, has no memory left."""
    calls, function = [], getattr(owner, name)

    def call(*arguments, **options):
        calls.append(name)
        if len(calls) == at:
            raise error("in the middle of a step")
        return function(*arguments, **options)

    patch.setattr(owner, name, call)


def kept(weights: list[torch.nn.Parameter], average: AveragedWeights) -> list:
    """The running weights, and those that would be saved."""
    running = [weight.tolist() for weight in weights]
    with average:
        return [running, [weight.tolist() for weight in weights], average.state_dict()["updates"]]


@pytest.mark.parametrize("optimizer", BROKEN)
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_breaks_off_in_a_step_leaves_what_was_before_it(monkeypatch, optimizer, before, ema, error):
    draw = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5, 3, generator=draw)) for _ in range(4)]
    made = make_optimizer(weights, TrainSettings(optimizer=optimizer, learning_rate=1e-2))
    average = AveragedWeights(weights, ema, made)

    def step() -> None:
        for weight in weights:
            weight.grad = torch.sin(weight.detach())
        with average.whole():
            made.step()
            average.update()

    for _ in range(before):
        step()
    wanted = kept(weights, average)
    assert not before or wanted[0] != wanted[1] or (optimizer != "schedule_free" and not ema)
    with monkeypatch.context() as patch:
        break_off(patch, *BROKEN[optimizer], error)
        with pytest.raises(error):
            step()
    assert kept(weights, average) == wanted
    step()
    assert kept(weights, average) != wanted


def test_the_average_is_of_whole_steps_too(monkeypatch):
    weights = [torch.nn.Parameter(torch.ones(3))]
    made = make_optimizer(weights, TrainSettings(learning_rate=1e-2))
    average = AveragedWeights(weights, 0.9, made)
    weights[0].grad, wanted = torch.ones(3), kept(weights, average)
    break_off(monkeypatch, torch, "_foreach_lerp_", 1, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError), average.whole():
        made.step()
        average.update()
    assert kept(weights, average) == wanted


@pytest.fixture
def as_on_a_card(monkeypatch):
    """AdamW is fused, as on an NVIDIA card: torch has that kernel for a CPU too."""
    monkeypatch.setattr(optimizers, "on_gpu", lambda _: True)
    monkeypatch.setattr(memory, "on_gpu", lambda _: True)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_fused_first_step_that_finds_no_memory_for_its_state_changes_nothing(monkeypatch, as_on_a_card, groups, ema):
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    made = make_optimizer([{"params": weights[i::groups]} for i in range(groups)], TrainSettings(learning_rate=1e-2))
    average = AveragedWeights(weights, ema, made)
    for weight in weights:
        weight.grad = torch.ones(3)
    wanted = kept(weights, average)
    with monkeypatch.context() as patch:
        break_off(patch, torch, "zeros_like", 7, torch.OutOfMemoryError)  # two to a weight
        with pytest.raises(torch.OutOfMemoryError), average.whole():
            made.step()
            average.update()
    assert kept(weights, average) == wanted
    with average.whole():
        made.step()
        average.update()
    assert kept(weights, average) != wanted


def test_a_fused_step_copies_no_weights(eps_denoiser, as_on_a_card):
    adapter = eps_denoiser.attach(AdapterConfig(kind="full"))
    weights = adapter.parameters()
    made = make_optimizer(adapter.parameter_groups(), TrainSettings())
    average, device = AveragedWeights(weights, 0.0, made), torch.device("cpu")
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    made.step()
    with memory._Live(device) as live, average.whole():
        made.step()
    size = sum(weight.nbytes for weight in weights)
    needed = [memory.step_bytes(adapter, TrainSettings(optimizer=name)) for name in ("adamw", "prodigy")]
    eps_denoiser.detach()
    assert live.peak < 0.01 * size and needed == [0, size]


def test_fused_steps_are_those_of_the_plain_optimizer(eps_denoiser, latents, concept, monkeypatch, tmp_path):
    """And go on from a plain one's checkpoint, as on another machine."""
    found = []
    for fused_from in (4, 0, 2):
        adapter, checkpoints = eps_denoiser.attach(AdapterConfig(rank=2)), Checkpoints(tmp_path / str(fused_from))
        for steps in dict.fromkeys((min(fused_from, 2) or 4, 4)):
            monkeypatch.setattr(optimizers, "on_gpu", lambda _, on=steps > fused_from: on)
            settings = TrainSettings(steps=steps, batch_size=2, learning_rate=1e-2, checkpoint_every=2)
            train(eps_denoiser, adapter, latents, concept, settings, checkpoints=checkpoints)
        found.append(adapter.state_dict())
        eps_denoiser.detach()
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_training_keeps_the_steps_before(monkeypatch, eps_denoiser, latents, concept, optimizer, ema):
    found, made = [], []
    for steps in (2, 5):
        settings = TrainSettings(steps=steps, batch_size=2, learning_rate=1e-2, optimizer=optimizer, ema=ema)
        adapter = eps_denoiser.attach(AdapterConfig(rank=2))

        def tell(_, steps=steps) -> None:
            made.append(steps)
            if made.count(5) == 2:
                break_off(monkeypatch, *BROKEN[optimizer], torch.OutOfMemoryError)

        try:
            train(eps_denoiser, adapter, latents, concept, settings, tell=tell)
        except torch.OutOfMemoryError:
            pass
        found.append(adapter.state_dict())
        eps_denoiser.detach()
    assert made == [2, 2, 5, 5]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
