"""Figures as pictures, and the drift report's."""

from __future__ import annotations

from typing import Any

import torch


def drift_plot(before, after, history: dict[str, Any] | None) -> torch.Tensor:
    """IMAGE (1, H, W, 3): two `ProbeResult`s by timestep and, with a training's history, its loss and drift by step."""
    from ..anchor_core.evaluation.report import draw_by_timestep, new_figure

    figure = new_figure(12 if history else 8, 4)
    panels = figure.subplots(1, 3 if history else 2)
    for panel, quantity in zip(panels, ("drift", "reconstruction")):
        draw_by_timestep(panel, {"without LoRA": before, "with LoRA": after}, quantity)
    if history:
        _course(panels[2], history)
    return figure_image(figure)


def figure_image(figure) -> torch.Tensor:
    """A matplotlib figure as IMAGE (1, H, W, 3)."""
    figure.canvas.draw()
    pixels = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = figure.canvas.get_width_height()
    return pixels.reshape(1, height, width, 4)[..., :3].float() / 255


def _course(panel, history: dict[str, Any]) -> None:
    losses = history["losses"]
    panel.plot(range(1, len(losses) + 1), losses, color="0.7", linewidth=0.8, label="loss")
    panel.set(title="the training", xlabel="step", ylabel="loss")
    if history["probes"]:
        drift = panel.twinx()
        probes = history["probes"]
        steps = [probe["step"] for probe in probes]
        drift.plot(steps, [probe["drift"] for probe in probes], "o-", color="C3", label="drift")
        drift.set(ylabel="drift", ylim=(0, None))
        drift.legend(loc="upper right")
    panel.legend(loc="upper left")
