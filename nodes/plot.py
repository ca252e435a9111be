"""The drift report's plot."""

from __future__ import annotations

from typing import Any

import torch


def drift_plot(before, after, history: dict[str, Any] | None) -> torch.Tensor:
    """IMAGE (1, H, W, 3): two `ProbeResult`s by timestep and, with a training's history, its loss and drift by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12 if history else 8, 4), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3 if history else 2)
    for panel, column, title in ((panels[0], 1, "drift from the class"), (panels[1], 2, "error on the pictures")):
        for result, label, style in ((before, "without LoRA", "--"), (after, "with LoRA", "-")):
            rows = result.by_timestep
            panel.plot([row[0] for row in rows], [row[column] for row in rows], style, label=label)
        panel.set(title=title, xlabel="timestep", ylabel="L2 norm, epsilon space", ylim=(0, None))
        panel.legend()
    if history:
        _course(panels[2], history)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
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
