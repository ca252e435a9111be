"""A step of the optimizer is made whole or not at all, whatever breaks it off in the middle."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
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
