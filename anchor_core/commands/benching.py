"""The verb `bench`: `run` and `report`; `speed` has a module of its own."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..checks import check_count
from .shared import check_writable


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
