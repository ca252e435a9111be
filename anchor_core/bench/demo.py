"""`semantic-anchor demo`: one subject, three ways from one seed, and what each keeps of the model."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from ..backends.diffusers.denoiser import DiffusersDenoiser
from ..evaluation import report
from ..sandbox import model, subjects
from ..sandbox.judge import Judge
from ..training.events import Event
from ..training.saving import Files
from .personalise import ANCHORED, DREAMBOOTH, PRIOR_PRESERVATION, SETTINGS, TOKEN, Personalisation

METHODS = (DREAMBOOTH, PRIOR_PRESERVATION, ANCHORED)
LABELS = {
    "dreambooth": "DreamBooth LoRA",
    "prior_preservation": "with prior preservation",
    "anchored": "anchored, w = 0.5",
}
SHOWN = (0, 2, 5, 10, 13, 14, 16, 20, 22)
"""Which of the 25 prompts the figure shows."""


def run(out: Path, subject_name: str = "pip", seed: int = 0, steps: int = SETTINGS.steps) -> dict:
    """Train, sample and score the three methods; write `report.json`, `report.png` and the adapters into `out`."""
    subject = subjects.get(subject_name)
    settings = replace(SETTINGS, steps=steps)
    out.mkdir(parents=True, exist_ok=True)
    denoiser = DiffusersDenoiser.from_pretrained(model.WEIGHTS)
    personalisation = Personalisation(denoiser, Judge(), subject, seed)
    results, histories, pictures = {}, {}, {}
    for method in METHODS:
        started, adapter = time.perf_counter(), out / f"{method.name}.safetensors"
        with tqdm(total=settings.steps, desc=LABELS[method.name]) as bar:
            history = personalisation.train(
                method, settings, files=_files(adapter), tell=lambda event: _advance(bar, event)
            )
        seconds = time.perf_counter() - started
        drawn = personalisation.sample()
        scores = asdict(personalisation.score(drawn))
        denoiser.detach()
        results[method.name] = {
            **scores,
            "seconds": round(seconds, 2),
            "adapter": adapter.name,
            "history": history.to_dict(),
        }
        histories[LABELS[method.name]], pictures[LABELS[method.name]] = history, drawn
    result = {
        "subject": subject.name,
        "prompts": subject.prompts(TOKEN),
        "seed": seed,
        "settings": asdict(settings),
        "methods": results,
    }
    _draw(out / "report.png", personalisation, pictures, histories)
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


def _draw(path: Path, personalisation: Personalisation, pictures: dict, histories: dict) -> None:
    prompts = personalisation.subject.prompts(TOKEN)
    columns = len(SHOWN)
    figure = report.new_figure(1.35 * columns, 9.4)
    above, below = figure.subfigures(2, 1, height_ratios=(6.4, 3))
    axes = above.subplots(len(pictures) + 1, columns)
    report.draw_pictures(axes[0], list(personalisation.references), "references")
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
