"""What a checkpoint holds of a training's loop, and how the loop goes on from one."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from ..adapters.metadata import base_fingerprint
from ..adapters.torch_file import read_sealed
from .events import Resumed
from .history import History
from .optimizers import make_optimizer
from .settings import TrainSettings

logger = logging.getLogger(__name__)

_MAY_CHANGE = {
    *"steps checkpoint_every probe_every keep stop_on_drift guidance micro_batch memory".split(),
    *"gradient_checkpointing bank preset".split(),
}
"""Settings that a resumed training may have otherwise: they do not enter the steps already made, or nothing but the
memory that a step takes."""


_DEFAULTS = {field.name: field.default for field in fields(TrainSettings)}


def state_of(loop: Any) -> dict[str, Any]:
    """Everything that changes while the loop goes on, and what it must find again to go on from it."""
    devices = [loop.denoiser.device] if loop.denoiser.device.type == "cuda" else []
    return {
        "about": _about(loop),
        "steps": loop.settings.steps,
        "adapter": loop.adapter.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "schedule": loop.schedule.state_dict(),
        "average": loop.average.state_dict(),
        "scaler": loop.scaler.state_dict(),
        "generator": loop.batches.generator.get_state(),
        "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)],
        "datasets": [dataset.state_dict() for dataset in loop.batches.datasets],
        "history": loop.history.to_dict(),
        "candidates": loop.candidates.state_dict(),
    }


class _OfAnotherTraining(ValueError):
    pass


def resume(loop: Any) -> None:
    """Bring the loop to the newest of its checkpoints that is whole, and tell it; to none, if there is none.

    Raises:
        ValueError: they are of another training, or none of them is whole.
    """
    broken = 0
    for path in reversed(loop.checkpoints.files()):
        try:
            _restore(loop, read_sealed(path))  # all of it, so that nothing stays of a broken one before
        except _OfAnotherTraining:
            raise
        except Exception as error:  # whatever a file's contents lead to
            broken += 1
            logger.warning("checkpoint %s cannot be gone on from (%s: %s)", path, type(error).__name__, error)
            continue
        if broken:
            logger.warning("going on from %s, the newest checkpoint that is whole", path)
        logger.info("going on from step %d of %d", loop.made, loop.settings.steps)
        loop.tell(Resumed(loop.made, loop.history))
        return
    if broken:
        raise ValueError(f"checkpoint: none of the {broken} in {loop.checkpoints.folder} can be read; remove them")


def _restore(loop: Any, state: dict[str, Any]) -> None:
    _check_about(loop, state["about"])
    own = state_of(loop)
    for name in ("adapter", "average", "schedule", "generator", "random"):
        _check_like(own[name], state[name], name)
    for group, saved in zip(own["optimizer"]["param_groups"], state["optimizer"]["param_groups"]):
        if "fused" in group:  # the device's, not the training's
            saved["fused"] = group["fused"]
    _check_groups(own["optimizer"]["param_groups"], state["optimizer"]["param_groups"])
    for held in state["candidates"]["held"]:
        _check_like(own["adapter"], held["weights"], "kept adapter")
    loop.adapter.load_state_dict(state["adapter"])
    loop.optimizer.load_state_dict(state["optimizer"])
    _check_moments(loop)
    loop.schedule.load_state_dict(state["schedule"])
    loop.average.load_state_dict(state["average"])
    if state["scaler"] or not loop.scaler.is_enabled():
        _check_like(own["scaler"], state["scaler"], "scaler")
        loop.scaler.load_state_dict(state["scaler"])
    else:
        logger.info("the checkpoint has no scale of the loss, from before fp16 models had one; it starts anew")
    loop.batches.generator.set_state(state["generator"])
    torch.set_rng_state(state["random"][0])
    for random in state["random"][1:]:
        torch.cuda.set_rng_state(random, loop.denoiser.device)
    for dataset, saved in zip(loop.batches.datasets, state["datasets"], strict=True):
        dataset.load_state_dict(saved)
    loop.candidates.load_state_dict(state["candidates"])
    loop.history = History.from_dict(state["history"])
    _check_history(loop.history)
    loop.history.cancelled = loop.history.stopped = False
    planned = state.get("steps", loop.settings.steps)
    if loop.settings.schedule != "constant" and planned != loop.settings.steps:
        logger.warning(
            "the %s schedule was begun for %d steps and ends after %d now, so that this is not the training that an "
            "unbroken one of %d steps would have been",
            loop.settings.schedule, planned, loop.settings.steps, loop.settings.steps,
        )  # fmt: skip


def _about(loop: Any) -> dict[str, Any]:
    """What a checkpoint must agree in with the training that goes on from it."""
    references = loop.batches.datasets[0]
    settings = {name: value for name, value in asdict(loop.settings).items() if name not in _MAY_CHANGE}
    return {
        "base model": base_fingerprint(loop.denoiser),
        "adapter": asdict(loop.adapter.config),
        "number of processes": loop.workers.count,
        "pictures": [
            [list(e.latents.shape), float(e.latents.double().sum())] for e in loop.batches.datasets[0].examples
        ],
        "prompts": references.prompts(),
        **settings,
    }


def _check_about(loop: Any, about: dict[str, Any]) -> None:
    about = {**_DEFAULTS, **about}  # of a checkpoint from before there was a setting
    for name, value in _about(loop).items():
        if about.get(name) != value:
            raise _OfAnotherTraining(
                f"checkpoint in {loop.checkpoints.folder} is of another training: its {name} is "
                f"{_short(about.get(name))}, and {_short(value)} here; give another folder or the same settings"
            )


def _check_like(own: Any, saved: Any, name: str) -> None:
    """ValueError unless `saved` is built as `own` is: its names, shapes and types, and finite numbers."""
    parts: Any = ()
    if isinstance(own, Tensor):
        fits = isinstance(saved, Tensor) and saved.shape == own.shape and saved.dtype == own.dtype
        fits = fits and bool(torch.isfinite(saved).all())
    elif isinstance(own, Mapping):
        fits = isinstance(saved, Mapping) and saved.keys() == own.keys()
        parts = own
    elif isinstance(own, (list, tuple)):
        fits = type(saved) is type(own) and len(saved) == len(own)
        parts = range(len(own))
    elif isinstance(own, (int, float)):
        fits = isinstance(saved, (int, float)) and (math.isfinite(saved) or saved == own)
    else:
        fits = type(saved) is type(own)
    if not fits:
        raise ValueError(f"its {name} is {_short(saved)}, and {_short(own)} here")
    for part in parts:
        _check_like(own[part], saved[part], f"{name} {part}")


def _check_history(history: History) -> None:
    """ValueError unless its curves are numbers, those of the losses and their terms one a step."""
    made = len(history.losses) * [0.0]
    for name, values in {"losses": history.losses, **history.terms}.items():
        _check_like(made, values, name)
    for name, values in history.distances.items():
        _check_like(len(values) * [0.0], values, name)
    _check_like(History().levels, history.levels, "levels")


def _check_groups(own: Any, saved: Any) -> None:
    """As `_check_like`, but that an optimizer may have come to know more than it began with, as Prodigy does."""
    began = [{name: each[name] for name in group} for group, each in zip(own, saved, strict=True)]
    _check_like(own, began, "optimizer")


def _check_moments(loop: Any) -> None:
    """ValueError unless what the optimizer holds of each parameter is as another of its kind makes it in one step."""
    trial = [torch.nn.Parameter(parameter.detach().clone()) for parameter in loop.parameters]
    optimizer = make_optimizer(trial, loop.settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for parameter in trial:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for own, parameter in zip(trial, loop.parameters):
        saved = loop.optimizer.state[parameter]  # nothing of one that no gradient has reached
        zeros = {name for name, part in saved.items() if isinstance(part, Tensor) and part.shape == () and part == 0}
        # Prodigy keeps a single zero for a weight that began as zeros.
        made = {name: part for name, part in optimizer.state[own].items() if saved and name not in zeros}
        _check_like(made, {name: part for name, part in saved.items() if name not in zeros}, "optimizer")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
