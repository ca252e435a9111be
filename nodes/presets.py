"""The preset of a training on the loaded model: what it decides, and what its node shows of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..anchor_core.adapters.config import AdapterConfig
from ..anchor_core.objectives import w_from_lambda
from ..anchor_core.training.purposes import DECIDED, MANUAL, PURPOSES, purpose_options
from ..anchor_core.training.settings import DataSettings, TrainSettings
from .types import inputs_of

_DEFAULTS = {field.name: field.default for kind in (TrainSettings, AdapterConfig) for field in fields(kind)}


def w_input() -> io.Float.Input:
    """A slider; the page's script has it end at 2, unless a saved workflow has more."""
    (w,) = inputs_of(TrainSettings, ("w",))
    return io.Float.Input(
        "w", default=w.default, min=0.0, max=100.0, step=0.05, round=1e-6, tooltip=w.tooltip,
        display_mode=io.NumberDisplay.slider,
    )  # fmt: skip


def preset_input() -> io.Combo.Input:
    """Its default is what a workflow means that was saved without it; the page's script gives new nodes `auto`."""
    return io.Combo.Input(
        "preset",
        options=list(PURPOSES),
        default=MANUAL,
        optional=True,
        tooltip="What chooses steps, learning_rate, batch_size, rank and layers, and noise levels and memory with "
        "them: auto is what published trainers take for the loaded model; quick try a quarter of the steps; subject "
        "100 steps for each picture; style a larger LoRA of more layers; low memory one picture at a time. What you "
        "change in Train Options stays. manual: what the node says.",
    )


def chosen_options(preset: str, model, pictures: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the preset decides for a MODEL and so many pictures, but for what `options` have otherwise than by default.

    Raises:
        ValueError: there is no such preset.
    """
    from ..anchor_core.backends.comfyui import families

    if preset == MANUAL:
        return {}
    flow = families.prediction_type(model.get_model_object("model_sampling")) == "flow"
    return chosen_for(preset, families.family(model.model), flow, pictures, options)


def chosen_for(preset: str, family: str, flow: bool, pictures: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """As `chosen_options`, for a model of which this much is known."""
    given = [name for name in DECIDED if name in options and options[name] != _DEFAULTS[name]]
    how = {name: options[name] for name in ("kind", "optimizer") if name in options}
    return purpose_options(preset, family, pictures, flow=flow, given=given, **how)


def said(preset: str, model, chosen: Mapping[str, Any]) -> str:
    """The preset and the family that it chose for, for the file."""
    from ..anchor_core.backends.comfyui import families

    return f"{preset} ({families.family(model.model) or 'other models'})" if chosen else preset


def settings_of(told: Mapping[str, Any], options: Mapping[str, Any], chosen: Mapping[str, Any]) -> tuple:
    """`resume`, and the three settings that a node's inputs, the options connected to it and its preset say.

    Raises:
        ValueError: what the settings refuse.
    """
    every = {**told, **options, **chosen}
    resume, pattern, lam = (every.pop(key, None) for key in ("resume", "layer_pattern", "lambda"))
    if lam:
        every["w"] = w_from_lambda(lam)
    every |= {"alpha": every.get("alpha") or None} | ({"layers": pattern} if pattern else {})
    kinds = (TrainSettings, AdapterConfig, DataSettings)
    return resume, *(kind(**{f.name: every[f.name] for f in fields(kind) if f.name in every}) for kind in kinds)
