"""A step of the optimizer is made whole or not at all, whatever breaks it off in the middle."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.training.optimizers import AveragedWeights, make_optimizer
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

BROKEN = {  # what each optimizer does once for every parameter
    "adamw": (torch.Tensor, "addcdiv_"),
    "prodigy": (torch.Tensor, "addcdiv_"),
    "schedule_free": (torch, "_foreach_lerp_"),
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


def values(made: torch.optim.Optimizer, average: AveragedWeights) -> list:
    """All that a step changes: numbers as they are, tensors as lists."""
    states = [value for state in made.state.values() for value in state.values()]
    numbers = [value for group in made.param_groups for name, value in group.items() if name != "params"]
    parameters = [p for group in made.param_groups for p in group["params"]]
    found = [*parameters, *states, *numbers, *average.state_dict()["average"], average.state_dict()["updates"]]
    return [each.tolist() if torch.is_tensor(each) else each for each in found]


@pytest.mark.parametrize("optimizer", BROKEN)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_breaks_off_in_a_step_leaves_what_was_before_it(monkeypatch, optimizer, before, error):
    draw = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5, 3, generator=draw)) for _ in range(4)]
    made = make_optimizer(weights, TrainSettings(optimizer=optimizer, learning_rate=1e-2))
    average = AveragedWeights(weights, 0.9, made)

    def step() -> None:
        for weight in weights:
            weight.grad = torch.sin(weight.detach())
        with average.whole():
            made.step()
            average.update()

    for _ in range(before):
        step()
    wanted = values(made, average)
    with monkeypatch.context() as patch:
        break_off(patch, *BROKEN[optimizer], 2, error)
        with pytest.raises(error):
            step()
    assert values(made, average) == wanted
    step()
    assert values(made, average) != wanted


def test_the_average_is_of_whole_steps_too(monkeypatch):
    weights = [torch.nn.Parameter(torch.ones(3))]
    made = make_optimizer(weights, TrainSettings(learning_rate=1e-2))
    average = AveragedWeights(weights, 0.9, made)
    weights[0].grad, wanted = torch.ones(3), values(made, average)
    break_off(monkeypatch, torch, "_foreach_lerp_", 1, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError), average.whole():
        made.step()
        average.update()
    assert values(made, average) == wanted


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
                break_off(monkeypatch, *BROKEN[optimizer], 3, torch.OutOfMemoryError)

        try:
            train(eps_denoiser, adapter, latents, concept, settings, tell=tell)
        except torch.OutOfMemoryError:
            pass
        found.append(adapter.state_dict())
        eps_denoiser.detach()
    assert made == [2, 2, 5, 5]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
