"""The verbs on the embedded model: `demo`, `sandbox`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from ..checks import check_count
from .shared import check_writable


def demo(options: Namespace) -> None:
    from ..bench import demo
    from ..sandbox import subjects

    subjects.get(options.subject)
    steps = demo.SETTINGS.steps if options.steps is None else check_count("steps", options.steps)
    out = check_writable(options.out)
    result = demo.run(out, options.subject, options.seed, steps)
    print(f"\n{demo.table(result)}\n\n{out / 'report.png'}")


def pretrain(options: Namespace) -> None:
    import torch

    from ..sandbox import evaluate, judge, pretrain

    out = check_writable(options.out)
    settings = pretrain.PretrainSettings(seed=options.seed)
    if options.steps is not None:
        settings = replace(settings, denoiser_steps=check_count("steps", options.steps))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    work = Path(options.work) if options.work else out / "work"
    pretrain.run(work, settings, device=device)
    judge.train(work, device=device)
    pretrain.assemble(work, out / "weights", settings.seed)
    judge.assemble(work, out / "weights" / "judge")
    print(evaluate.describe(work, out / "weights", settings))


def subjects(options: Namespace) -> None:
    from ..sandbox import subjects

    print("\n".join(subjects.names()))


def subject(options: Namespace) -> None:
    from ..evaluation import report
    from ..sandbox import subjects

    subject = subjects.get(options.name)
    out = check_writable(options.out)
    out.mkdir(parents=True, exist_ok=True)
    files = [f"{i}.png" for i in range(subject.count)]
    for file, picture in zip(files, subject.references()):
        picture.save(out / file)
    about = {"name": subject.name, "class": subject.class_word, "references": files, "prompts": subject.prompts()}
    report.write_json(out / "report.json", about)
    print(f"{len(files)} pictures of {subject.name}, a {subject.class_word}, in {out}")
