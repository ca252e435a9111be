"""Short trainings of a tiny network in several ways, each known step by step from one that nothing disturbed."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import load_adapter
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from anchor_core.concept import Concept
from anchor_core.data.cache import Cache
from anchor_core.data.pictures import References
from anchor_core.data.prepare import ClassPictures
from anchor_core.training import preview
from anchor_core.training.checkpoint import Checkpoints
from anchor_core.training.events import Ended, Saved, StepMade
from anchor_core.training.orders import Orders
from anchor_core.training.run import Outcome, run
from anchor_core.training.saving import Files
from anchor_core.training.settings import DataSettings, TrainSettings

CONCEPT = Concept("a photo of a sks dog", "a photo of a dog")
STEPS = 4
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "anchor": ({"rank": 2, "dropout": 0.3}, {}),
    "prior, best kept": ({"rank": 2}, {"objective": "prior_preservation", "keep": "best", "learning_rate": 3e-3}),
    "lokr, averaged": ({"kind": "lokr", "rank": 2}, {"ema": 0.9, "schedule": "cosine", "warmup": 1}),
    "dora, two passes": ({"kind": "dora", "rank": 2}, {"accumulation": 2, "objective": "reconstruction"}),
    "lora and token": ({"rank": 2, "vectors": 1}, {"min_snr": 5.0}),
    "token alone": ({"kind": "none", "vectors": 2, "initial": "dog"}, {"gradient_checkpointing": True}),
    "text encoder": ({"rank": 2, "text_encoder": True}, {"objective": "class_diffusion"}),
    "loha, schedule-free": ({"kind": "loha", "rank": 2}, {"optimizer": "schedule_free"}),
}
"""Options of the adapter and of the training."""


@dataclass(frozen=True)
class Unbroken:
    """What a way's training comes to: the tensors of its files after each step, its losses, and the step kept."""

    files: dict[int, list[dict[str, torch.Tensor]]]
    losses: list[float]
    kept: int


class Workshop:
    """One network, on which trainings run one after another."""

    def __init__(self, model: Path):
        self.model = model
        self.denoiser = DiffusersDenoiser.from_pretrained(model)
        self._before = self._state()
        pixels = torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        self.references = References(list(pixels), ["one", "two", "three"])
        self._unbroken: dict[str, Unbroken] = {}
        self.events: list[Any] = []

    def train(
        self, way: str, out: Path, *, listen=lambda event: None, orders: Orders | None = None,
        checkpoint_every: int = 0, picture_every: int = 0, cache: Path | None = None, steps: int = STEPS,
        **changes: Any,
    ) -> Outcome:  # fmt: skip
        """A training into `out`; what it told is in `events`, and the network has no adapter afterwards."""
        adapter, settings = WAYS[way]
        self.events = events = []

        def tell(event) -> None:
            events.append(event)
            listen(event)

        settings = {
            "steps": steps, "batch_size": 2, "learning_rate": 1e-2, "probe_every": 2,
            "checkpoint_every": checkpoint_every, **settings, **changes,
        }  # fmt: skip
        try:
            with patch.object(preview, "STEPS", 2):  # for speed
                return run(
                    self.denoiser, self.references, CONCEPT, TrainSettings(**settings), AdapterConfig(**adapter),
                    DataSettings(flip=True), files=Files.beside(out / "adapter.safetensors"),
                    class_pictures=ClassPictures(2, sampling={"steps": 1, "batch_size": 1}, folder=cache),
                    probe={"timesteps": 2, "noises": 1}, tell=tell, orders=orders, picture_every=picture_every,
                    checkpoints=Checkpoints(out / "checkpoints") if checkpoint_every else None,
                    cache=None if cache is None else Cache(self.denoiser, cache),
                )  # fmt: skip
        finally:
            self.denoiser.detach()

    def unbroken(self, way: str, folder: Path) -> Unbroken:
        """Made once, in `folder`, with a file for every step."""
        if way not in self._unbroken:
            orders = Orders()
            listen = lambda event: orders.save_now() if isinstance(event, StepMade) else None  # noqa: E731
            out = folder / way
            outcome = self.train(way, out, listen=listen, orders=orders, picture_every=2)
            files = {
                event.step: [load_adapter(file)[0] for file in event.files]
                for event in self.events
                if isinstance(event, Saved)
            }
            self._unbroken[way] = Unbroken(files, outcome.history.losses, outcome.history.kept)
        return self._unbroken[way]

    # --- what must hold -----------------------------------------------------------------------------------------------

    @property
    def made(self) -> int:
        """Steps that the last training told of."""
        return max((event.step for event in self.events if isinstance(event, StepMade)), default=0)

    def check_network(self) -> None:
        values, objects = self._state()
        assert objects == self._before[1], "modules, classes, hooks or flags of the network changed"
        assert same(values, self._before[0]), "weights of the network changed"

    def check_files(self, way: str, out: Path) -> int:
        """The step whose adapter is in `out`, 0 if there is none; AssertionError for one that is not that step's."""
        found = [out / name for name in ("adapter.safetensors", "embedding.safetensors") if (out / name).exists()]
        steps = {int(load_adapter(file)[1]["anchor.steps"]) for file in found}
        assert len(steps) <= 1, f"two files of one training are of {steps} steps"
        for step in steps:
            expected = self._unbroken[way].files[step]
            alone = [file.name for file in found] == ["embedding.safetensors"]  # which is of use without the layers
            assert alone or len(found) == len(expected), f"{len(found)} files of {len(expected)}"
            for file, tensors in zip(found, expected[1:] if alone else expected):
                assert same(load_adapter(file)[0], tensors), f"{file.name} is not that of step {step}"
        return max(steps, default=0)

    def check_told(self) -> None:
        assert isinstance(self.events[-1], Ended), f"the last event is {self.events[-1]}"
        assert self.events[-1].made == self.made, f"{self.events[-1]} after {self.made} steps"

    def check_next(self, way: str, out: Path, **options: Any) -> None:
        """Another training in the same place goes on, or begins anew, and comes to the same; nothing is left over."""
        age(out)
        outcome, expected = self.train(way, out, **options), self._unbroken[way]
        assert outcome.how == "finished" and outcome.history.losses == expected.losses, "the next training differs"
        assert outcome.history.kept == expected.kept and self.check_files(way, out) == expected.kept
        left = leftovers(out)
        assert not left, f"left over: {left}"
        self.check_network()

    def _state(self) -> tuple[dict[str, torch.Tensor], list]:
        parts = [self.denoiser.network, self.denoiser.vae, self.denoiser.text_encoder]
        values = {
            f"{number} {name}": tensor.clone()
            for number, part in enumerate(parts)
            for name, tensor in part.state_dict().items()
        }
        modules = [module for part in parts for module in part.modules()]
        return values, [
            *((id(module), type(module), module.training, hooks(module)) for module in modules),
            *((id(each), each.requires_grad, each.grad is None) for part in parts for each in part.parameters()),
        ]


def hooks(module: torch.nn.Module) -> tuple[int, ...]:
    """How many of each kind a module has; an own `forward` counts for one."""
    kinds = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
        module._state_dict_hooks,
    )  # fmt: skip
    return (*map(len, kinds), "forward" in vars(module))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def age(folder: Path) -> None:
    """What was left half-written is two hours old; the next write is to take it away."""
    for part in leftovers(folder):
        os.utime(part, (time.time() - 7200,) * 2)


def leftovers(folder: Path) -> list[Path]:
    return [each for each in folder.rglob(".*") if each.is_file()]


def check_sentence(error: BaseException, *names: str) -> None:
    """One sentence that names one of `names`."""
    text = str(error)
    assert text and text.isprintable() and len(text) < 1500, f"no sentence: {text[:300]!r}"
    assert not names or any(name in text for name in names), f"names none of {names}: {text!r}"


class NeverStruck(Exception):
    """The moment of the fault did not come."""


class Tally:
    """Seeded cases of one kind, by what became of them.

    Args:
        cases: how many; $ANCHOR_CASES bounds it, for a quick look.

    Attributes:
        seed: of the case that runs.
    """

    seed = 0

    def __init__(self, kind: str, cases: int):
        self.kind, self.cases = kind, min(cases, int(os.environ.get("ANCHOR_CASES", cases)))
        self.told: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, one: Callable[[random.Random, Path], str], base: Path) -> None:
        """`one(draw, folder)` for seeds from 0 on; it gives a word for what became of it, and raises what is wrong.

        AssertionError, with the seeds, if one was wrong; $ANCHOR_SEED, the first seed, brings one back.
        """
        for seed in count(int(os.environ.get("ANCHOR_SEED", 0))):
            if self.told.total() == self.cases:
                break
            self.seed = seed
            folder = base / f"{self.kind} {seed}"
            try:
                became = one(random.Random(f"{self.kind} {seed}"), folder)
            except NeverStruck:
                continue
            except Exception as error:  # all cases are run, and all that is wrong is told
                became = "wrong"
                self.wrong.append(f"seed {seed}: {type(error).__name__}: {error}")
                print(f"{self.kind}, {self.wrong[-1]}"[:2000], flush=True)
            self.told[became] += 1
            shutil.rmtree(folder, ignore_errors=True)
        told = ", ".join(f"{number} {became}" for became, number in sorted(self.told.items()) if became != "wrong")
        print(f"{self.kind}: {self.cases} cases, {told}, {len(self.wrong)} wrong")
        assert not self.wrong, "\n".join(self.wrong)
