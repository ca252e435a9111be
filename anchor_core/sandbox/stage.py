"""The loop that every stage of pretraining uses."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..writing import whole


def autocast(device: torch.device):
    """bfloat16 autocast; the weights stay in float32."""
    return torch.autocast(device.type, torch.bfloat16)


class Stage:
    """A resumable loop: modules, optimizer and step live in one checkpoint file.

    The learning rate warms up over 200 steps, stays, and falls linearly to zero over the last fifth.
    """

    def __init__(
        self, work: Path, name: str, modules: dict[str, nn.Module], rate: float, steps: int, decay: float = 1e-2
    ):
        self.path = work / f"{name}.pt"
        self.log_path = work / f"{name}.log.jsonl"
        self.name, self.modules, self.rate, self.steps, self.step = name, modules, rate, steps, 0
        parameters = [p for key, m in modules.items() if key != "ema" for p in m.parameters()]
        self.parameters = [p for p in parameters if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay, betas=(0.9, 0.99))
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        state = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        with whole(self.path) as part:
            torch.save(state, part)

    def __iter__(self):
        """Yields a random generator for the step, which a resumed run draws the same; the caller calls `descend`."""
        started, bar = time.time(), tqdm(total=self.steps, initial=self.step, desc=self.name)
        while self.step < self.steps:
            yield np.random.default_rng([self.step, sum(map(ord, self.name))])
            self.step += 1
            bar.update()
            if self.step % 50 == 0 or self.step == self.steps:
                bar.set_postfix(self.figures)
                with self.log_path.open("a") as file:
                    file.write(
                        json.dumps({"step": self.step, "seconds": round(time.time() - started, 1), **self.figures})
                        + "\n"
                    )
            if self.step % 250 == 0 or self.step == self.steps:
                self.save()
        bar.close()

    def descend(self, loss: Tensor, **figures: float) -> None:
        """One optimizer step on the loss."""
        tail = self.steps // 5
        factor = min((self.step + 1) / 200, 1.0, (self.steps - self.step) / max(tail, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.figures = {"loss": round(loss.item(), 5), **{k: round(v, 4) for k, v in figures.items()}}
