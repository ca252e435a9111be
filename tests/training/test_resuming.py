"""Checkpoints that were tampered with: the newest whole one is gone on from, and that is said."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch

from anchor_core.adapters.torch_file import read_torch, sealed
from anchor_core.training.checkpoint import Checkpoints
from tests.training.test_checkpoint import run, same

TAMPERED = {
    "empty": lambda state: {},
    "a list": lambda state: [state],
    "no adapter": lambda state: {name: part for name, part in state.items() if name != "adapter"},
    "no about": lambda state: {name: part for name, part in state.items() if name != "about"},
    "an adapter's tensor missing": lambda state: {**state, "adapter": dict(list(state["adapter"].items())[1:])},
    "a tensor that would be broadcast": lambda state: _changed(state, lambda tensor: tensor[:1, :1]),
    "NaN": lambda state: _changed(state, lambda tensor: tensor * math.nan),
    "no optimizer": lambda state: {**state, "optimizer": {}},
    "a mean of gradients that is a number": lambda state: _moment(state, lambda tensor: 0.5),
    "a mean of gradients of one number": lambda state: _moment(state, lambda tensor: tensor.flatten()[:1]),
    "a mean of gradients of NaN": lambda state: _moment(state, lambda tensor: tensor * math.nan),
    "steps of the optimizer that are no number": lambda state: _moment(state, lambda tensor: tensor.bool(), "step"),
    "a kept adapter of another shape": lambda state: {
        **state,
        "candidates": {"first": 1.0, "held": [{"step": 0, "score": 1.0, "weights": {"x": torch.ones(1)}}]},
    },
    "an optimizer of text": lambda state: {**state, "optimizer": "adamw"},
    "a short random state": lambda state: {**state, "random": [torch.zeros(3, dtype=torch.uint8)]},
    "no random state": lambda state: {**state, "random": []},
    "no dataset": lambda state: {**state, "datasets": []},
    "a deck of strangers": lambda state: {**state, "datasets": [{"8x8": [99]}]},
    "no history": lambda state: {**state, "history": {}},
    "a history of text": lambda state: {**state, "history": {**state["history"], "probes": ["x"]}},
    "a course of dicts": lambda state: {**state, "history": {**state["history"], "levels": [{}] * 10}},
    "terms of fewer steps": lambda state: {
        **state,
        "history": {**state["history"], "terms": {name: each[:1] for name, each in state["history"]["terms"].items()}},
    },
    "no candidates": lambda state: {**state, "candidates": {}},
}


def _changed(state: dict, change) -> dict:
    name, tensor = next((name, tensor) for name, tensor in state["adapter"].items() if tensor.ndim == 2)
    return {**state, "adapter": {**state["adapter"], name: change(tensor).clone()}}


def _moment(state: dict, change, name: str = "exp_avg") -> dict:
    optimizer = copy.deepcopy(state["optimizer"])
    optimizer["state"][0][name] = change(optimizer["state"][0][name])
    return {**state, "optimizer": optimizer}


@pytest.mark.parametrize("what", TAMPERED)
def test_the_newest_whole_checkpoint_is_gone_on_from(eps_denoiser, latents, concept, tmp_path, caplog, what):
    unbroken, weights = run(eps_denoiser, latents, concept)
    run(eps_denoiser, latents, concept, tmp_path, 4)
    newest = Checkpoints(tmp_path).files()[-1]
    tampered = TAMPERED[what](read_torch(newest))
    torch.save(sealed(tampered) if isinstance(tampered, dict) else tampered, newest)  # as nobody does by accident
    with caplog.at_level(logging.WARNING):
        resumed, weights_resumed = run(eps_denoiser, latents, concept, tmp_path)
    assert resumed.losses == unbroken.losses and same(weights, weights_resumed)
    told = [record.getMessage() for record in caplog.records]
    assert any(str(newest) in message and "cannot be gone on from" in message for message in told)
    assert any("step-000002.ckpt, the newest checkpoint that is whole" in message for message in told)


def test_changed_bytes_of_a_tensor_are_noticed(eps_denoiser, latents, concept, tmp_path, caplog):
    """torch reads them without a word, and a training would go on from weights that nobody trained."""
    _, weights = run(eps_denoiser, latents, concept)
    run(eps_denoiser, latents, concept, tmp_path, 4)
    newest = Checkpoints(tmp_path).files()[-1]
    tensor = next(tensor for tensor in read_torch(newest)["adapter"].values() if tensor.any())
    data, found = bytearray(newest.read_bytes()), tensor.numpy().tobytes()
    data[data.index(found) + 5] ^= 0x10
    newest.write_bytes(data)
    assert not torch.equal(next(each for each in read_torch(newest)["adapter"].values() if each.any()), tensor)
    with caplog.at_level(logging.WARNING):
        assert same(weights, run(eps_denoiser, latents, concept, tmp_path)[1])
    assert any("its contents are not what was written" in message for message in caplog.messages)


def test_where_none_is_whole_nothing_is_trained(eps_denoiser, latents, concept, tmp_path):
    run(eps_denoiser, latents, concept, tmp_path, 4)
    for file in Checkpoints(tmp_path).files():
        torch.save({}, file)
    with pytest.raises(ValueError, match="none of the 2 in .* can be read; remove them"):
        run(eps_denoiser, latents, concept, tmp_path)


@pytest.mark.parametrize("schedule, told", [("constant", False), ("cosine", True), ("linear", True)])
def test_a_schedule_of_another_length_is_said(eps_denoiser, latents, concept, tmp_path, caplog, schedule, told):
    run(eps_denoiser, latents, concept, tmp_path, steps=5, schedule=schedule)
    with caplog.at_level(logging.WARNING):
        run(eps_denoiser, latents, concept, tmp_path, steps=8, schedule=schedule)
    assert told == any(f"the {schedule} schedule was begun for 5 steps and ends after 8" in m for m in caplog.messages)
