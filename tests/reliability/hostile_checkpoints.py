"""Run as a process of its own: trainings that go on from checkpoints that were damaged by seed, one after another.

Usage: hostile_checkpoints.py FOLDER KIND FIRST LAST. For each seed a line is printed: the seed, and `unbroken`,
`otherwise` (it went on, to another end), `refused`, `diverged` or what is wrong. KIND is `bytes`, `structure` (of the
contents, below the seal that they had) or `tampered` (and sealed anew).
"""

from __future__ import annotations

import copy
import logging
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import read_adapter
from anchor_core.adapters.torch_file import read_torch, sealed
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from anchor_core.drift import DriftProbe
from anchor_core.training.checkpoint import Checkpoints
from anchor_core.training.orders import Orders
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import TrainingDiverged, train
from tests.conftest import build_pipeline
from tests.data.hostile import damaged, watch
from tests.reliability.trainings import CONCEPT, check_sentence, same

WAYS = {
    "plain": {"objective": "anchor"},
    "class pictures, best kept": {"objective": "prior_preservation", "keep": "best", "learning_rate": 3e-3},
    "averaged, two passes": {"ema": 0.9, "schedule": "cosine", "warmup": 1, "accumulation": 2},
    "scaled": {"precision": "fp16"},
    "eight bits": {"optimizer": "adamw8bit"},
    "schedule-free": {"optimizer": "schedule_free"},
}
STEPS, BROKEN_AT = 4, 2
ODD = (
    None, True, -1, 0, 10**30, 2**63, math.nan, math.inf, -math.inf, 1e300, "", "text", "\x1b[2J", "x" * 5000, [], {},
    b"", b"\0", (), [None], {"": ""}, torch.tensor([]), torch.tensor(math.nan), torch.zeros(3, dtype=torch.uint8),
    torch.zeros(2, 2, dtype=torch.complex64), torch.ones(1, 1, 1, 1, 1), torch.tensor(2**62), torch.zeros(0, 5),
)  # fmt: skip


class Bench:
    """Trainings of six ways, each with its checkpoints after step 1 and 2 of 4, and its end."""

    def __init__(self, base: Path):
        build_pipeline(base / "parts", "epsilon").save_pretrained(base / "model")
        self.denoiser = DiffusersDenoiser.from_pretrained(base / "model")
        self.latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(7))
        self.good = {way: base / "good" / way for way in WAYS}
        for way, folder in self.good.items():
            self.train(way, folder, BROKEN_AT)
        self.unbroken = {way: self.train(way, base / "whole" / way) for way in WAYS}

    def train(self, way: str, folder: Path, stop_after: int = STEPS) -> dict[str, torch.Tensor]:
        adapter, made = self.denoiser.attach(AdapterConfig(rank=2)), []
        settings = {
            "steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 1, "probe_every": 2, **WAYS[way]
        }  # fmt: skip
        try:
            probe = DriftProbe(self.denoiser, self.latents[:1], CONCEPT, timesteps=2, noises=1)
            train(
                self.denoiser, adapter, self.latents, CONCEPT, TrainSettings(**settings), probe=probe,
                class_latents=self.latents.flip(0), checkpoints=Checkpoints(folder),
                tell=lambda event: made.append(event) if event.event == "step" else None,
                orders=Orders(lambda: len(made) == stop_after),
            )  # fmt: skip
            return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        finally:
            self.denoiser.detach()

    def hold_early(self, file: Path) -> None:
        """The other reader of checkpoints: autoguidance by an earlier one of the run."""
        adapter = self.denoiser.attach(AdapterConfig(rank=2))
        try:
            adapter.hold_early(read_adapter(file))
        except ValueError as error:
            check_sentence(error)
        finally:
            self.denoiser.detach()


def places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path] if path else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        found += places(each, (*path, key))
    return found


def tampered(state: dict, draw: random.Random) -> dict:
    """One or two places of the state are other values, of another shape or type, gone, or elsewhere."""
    state = copy.deepcopy(state)
    for _ in range(draw.choice((1, 1, 2))):
        top = draw.choice(list(state))  # as often as another: most of the places are in the optimizer
        path = draw.choice([path for path in places(state) if path[0] == top])
        owner = state
        for key in path[:-1]:
            owner = owner[key]
        key, value, kind = path[-1], owner[path[-1]], draw.randrange(5)
        if kind == 0:
            owner.pop(key)
        elif kind == 1 and isinstance(value, torch.Tensor) and value.numel():
            owner[key] = draw.choice((
                value.flatten(), value.flatten()[:1], value.unsqueeze(0), torch.cat([value.reshape(-1)] * 2),
                value.double(), value.long(), value.bool(), value * 0 + 255, value.float() * math.nan,
                value.float() * 1e38,
            )).clone()  # fmt: skip
        elif kind == 2 and isinstance(value, list):
            owner[key] = draw.choice((value * 2, value[:-1], value[::-1], [value], tuple(value)))
        elif kind == 3 and isinstance(owner, dict):
            owner[f"{key}2"] = owner.pop(key)
        else:
            owner[key] = draw.choice(ODD)
        if not state:
            break
    return state


def make(folder: Path, good: Path, kind: str, draw: random.Random) -> None:
    """A folder whose newest checkpoint is damaged, beside the one before it or alone."""
    folder.mkdir(parents=True)
    older, newest = Checkpoints(good).files()
    if draw.random() < 0.4:
        shutil.copy(older, folder)
    target = folder / newest.name
    if kind == "bytes":
        target.write_bytes(damaged(newest.read_bytes(), draw))
    else:
        state = tampered(read_torch(newest), draw)
        torch.save(sealed(state) if kind == "tampered" else state, target)


def went_on(bench: Bench, way: str, folder: Path) -> str:
    """What became of the training."""
    try:
        end = bench.train(way, folder)
    except (ValueError, TrainingDiverged) as error:
        check_sentence(error)
        assert str(folder) in str(error) or isinstance(error, TrainingDiverged), f"names no folder: {error}"
        return "refused" if isinstance(error, ValueError) else "diverged"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in end.values()), "NaN in the adapter"
    return "unbroken" if same(end, bench.unbroken[way]) else "otherwise"


def main(base: Path, kind: str, first: int, last: int) -> None:
    logging.disable(logging.CRITICAL)
    base.mkdir(exist_ok=True)
    bench = Bench(base)
    for seed in range(first, last):
        draw = random.Random(f"{kind} {seed}")
        way, folder = draw.choice(sorted(WAYS)), base / kind / f"case {seed}"
        make(folder, bench.good[way], kind, draw)
        damaged_file = Checkpoints(folder).files()[-1]
        done = watch(folder)
        try:
            bench.hold_early(damaged_file)
            outcome = went_on(bench, way, folder)
        except Exception as error:  # what is wrong is what this is asked for
            outcome = f"{type(error).__name__}: {error}"
        did = done()
        shutil.rmtree(folder)
        print(seed, " ".join((f"did {did[0]}" if did else outcome).split())[:600], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
