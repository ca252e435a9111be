"""`semantic-anchor bench run`: the cells that are missing, here, on several GPUs or on a Ray cluster."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checks import check_choice, shown
from ..evaluation.report import write_json
from ..workers import end_with_parent
from ..writing import whole
from .cells import read_cell
from .config import Config
from .rows import UNTRAINED
from .subjects import fingerprint, subject_names
from .work import Done, Job, common_of, jobs_of, run_job

FILE = "config.json"


def run(
    config: Config,
    out: Path,
    *,
    subjects: Sequence[str] = (),
    seeds: Sequence[int] = (),
    rows: Sequence[str] = (),
    jobs: int | None = None,
    ray: str | None = None,
    devices: Sequence[str] = (),
) -> None:
    """Make the cells that are missing.

    Args:
        subjects, seeds, rows: a part of the config's; none for all.
        jobs: processes at a time; by default one a device, and on a CPU one a core.
        ray: address of a Ray cluster, whose workers all see `out`; `auto` for that of this machine, `local` for one
            that is started here.
        devices: such as cuda:0 and cuda:1, each with processes of its own; by default every GPU, or the CPU.

    Raises:
        ValueError: for a part that the config lacks; if `out` holds cells of a changed config; after all jobs, if
            some have failed.
    """
    names = subject_names(config)
    names = [check_choice("subjects", name, names) for name in subjects] or names
    numbers = [check_choice("seeds", seed, config.seeds) for seed in seeds] or list(config.seeds)
    wanted = [check_choice("rows", row, config.rows) for row in rows] or config.rows
    common = common_of(config)
    _keep_config(config, out, common, fingerprint(config, names))
    todo = [job for job in jobs_of(config, names, numbers, wanted) if _is_open(job, config, out, common)]
    if not todo:
        return
    given = (config.raw, str(out.resolve()), common)
    if ray is not None:
        from .ray_cluster import run_on_ray

        done = run_on_ray(ray, todo, given, jobs, devices)
    else:
        done = _run_here(todo, given, devices or _devices(), jobs)
    failed = [each for each in tqdm(done, total=len(todo), desc=config.name) if each.failed]
    _tell_failures(out, failed, len(todo))


def _is_open(job: Job, config: Config, out: Path, common: Mapping[str, Any]) -> bool:
    """Whether a cell of it is missing."""
    own = {} if job.row in UNTRAINED else config.trainings[job.row].options
    cells = {job.row: own} | {row: {**own, "sampling": dict(config.samplings[row].options)} for row in job.samplings}
    return any(
        read_cell(out, row, job.subject, job.seed, {**common, **options}) is None for row, options in cells.items()
    )


def _keep_config(config: Config, out: Path, common: dict[str, Any], prints: dict[str, str]) -> None:
    """Write `config.json`, or refuse what has changed since its first start. What was added is no change.

    Raises:
        ValueError: naming what differs.
    """
    rows = {name: training.options for name, training in config.trainings.items()}
    rows |= {name: {"of": way.of, **way.options} for name, way in config.samplings.items()}
    new = json.loads(json.dumps({"common": common, "files": prints, "rows": rows}))
    file = out / FILE
    if file.is_file():
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not what a benchmark writes ({error}); give another folder") from error
        for part in ("common", "files", "rows"):
            before = old.get(part, {})
            for name, value in new[part].items():
                if before.get(name, value) != value:
                    raise ValueError(
                        f"--out: {out} holds cells of another config: {_difference(name, before[name], value)}; give "
                        "another folder, or the config that it was begun with"
                    )
            new[part] = {**before, **new[part]}
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out: {out} holds something else than a benchmark; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, {**new, "config": config.raw, "subjects": subject_names(config)})


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *now]:
            if before.get(key) != now.get(key):
                return _difference(f"{name}: {key}", before.get(key, "its default"), now.get(key, "its default"))
    return f"{name} is {shown(before, 80)} there and {shown(now, 80)} here"


def _devices() -> list[str]:
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


_DEVICE = "cpu"


def _begin(devices: Any) -> None:
    """A process takes its device."""
    global _DEVICE
    end_with_parent()
    _DEVICE = devices.get()


def _on_own_device(given: tuple, job: Job, threads: int) -> Done:
    return run_job(*given, job, _DEVICE, threads)


def _run_here(todo: Sequence[Job], given: tuple, devices: Sequence[str], jobs: int | None) -> Iterator[Done]:
    """Each process has a device of its own, in turn, and its share of the cores. A single one is this process."""
    cores = os.cpu_count() or 1
    count = min(len(todo), jobs or (cores if list(devices) == ["cpu"] else len(devices)))
    if count == 1:
        yield from (run_job(*given, job, devices[0], 0) for job in todo)
        return
    threads = 0 if "OMP_NUM_THREADS" in os.environ else max(1, cores // count)  # it holds for each of them
    # Not forked: a process that is cannot use a GPU that its parent has looked at, and inherits its locks.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for number in range(count):
        queue.put(devices[number % len(devices)])
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(queue,))
    try:
        for each in as_completed([pool.submit(_on_own_device, given, job, threads) for job in todo]):
            yield each.result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"jobs is {count}, but a process was ended from outside, perhaps for memory; what is made is kept: start "
            "again, with fewer jobs"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _tell_failures(out: Path, failed: Sequence[Done], count: int) -> None:
    """Write `failed.txt`, and say so."""
    file = out / "failed.txt"
    file.unlink(missing_ok=True)
    if not failed:
        return
    with whole(file) as part:
        part.write_text("\n".join(f"{each.job}\n{each.trace}" for each in failed), encoding="utf-8")
    first = failed[0]
    raise ValueError(
        f"{len(failed)} of {count} jobs failed, first {first.job.row}, {first.job.subject}, seed {first.job.seed} "
        f"({first.failed}); {file} has them all, and another start tries them again"
    )
