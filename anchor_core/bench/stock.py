"""Memory and time of a training step against ComfyUI's own TrainLoraNode, on SD1.5's network at random weights.

Every measurement is a process of its own under ComfyUI's interpreter; the methods take turns, so that a slow minute of
the machine meets all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from ..writing import whole

METHODS = ("stock", "plain", "anchored")
_WORKER = Path(__file__).with_name("stock_worker.py")


def run(
    out: Path, comfyui: Path, python: Path, *, steps: int = 4, rounds: int = 3, side: int = 32, device: str = "cpu"
) -> dict:
    """Measure every method `rounds` times for `steps` steps on latents of `side`; write `out/report.json`.

    The first step of each run warms up and is left out of the time.
    """
    from ..evaluation.report import write_json

    out.mkdir(parents=True, exist_ok=True)
    weights = write_weights(out / "sd15-random.safetensors")
    runs: dict[str, list[dict]] = {method: [] for method in METHODS}
    for number in range(rounds):
        for method in METHODS:
            told = command(comfyui, python, weights, method, steps, side, device)
            done = subprocess.run([str(part) for part in told], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{method} failed: {done.stderr[-2000:]}")
            runs[method].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}, {method}: {runs[method][-1]}", file=sys.stderr)
    result = {
        "steps": steps,
        "latents": side,
        "device": device,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "methods": {method: _summary(each, runs["stock"]) for method, each in runs.items()},
    }
    write_json(out / "report.json", result)
    return result


def command(comfyui: Path, python: Path, weights: Path, method: str, steps: int, side: int, device: str) -> list:
    """The process of one measurement."""
    return [python, _WORKER, comfyui, Path(__file__).parents[2], weights, method, steps, side, device]


def _summary(runs: list[dict], stock: list[dict]) -> dict:
    """Medians over the rounds; ratios to the stock node of the same round."""
    seconds = [statistics.median(run["seconds"]) for run in runs]
    base = [statistics.median(run["seconds"]) for run in stock]
    return {
        "seconds per step": round(statistics.median(seconds), 3),
        "peak GB": round(statistics.median(run["peak"] for run in runs) / 1e9, 3),
        "time ratio": round(statistics.median(a / b for a, b in zip(seconds, base)), 3),
        "memory ratio": round(statistics.median(a["peak"] / b["peak"] for a, b in zip(runs, stock)), 3),
    }


def table(result: dict) -> str:
    """The figures as a markdown table."""
    columns = list(next(iter(result["methods"].values())))
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for method, figures in result["methods"].items():
        lines.append(f"| {method} | " + " | ".join(f"{figures[column]:g}" for column in columns) + " |")
    return "\n".join(lines)


def write_weights(path: Path, dtype: str = "bfloat16") -> Path:
    """SD1.5's network at random weights in 16 bit, unless the file is there."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    if not path.exists():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(cross_attention_dim=768)  # every other default is SD1.5's
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in unet.state_dict().items()}
        with whole(path) as part:
            save_file(tensors, part)
    return path
