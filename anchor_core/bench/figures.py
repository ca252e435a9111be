"""The plots of a benchmark: identity against text and against drift, and what trainings measured as they went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import check_choice
from ..evaluation.intervals import Interval, bootstrap
from ..evaluation.report import new_figure
from .cells import CURVES, SCORES, Cells
from .keys import check_text, known

_PANELS = (("text_alignment", "subject_fidelity"), ("drift", "subject_fidelity"), ("drift_class", "text_alignment"))


@dataclass(frozen=True)
class Lines:
    """One plot.

    Attributes:
        lines: label -> a training, over its step counts, or several rows at their ends.
        curves: what of the trainings is drawn over their steps instead, of `CURVES`.
    """

    name: str
    lines: Mapping[str, tuple[str, ...]]
    curves: tuple[str, ...] = ()


def read_figures(tables: Sequence[Any], rows: Sequence[str]) -> tuple[Lines, ...]:
    """ValueError naming the figure and its key."""
    figures = []
    for number, table in enumerate(tables):
        where = f"figures[{number}]"
        known(table, ["name", "lines", "curves"], where)
        lines = table.get("lines", {})
        if not isinstance(lines, Mapping) or not lines:
            raise ValueError(f"{where}.lines is {lines!r}, but it takes a table of label = a row or a list of rows")
        made = {}
        for label, line in lines.items():
            wanted = [line] if isinstance(line, str) else list(line)
            made[label] = tuple(check_choice(f"{where}.lines.{label}", row, rows) for row in wanted)
        curves = tuple(check_choice(f"{where}.curves", name, CURVES) for name in table.get("curves", ()))
        figures.append(Lines(check_text(f"{where}.name", table.get("name", "")), made, curves))
    return tuple(figures)


def draw(figure: Lines, cells: Cells):
    """A matplotlib figure; a line without cells is left out."""
    return _draw_curves(figure, cells) if figure.curves else _draw_trade_offs(figure, cells)


def points(rows: Sequence[str], cells: Cells) -> list[dict[str, Interval]]:
    """The scores along a line, each over all subjects and seeds."""
    if len(rows) == 1:
        ends = {max(map(int, cell["scores"])) for key, cell in cells.by_key.items() if key[0] == rows[0]}
        where = [(rows[0], step) for step in cells.steps if step <= max(ends, default=0)] or [(rows[0], 0)]
    else:
        where = [(row, 0) for row in rows]
    found = [{score: cells.values(row, score, at) for score in SCORES} for row, at in where]
    return [{score: bootstrap(values) for score, values in each.items() if values} for each in found]


def _draw_trade_offs(figure: Lines, cells: Cells):
    drawn = new_figure(4.6 * len(_PANELS), 4.2)
    drawn.suptitle(figure.name, fontsize=10)
    for axes, (across, up) in zip(drawn.subplots(1, len(_PANELS)), _PANELS):
        for label, rows in figure.lines.items():
            line = [(each[across], each[up]) for each in points(rows, cells) if across in each and up in each]
            if line:
                x, y = ([pair[side] for pair in line] for side in (0, 1))
                axes.errorbar(
                    [each.mean for each in x], [each.mean for each in y], xerr=_bars(x), yerr=_bars(y), fmt="o-",
                    markersize=4, linewidth=1.2, elinewidth=0.5, label=label,
                )  # fmt: skip
        axes.set(xlabel=SCORES[across], ylabel=SCORES[up])
        axes.grid(alpha=0.3)
    if drawn.axes[0].has_data():
        drawn.axes[0].legend(fontsize=7)
    return drawn


def _bars(values: Sequence[Interval]) -> np.ndarray:
    """Distances of the interval's ends from the mean, (2, N)."""
    ends = [(v.mean - v.low, v.high - v.mean) if v.low is not None else (0.0, 0.0) for v in values]
    return np.maximum(np.array(ends).T, 0)


def _draw_curves(figure: Lines, cells: Cells):
    drawn = new_figure(4.6 * len(figure.curves), 3.8)
    drawn.suptitle(figure.name, fontsize=10)
    for axes, quantity in zip(drawn.subplots(1, len(figure.curves), squeeze=False)[0], figure.curves):
        for label, rows in figure.lines.items():
            for row in rows:
                steps, means = course(row, quantity, cells)
                if steps:
                    x = [each.mean for each in means]
                    axes.plot(steps, x, label=label if len(rows) == 1 else row)
                    if means[0].low is not None:
                        axes.fill_between(steps, [v.low for v in means], [v.high for v in means], alpha=0.15)
        axes.set(xlabel="step", title=CURVES[quantity])
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    if drawn.axes[0].has_data():
        drawn.axes[0].legend(fontsize=7)
    return drawn


def course(row: str, quantity: str, cells: Cells) -> tuple[list[int], list[Interval]]:
    """A training's curve over all of its runs, at the steps that all of them measured."""
    curves = {run: dict(found) for run in cells.runs if (found := cells.curve(row, *run, quantity))}
    steps = sorted(set.intersection(*map(set, curves.values()))) if curves else []
    means = []
    for step in steps:
        values: dict[str, list[float]] = {}
        for (subject, _), curve in curves.items():
            values.setdefault(subject, []).append(curve[step])
        means.append(bootstrap(values, resamples=2000))
    return steps, means
