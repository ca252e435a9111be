"""The jobs of a benchmark on a Ray cluster, whose machines may come and go. Ray is imported here alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..checks import reason
from .work import Done, Job, run_job

TRIES = 4
"""Of a job whose worker is lost; what it had written it does not make again."""


def run_on_ray(
    address: str, todo: Sequence[Job], given: tuple, jobs: int | None, devices: Sequence[str]
) -> Iterator[Done]:
    """Run the jobs, each on a core, or on a GPU where the cluster has some; see `runner.run`.

    Args:
        address: of the cluster; `local` starts one on this machine, with `jobs` cores.
        jobs: at a time, at most; the cluster's own number by default.
        devices: cpu to leave its GPUs alone.

    Raises:
        ValueError: without the package, or a cluster at that address.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("ray is given, but its package is not installed; pip install ray") from error
    # Workers get this very code, and the threads that belong to the cores of a job.
    package = str(Path(__file__).resolve().parents[1])
    environment = {"py_modules": [package], "env_vars": {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}}
    own = {"num_cpus": jobs, "include_dashboard": False} if address == "local" else {}
    try:
        _check_answers(address)
        ray.init(address, runtime_env=environment, log_to_driver=False, **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"ray is {address!r}, where no cluster answers ({reason(error)}); give its address") from error
    try:
        on_gpu = bool(ray.cluster_resources().get("GPU")) and list(devices) != ["cpu"]
        task = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_retries=0)(run_job)
        yield from _all(ray, task, todo, (*given,), "cuda" if on_gpu else "cpu", jobs or len(todo))
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """OSError if nothing listens at a host and port, for which Ray itself would wait without an end."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _all(ray, task, todo: Sequence[Job], given: tuple, device: str, most: int) -> Iterator[Done]:
    waiting, tries, running = list(todo), {}, {}
    while waiting or running:
        while waiting and len(running) < most:
            job = waiting.pop(0)
            tries[job] = tries.get(job, 0) + 1
            running[task.remote(*given, job, device, 1)] = job
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        job = running.pop(done)
        try:
            yield ray.get(done)
        except ray.exceptions.RayError as error:  # its worker or machine is gone
            if tries[job] < TRIES:
                waiting.append(job)
            else:
                yield Done(job, f"its worker was lost {TRIES} times ({reason(error):.200})", str(error))
