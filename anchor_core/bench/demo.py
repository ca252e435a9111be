"""`semantic-anchor demo`: one subject, three ways from one seed, and what each keeps of the model."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..backends.diffusers.denoiser import DiffusersDenoiser
from ..checks import check_choice
from ..evaluation import report
from ..sandbox import model, subjects
from ..sandbox.judge import Judge
from ..training.events import Event
from ..training.saving import Files
from .case import Case, means
from .config import parse
from .sandbox_settings import SETTINGS
from .subjects import SandboxSubject

CONFIG = {
    "name": "demo",
    "trainings": {
        "dreambooth": {"objective": "reconstruction"},
        "prior_preservation": {"objective": "prior_preservation"},
        "anchored": {"objective": "anchor", "w": 0.5},
    },
    "probe": {"class_pictures": 0},
}
LABELS = {
    "dreambooth": "DreamBooth LoRA",
    "prior_preservation": "with prior preservation",
    "anchored": "anchored, w = 0.5",
}
SHOWN = (0, 2, 5, 10, 13, 14, 16, 20, 22)
"""Which of the 25 prompts the figure shows."""


def run(out: Path, subject_name: str = "pip", seed: int = 0, steps: int = SETTINGS.steps) -> dict:
    """Train, sample and score the three methods; write `report.json`, `report.png` and the adapters into `out`."""
    check_choice("subject", subject_name, subjects.names())
    config = parse({**CONFIG, "training": {"steps": steps}})
    out.mkdir(parents=True, exist_ok=True)
    denoiser = DiffusersDenoiser.from_pretrained(model.WEIGHTS)
    case = Case(denoiser, SandboxSubject(subject_name, Judge()), seed, config)
    results, histories, pictures = {}, {}, {}
    for name, training in config.trainings.items():
        started, adapter = time.perf_counter(), out / f"{name}.safetensors"
        with tqdm(total=steps, desc=LABELS[name]) as bar:
            history = case.train(training, lambda event: _advance(bar, event), _files(adapter))
        seconds = time.perf_counter() - started
        drawn = [picture for _, batch in case.pictures(None, config.token) for picture in batch]
        scores = means(case.subject.score(drawn, range(len(drawn)))) | case.drifts()
        denoiser.detach()
        results[name] = {
            **scores,
            "seconds": round(seconds, 2),
            "adapter": adapter.name,
            "history": history.to_dict(),
        }
        histories[LABELS[name]], pictures[LABELS[name]] = history, drawn
    result = {
        "subject": subject_name,
        "prompts": case.subject.prompts(config.token),
        "seed": seed,
        "settings": asdict(training.settings),
        "methods": results,
    }
    _draw(out / "report.png", case, result["prompts"], pictures, histories)
    report.write_json(out / "report.json", result)
    return result


def _files(adapter: Path) -> Files:
    """All three in one folder, each with the subject's word."""
    return Files(adapter, adapter.with_stem(f"{adapter.stem}_word"))


def _advance(bar: tqdm, event: Event) -> None:
    if event.event == "step":
        bar.update()
    elif event.event == "measured":
        bar.set_postfix(drift=f"{event.result.drift:.2f}")


def table(result: dict) -> str:
    """The scores as aligned text."""
    lines = [f"{'method':26}{'subject fidelity':>18}{'text alignment':>16}{'drift':>8}{'seconds':>9}"]
    for name, row in result["methods"].items():
        lines.append(
            f"{LABELS[name]:26}{row['subject_fidelity']:18.3f}{row['text_alignment']:16.3f}"
            f"{row['drift']:8.2f}{row['seconds']:9.1f}"
        )
    return "\n".join(lines)


def _draw(path: Path, case: Case, prompts: list[str], pictures: dict[str, list[Tensor]], histories: dict) -> None:
    columns = len(SHOWN)
    figure = report.new_figure(1.35 * columns, 9.4)
    above, below = figure.subfigures(2, 1, height_ratios=(6.4, 3))
    axes = above.subplots(len(pictures) + 1, columns)
    report.draw_pictures(axes[0], case.subject.references.pixels, "references")
    for row, (label, drawn) in zip(axes[1:], pictures.items()):
        report.draw_pictures(row, [drawn[i] for i in SHOWN], label)
    for cell, index in zip(axes[-1], SHOWN):
        words = prompts[index].removeprefix("a photo of ").split()
        text = " ".join(words[:4]) + "\n" + " ".join(words[4:8]) + "\n" + " ".join(words[8:])
        cell.text(0.5, -0.08, text.strip(), transform=cell.transAxes, ha="center", va="top", fontsize=6)
    left, right = below.subplots(1, 2)
    report.draw_drift(left, histories)
    report.draw_loss(right, histories)
    figure.savefig(path)
