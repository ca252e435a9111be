"""Figures as pictures, and the drift report's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def drift_plot(before, after, history: dict[str, Any] | None) -> torch.Tensor:
    """IMAGE (1, H, W, 3): two `ProbeResult`s by timestep, with class samples the readings of Fig. 2, and by step the
    loss, the drift and the steps' own distances of a training's history."""
    from ..anchor_core.evaluation import report
    from ..anchor_core.training.history import History

    two = {"without LoRA": before, "with LoRA": after}
    draws = [partial(report.draw_by_timestep, results=two, quantity=each) for each in ("drift", "reconstruction")]
    if after.paired is not None:
        draws.append(partial(report.draw_readings, result=after))
    if history:
        draws.append(partial(_course, history=history))
    if history and history.get("distances"):
        draws.append(partial(report.draw_distances, history=History.from_dict(history)))
    figure = report.new_figure(4 * len(draws), 4)
    for draw, panel in zip(draws, figure.subplots(1, len(draws))):
        draw(panel)
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
