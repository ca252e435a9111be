"""Time of a step by each rule against ComfyUI's own CFG step with the same LoRA, on SD1.5's network.

One process under ComfyUI's interpreter makes all the steps, a method at a time in turns, so that a slow minute of the
machine meets all of them; `stock again` is the stock step once more, which shows how far equal things differ.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path

from ..guidance import make_rule
from .stock import write_weights

CONTROLS = ("stock", "stock again")
"""ComfyUI's own step, twice."""
_WORKER = Path(__file__).with_name("guidance_worker.py")


def has_two_branches(method: str) -> bool:
    """Whether it is a rule with two branches, as CFG; the steps of one with three may have a third row to compute."""
    return method not in CONTROLS and len(make_rule(method).branches) == 2


def run(
    out: Path, comfyui: Path, python: Path, *, rounds: int = 5, steps: int = 2, side: int = 32, device: str = "cpu"
) -> dict:
    """`rounds` times `steps` timed steps of each method on latents of `side`; write `out/report.json`.

    A step before them warms up. On the CPU seconds are the process's own.
    """
    from ..evaluation.report import write_json

    out.mkdir(parents=True, exist_ok=True)
    weights = write_weights(out / "sd15-random.safetensors")
    timed = measure(comfyui, python, weights, rounds, steps, side, device)
    result = {
        "rounds": rounds,
        "steps": steps,
        "latents": side,
        "device": device,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "methods": {method: _summary(seconds, timed["stock"]) for method, seconds in timed.items()},
    }
    write_json(out / "report.json", result)
    return result


def measure(
    comfyui: Path, python: Path, weights: Path, rounds: int, steps: int, side: int, device: str
) -> dict[str, list[list[float]]]:
    """Method -> rounds of seconds of steps."""
    command = [python, _WORKER, comfyui, Path(__file__).parents[2], weights, rounds, steps, side, device]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError("the measurement failed; its messages are above")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(rounds: list[list[float]], stock: list[list[float]]) -> dict:
    """Medians over all steps, and over the rounds of the ratio to the stock steps of the same round."""
    seconds, base = ([second for each in runs for second in each] for runs in (rounds, stock))
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(rounds, stock, strict=True)]
    return {
        "seconds per step": round(statistics.median(seconds), 4),
        "ratio of medians": round(statistics.median(seconds) / statistics.median(base), 4),
        "median ratio of a round": round(statistics.median(ratios), 4),
    }
