"""One value varied: pictures of one prompt from the same noises at each, their scores, and all of it as one grid."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..data.pictures import as_picture
from ..denoiser import Denoiser
from . import report
from .metrics import METRICS, Encoders, mean_pairwise_cosine, rank, text_alignment

MOST = 24
"""Values of a sweep."""


@dataclass
class Column:
    """The pictures (3, H, W) in [0, 1] of one value, of each of the sweep's noises in order, and their scores."""

    label: str
    pictures: list[Tensor]
    scores: list[dict[str, float]] = field(default_factory=list)

    @property
    def means(self) -> dict[str, float]:
        """Metric -> mean over the pictures."""
        return {name: statistics.fmean(each[name] for each in self.scores) for name in (self.scores or [{}])[0]}


def parse_values(text: str, name: str = "values") -> list[float]:
    """The numbers of a list with commas, in order and each once.

    Raises:
        ValueError: there is none, one is no number, or there are more than `MOST`.
    """
    try:
        values = [check_number(name, float(part)) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}, but it takes numbers with commas between, such as 0, 0.5, 1") from error
    values = sorted(set(values))
    if not 1 <= len(values) <= MOST:
        raise ValueError(f"{name} is {text!r}, but it takes 1 to {MOST} numbers, such as 0, 0.5, 1")
    return values


def noises(shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """(count, C, h, w), the same for every value of a sweep."""
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def draw(denoiser: Denoiser, prompt: str, noise: Tensor, *, steps: int, guidance: float) -> list[Tensor]:
    """A picture (3, H, W) in [0, 1], on the CPU, of each noise (N, C, h, w), by the denoiser as it is."""
    adapter = denoiser.adapter
    with torch.no_grad():
        trained = adapter is not None and adapter.config.trains_text
        subject, negative = denoiser.encode_prompts([prompt, ""], adapted=trained)
    pictures = []
    for each in noise.split(1):  # alone, so that how many there are changes no bit
        latents = denoiser.sample([subject], negative, each, steps=steps, guidance=guidance)
        pictures.append(denoiser.decode_latents(latents)[0].detach().float().cpu())
    return pictures


def score(columns: Sequence[Column], encoders: Encoders, references: Sequence[Tensor], prompt: str) -> None:
    """Give each picture its CLIP-I and DINO to the references and its CLIP-T to the prompt, as far as there are any.

    Args:
        prompt: as CLIP may read it: without the subject's token.
    """
    real = encoders.embed(references)
    text = None if encoders.text is None else encoders.text([prompt])
    for column in columns:
        own = encoders.embed(column.pictures)
        for i in range(len(column.pictures)):
            found = {
                metric: mean_pairwise_cosine(own[encoder][i : i + 1], real[encoder])
                for metric, encoder in (("clip_i", "clip"), ("dino", "dino"))
                if encoder in own
            }
            if text is not None:
                found["clip_t"] = text_alignment(own["clip"][i : i + 1], text)
            column.scores.append({name: found[name] for name in METRICS if name in found})


def best(columns: Sequence[Column]) -> int | None:
    """The column of the first place by the mean of its ranks in all metrics; None without scores."""
    means = [column.means for column in columns]
    if not means or not means[0]:
        return None
    _, places = rank([list(row.values()) for row in means])
    return places.index(1)


def told(scores: dict[str, float], line: str = "\n") -> str:
    """Scores as they stand under a picture."""
    return line.join(f"{METRICS[name]} {value:.3f}" for name, value in scores.items())


def grid(columns: Sequence[Column], what: str):
    """A matplotlib figure: a column a value, a row a noise, the scores under each picture, the best column framed."""
    rows, first = len(columns[0].pictures), best(columns)
    lines = len(columns[0].scores[0]) if columns[0].scores else 0
    figure = report.new_figure(max(4.0, 1.9 * len(columns)), rows * (1.95 + 0.17 * lines) + 0.35)
    for j, axes in enumerate(figure.subplots(rows, len(columns), squeeze=False).T):
        column = columns[j]
        title = f"{what} {column.label}" + (" (best)" if j == first else "")
        axes[0].set_title(title, fontsize=10, fontweight="bold" if j == first else "normal")
        for i, panel in enumerate(axes):
            panel.imshow(as_picture(column.pictures[i]), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.set_xlabel(told(column.scores[i]) if column.scores else "", fontsize=8)
            for spine in panel.spines.values():
                spine.set(visible=j == first, color="C2", linewidth=2.5)
    return figure


def markdown(columns: Sequence[Column], what: str) -> str:
    """The means of each column as a table."""
    names = list(columns[0].means)
    lines = [f"| {what} | " + " | ".join(METRICS[name] for name in names) + " |", "|" + "---|" * (1 + len(names))]
    for j, column in enumerate(columns):
        flag = " (best)" if j == best(columns) else ""
        lines.append(f"| {column.label}{flag} | " + " | ".join(f"{column.means[name]:.3f}" for name in names) + " |")
    return "\n".join(lines)


def to_dict(columns: Sequence[Column], what: str) -> dict[str, Any]:
    """What is told of a sweep in JSON, without its pictures."""
    entries = [{"value": column.label, "scores": column.scores, "means": column.means} for column in columns]
    return {"what": what, "best": best(columns), "values": entries}
