"""The verb `bench`: `run`, `report`, and the measurements in a ComfyUI."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..checks import check_count
from .shared import check_writable


def bench(options: Namespace) -> None:
    from ..bench import guidance, stock

    if not options.stock and not options.guidance:
        raise ValueError("bench takes an action: run CONFIG, or report DIR")
    out = check_writable(options.out)
    name, measure = ("stock", stock.run) if options.stock else ("guidance", guidance.run)
    comfyui = Path(options.stock or options.guidance)
    python = Path(options.stock_python or comfyui / ".venv/bin/python")
    for option, file in ((name, comfyui / "main.py"), ("stock_python", python)):
        if not file.is_file():
            raise ValueError(f"--{option}: there is no file {file}; give ComfyUI's folder and its interpreter")
    print(stock.table(measure(out, comfyui, python, device=options.device)))


def bench_run(options: Namespace) -> None:
    from ..bench import results, runner
    from ..bench.config import read_config

    if options.jobs is not None:
        check_count("jobs", options.jobs)
    given = {name: getattr(options, name) for name in ("model", "references", "prompts", "clip", "dino")}
    config = read_config(options.config, given)
    out = check_writable(options.out)
    runner.run(
        config, out, subjects=options.subjects, seeds=options.seeds, rows=options.rows, jobs=options.jobs,
        ray=options.ray, devices=options.devices,
    )  # fmt: skip
    print(results.write(out, out, options.seed))


def bench_report(options: Namespace) -> None:
    from ..bench import results

    folder = Path(options.folder)
    out = check_writable(options.out or options.folder)
    print(results.write(folder, out, options.seed))
