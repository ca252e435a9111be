"""What a run leaves behind: `report.json`, and figures of pictures and curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data.pictures import as_picture
from ..drift import ProbeResult
from ..training.history import History
from ..writing import whole


def write_json(path: Path, value: Any) -> None:
    """Atomically; NaN and infinity are refused, because other readers of JSON would not take them."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def save_picture(path: Path, picture: Tensor) -> None:
    """(3, H, W) in [0, 1] as a PNG file."""
    from PIL import Image

    Image.fromarray(as_picture(picture)).save(path)


def new_figure(width: float, height: float):
    """A matplotlib figure that needs no screen and leaves matplotlib's global state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_pictures(axes_row, pictures: Sequence[Tensor], title: str) -> None:
    """Pictures (3, H, W) in a row of axes, the title beside the first; the other axes stay empty."""
    for axes in axes_row:
        axes.set_axis_off()
    for axes, picture in zip(axes_row, pictures):
        axes.imshow(as_picture(picture), interpolation="nearest")
    axes_row[0].set_title(title, fontsize=9, loc="left")


def draw_drift(axes, histories: Mapping[str, History]) -> None:
    """Fig. 8b: drift from the class anchor over the steps, a line for each history."""
    for name, history in histories.items():
        axes.plot([step for step, _ in history.probes], [result.drift for _, result in history.probes], label=name)
    axes.set(xlabel="step", ylabel="L2 distance in epsilon", title="drift from the class anchor (Fig. 8b)")
    axes.legend(fontsize=8)


def draw_by_timestep(axes, results: Mapping[str, ProbeResult], quantity: str = "drift") -> None:
    """`drift` or `reconstruction` of probe results over the timesteps, a line for each result."""
    column = {"drift": 1, "reconstruction": 2}[quantity]
    for (label, result), style in zip(results.items(), ("o--", "o-", "s-", "^-")):
        rows = result.by_timestep
        axes.plot([row[0] for row in rows], [row[column] for row in rows], style, markersize=3, label=label)
    title = {"drift": "drift from the class anchor", "reconstruction": "error on the pictures"}[quantity]
    axes.set(title=title, xlabel="timestep", ylabel="L2 distance in epsilon", ylim=(0, None))
    axes.legend(fontsize=8)


def draw_readings(axes, result: ProbeResult) -> None:
    """The three readings of Fig. 2 over the timesteps: A, and with class samples B and C."""
    labels = {"drift": "A, same z_t", "paired": "B, same noise", "independent": "C, other noise"}
    timesteps = [row[0] for row in result.by_timestep]
    for name, label in labels.items():
        if name in result.curves:
            axes.plot(timesteps, result.curves[name], "o-", markersize=3, label=label)
    axes.set(title="Fig. 2", xlabel="timestep", ylabel="L2 distance in epsilon", ylim=(0, None))
    axes.legend(fontsize=8)


_DISTANCES = {"reconstruction": "error on the pictures (Fig. 8a)", "drift": "drift from the class anchor (Fig. 8b)"}


def draw_distances(axes, history: History, window: int = 15) -> None:
    """Fig. 8a and 8b of the steps' own predictions over the steps, smoothed over `window` of them."""
    for name, values in history.distances.items():
        axes.plot(*_smoothed(values, window), label=_DISTANCES[name])
    axes.set(xlabel="step", ylabel="L2 distance in epsilon", title=f"the steps' own, mean of {window} steps")
    axes.legend(fontsize=8)


def draw_levels(axes, history: History) -> None:
    """Fig. 8a and 8b of the steps' own predictions over the timesteps."""
    rows = history.by_timestep()
    for place, name in ((1, "reconstruction"), (2, "drift")):
        if name in history.distances:
            axes.plot(
                [row[0] for row in rows], [row[place] for row in rows], "o-", markersize=3, label=_DISTANCES[name]
            )
    axes.set(xlabel="timestep", ylabel="L2 distance in epsilon", title="the steps' own, of all steps", ylim=(0, None))
    axes.legend(fontsize=8)


def _smoothed(values: Sequence[float], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and running means."""
    width = max(1, min(window, len(values)))
    return np.arange(width, len(values) + 1), np.convolve(values, np.ones(width) / width, mode="valid")


def draw_loss(axes, histories: Mapping[str, History], window: int = 15) -> None:
    """The reconstruction term over the steps (the one term that every objective has), smoothed over `window` steps."""
    for name, history in histories.items():
        axes.plot(*_smoothed(next(iter(history.terms.values()), []), window), label=name)
    axes.set(xlabel="step", ylabel="mean squared error", title=f"reconstruction loss, mean of {window} steps")
    axes.legend(fontsize=8)
