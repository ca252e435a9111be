"""The verbs on the embedded model: `demo`, `bench`, `sandbox`."""

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


def bench(options: Namespace) -> None:
    from ..bench import ablation, guidance, keep, methods, stock
    from ..sandbox import subjects

    names = options.subjects or list(ablation.TABLE_SUBJECTS)
    for name in names:
        subjects.get(name)
    for step in options.at:
        check_count("at", step)
    for seed in options.seeds:
        check_count("seeds", seed, minimum=0)
    out = check_writable(options.out)
    rate = {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
    if options.stock or options.guidance:
        name, measure = ("stock", stock.run) if options.stock else ("guidance", guidance.run)
        comfyui = Path(options.stock or options.guidance)
        python = Path(options.stock_python or comfyui / ".venv/bin/python")
        for option, file in ((name, comfyui / "main.py"), ("stock_python", python)):
            if not file.is_file():
                raise ValueError(f"--{option}: there is no file {file}; give ComfyUI's folder and its interpreter")
        print(stock.table(measure(out, comfyui, python, device=options.device)))
    elif options.methods is not None:
        if options.jobs is not None:
            check_count("jobs", options.jobs)
        steps = max(options.at)
        print(methods.run(out, names, options.seeds, options.methods, options.jobs, steps=steps, **rate))
    elif options.keep:
        keep.run(out, names, options.seeds, **rate)
    else:
        ablation.run(out, names, options.seeds, options.at, replace(ablation.SETTINGS, **rate))


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
    pretrain.assemble(work, out / "weights")
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
