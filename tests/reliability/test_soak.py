"""Two hundred trainings in one process: memory stays, and nothing stays on the network or in the background."""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path

import pytest
import torch

from anchor_core.adapters.kinds import KINDS
from anchor_core.objectives import OBJECTIVES
from anchor_core.training.orders import Orders
from tests.reliability.trainings import WAYS, Workshop

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from Linux' /proc"),
]

TRAININGS, WARM = 200, 60
ENDINGS = ("finished", "stopped", "cancelled", "failed")


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_two_hundred_trainings(model_folders, tmp_path, monkeypatch):
    shop, draw = Workshop(model_folders["epsilon"]), random.Random("soak")
    count = min(TRAININGS, int(os.environ.get("ANCHOR_CASES", TRAININGS)))
    kinds, objectives, ended, memory = sorted(KINDS), sorted(OBJECTIVES), [], []
    threads = set(threading.enumerate())
    for number in range(count):
        kind, objective, how = kinds[number % len(kinds)], objectives[number % len(objectives)], draw.choice(ENDINGS)
        text = objective == "class_diffusion"
        monkeypatch.setitem(WAYS, "soak", ({"kind": kind, "rank": 2, "text_encoder": text}, {"objective": objective}))
        orders = Orders()

        def listen(event, how=how, orders=orders) -> None:
            if event.event == "step" and how == "failed":
                raise torch.OutOfMemoryError("drawn")
            if event.event == "step" and how != "finished":
                {"stopped": orders.stop, "cancelled": orders.cancel}[how]()

        try:
            options = {"checkpoint_every": number % 2, "picture_every": 2 * (number % 3 == 0), "batch_size": 1}
            ended.append(
                shop.train("soak", tmp_path / str(number), listen=listen, orders=orders, steps=2, **options).how
            )
        except torch.OutOfMemoryError:
            ended.append("failed")
        assert ended[-1] == how, f"training {number}, {kind} by {objective}: {ended[-1]} instead of {how}"
        shop.check_network()
        memory.append(resident())
    left = set(threading.enumerate()) - threads
    told = ", ".join(f"{ended.count(how)} {how}" for how in ENDINGS)
    warm, last = (memory[min(WARM, count - 1)], memory[-1])
    growth = last / warm - 1
    print(
        f"soak: {count} trainings of {len(kinds)} kinds and {len(objectives)} objectives, {told}; {memory[0] >> 20} MB "
        f"after the first, {warm >> 20} after {min(WARM, count)}, {last >> 20} at the end ({growth:+.1%} since)"
    )
    assert growth < 0.05
    assert not left, f"threads are left: {left}"
