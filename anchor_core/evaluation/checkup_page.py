"""A check-up on a page: a figure, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..checks import shown
from ..writing import whole
from . import report as files
from .settings import BUDGET
from .verdict import HARM

_LINES = 3
_LONGEST = 40
"""Blocks and layers of a table or panel; what is left out is counted."""

_MOVED = ("prompt", "distance", "of the prediction", "of the prompt's effect", "of the change with its word")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The page loads nothing and runs nothing, whatever a file's texts hold."""


def draw(report: Mapping[str, Any]):
    """A matplotlib figure of four panels under the verdict: by timestep, by strength, by block, effective ranks."""
    figure = files.new_figure(11, 8)
    title = textwrap.fill(" ".join(report["verdict"]["sentences"][:_LINES]), 125)
    # Texts of a file are no formulas.
    figure.suptitle(_plain(title), fontsize=9, parse_math=False)
    (by_timestep, by_strength), (by_block, ranks) = figure.subplots(2, 2)
    _draw_timesteps(by_timestep, report)
    _draw_strength(by_strength, report)
    _draw_blocks(by_block, report["weights"])
    _draw_ranks(ranks, report["weights"])
    return figure


def _plain(text: str) -> str:
    return "\n".join(shown(line, 400) for line in text.splitlines())


def _draw_timesteps(axes, report: Mapping[str, Any]) -> None:
    curves = report["by_timestep"]
    names = {
        "drift": ("drift with its word (Fig. 8b)", "C0o-"),
        "drift_without": ("the same without it", "C0o--"),
        "class_change": ("change of the class prompt", "C3s-"),
        "empty_change": ("change of the empty prompt", "C1^-"),
        "prompt_effect": ("what the class prompt itself does", "0.5"),
    }
    for name, (label, style) in names.items():
        if name in curves:
            line = {"color": style, "linestyle": ":"} if name == "prompt_effect" else {}
            marks = [] if line else [style]
            axes.plot(curves["timestep"], curves[name], *marks, markersize=3, label=label, **line)
    axes.set(xlabel="timestep", ylabel="L2 distance in epsilon", title="by noise level", ylim=(0, None))
    axes.legend(fontsize=7)


def _draw_strength(axes, report: Mapping[str, Any]) -> None:
    strength, suggested = report["strength"], report["suggested"]
    axes.plot(*zip(*strength["tried"]), "C3s-", markersize=3, label="change of the class prompt")
    axes.axhline(strength["budget"], color="C2", linestyle="--", linewidth=1, label="budget")
    axes.axhline(HARM, color="C3", linestyle=":", linewidth=1, label="harms the class")
    axes.axvline(suggested["strength"], color="0.5", linewidth=1, label=f"suggested: {suggested['strength']:.2f}")
    axes.set(
        xlabel="strength", ylabel="times the prompt's own effect", title="by strength", ylim=(0, None), xlim=(0, None)
    )
    axes.legend(fontsize=7)


def _draw_blocks(axes, weights: Mapping[str, Any]) -> None:
    blocks = weights["blocks"][:_LONGEST]
    axes.barh([shown(each["block"], 40) for each in blocks], [100 * each["share"] for each in blocks], color="C0")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="% of the squared change of weights", title=_counted("change by block", weights["blocks"]))


def _draw_ranks(axes, weights: Mapping[str, Any]) -> None:
    layers = weights["layers"]
    axes.scatter(range(len(layers)), [each["effective_rank"] for each in layers], s=6)
    axes.set(xlabel="layer, in the network's order", ylabel="effective rank", title="directions of a layer's change")
    axes.set_ylim(0, None)


def _counted(title: str, listed) -> str:
    return title if len(listed) <= _LONGEST else f"{title}, {_LONGEST} of {len(listed)}"


# --- HTML ---------------------------------------------------------------------------------------------------------


def html(report: Mapping[str, Any], png: bytes) -> str:
    """One page with its picture inside and no script; every text is escaped and without control characters."""
    verdict, weights = report["verdict"], report["weights"]
    layers = sorted(weights["layers"], key=lambda each: -each["share"])
    told = "".join(f"<li>{_text(each)}</li>" for each in verdict["sentences"])
    asked = [(f"{which} prompt", report["prompts"][key], report["prompts"][f"{which}_from"])
             for which, key in (("subject", "subject"), ("class", "class_prompt"))]  # fmt: skip
    moved = [
        (name, *(_number(values[key]) for key in ("change", "of_prediction", "of_prompt", "of_trigger")))
        for name, values in {**report["without_trigger"], "subject": report["with_trigger"]}.items()
        if values is not None
    ]
    shares = [(each["block"], _number(100 * each["share"])) for each in weights["blocks"]]
    rows = [
        (each["layer"], each["kind"], *(_number(value) for value in (
            100 * each["share"], each["norm"], each["relative"], each["effective_rank"]))) for each in layers
    ]  # fmt: skip
    said = [(key, value) for key, value in sorted(report.get("metadata", {}).items())]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width"><title>Check-up of {_text(report.get("adapter", "a LoRA"))}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}}
img{{max-width:100%}}table{{border-collapse:collapse;margin:.5em 0 1.5em}}
td,th{{padding:.15em .8em .15em 0;text-align:left;border-bottom:1px solid #ddd;overflow-wrap:anywhere}}
h1{{font-size:1.4em}}h2{{font-size:1.1em}}</style></head><body>
<h1>Check-up of {_text(report.get("adapter", "a LoRA"))}</h1>
<p><strong>It {_text(verdict["level"])}.</strong></p><ul>{told}</ul>
<img alt="Drift by noise level and strength, change by block and effective ranks"
src="data:image/png;base64,{base64.b64encode(png).decode()}">
<h2>Prompts</h2>{_table(("", "prompt", "known as"), asked)}
<p>Measured on {_text(report["measured_on"]["pictures"])} {_text(report["measured_on"]["latents"])}. The class is kept
up to {BUDGET:g} times the effect of its own prompt, and harmed above {HARM:g}.</p>
<h2>Change of predictions</h2>{_table(_MOVED, moved)}
<h2>Blocks</h2>{_table(("block", "% of the change"), shares[:_LONGEST])}
<h2>Layers, {min(len(rows), _LONGEST)} of {len(rows)}</h2>
{_table(("layer", "kind", "% of the change", "norm", "of the weight's norm", "effective rank"), rows[:_LONGEST])}
<h2>What the file says</h2>{_table(("name", "value"), said)}
</body></html>
"""


def _table(head, rows) -> str:
    top = "".join(f"<th>{_text(each)}</th>" for each in head)
    body = "".join(f"<tr>{''.join(f'<td>{_text(each)}</td>' for each in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _text(value: Any) -> str:
    return escape(shown(value, 1000))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def save(report: Mapping[str, Any], figure, json_file: Path, html_file: Path, png_file: Path | None = None) -> None:
    """`report.json`, `report.html` and where wanted `report.png`, each whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    files.write_json(json_file, report)
    with whole(html_file) as part:
        part.write_text(html(report, buffer.getvalue()), encoding="utf-8")
    if png_file is not None:
        with whole(png_file) as part:
            part.write_bytes(buffer.getvalue())
