"""Faults in a real ComfyUI: memory, disks, Cancel, signals, several trainings at once; see test_faults.

After each the model on the canvas samples the same latents, in every bit, and the same training makes the same LoRA.
"""

from __future__ import annotations

import random
import signal
import time
from itertools import count

import pytest
import torch

from anchor_core.adapters.file import load_adapter
from tests.comfyui import comfy_server
from tests.nodes.graphs import base_latents, loras, node, training, with_options
from tests.reliability.comfy import install
from tests.reliability.trainings import NeverStruck, Tally, check_sentence, same

found = comfy_server.find()
pytestmark = [pytest.mark.long, pytest.mark.skipif(isinstance(found, str), reason=str(found))]

SMALL = {"steps": 4, "batch_size": 1, "preview_every": 2, "probe_every": 2}
SITES = ("forward", "forward", "forward", "backward", "optimizer", "full", "read-only")
ENDS = count(9999, -1)


class Canvas:
    """A server with what it makes undisturbed."""

    def __init__(self, base):
        self.base = install(base)
        self.start()
        self.latents = base_latents(self.server, next(ENDS))
        self.calls = {}
        for site in sorted({*SITES}):
            prompt = faulty(site, 0, name=f"whole-{site}") | {"6": node("FaultCalls", after=["4", 4])}
            self.calls[site] = self.server.run(prompt)["6"]["calls"][0]
        self.whole = load_adapter(loras(self.server)[-1])[0]

    def start(self) -> None:
        self.server = comfy_server.ComfyServer(*found, self.base)

    def check(self) -> None:
        """The model is as it was, every file is whole, and the same training makes the same LoRA."""
        assert torch.equal(base_latents(self.server, next(ENDS)), self.latents), "the model on the canvas changed"
        for file in loras(self.server):
            load_adapter(file)
        self.server.run(faulty("none", 0, name="again"))
        assert same(load_adapter(loras(self.server)[-1])[0], self.whole), "the next training differs"
        left = list((self.base / "output").rglob(".*.part"))
        assert not left, f"left over: {left}"


def faulty(site: str, call: int, **changes) -> dict:
    prompt = training(**SMALL | changes)
    prompt["4"]["inputs"]["name"] = ["60", 0]
    prompt["60"] = node("Fault", site=site, call=call, name=changes["name"])
    return prompt | {"5": node("PreviewAny", source=["4", 4])}


@pytest.fixture(scope="module")
def canvas(tmp_path_factory):
    canvas = Canvas(tmp_path_factory.mktemp("comfyui"))
    yield canvas
    canvas.server.stop()


def test_memory_and_disks(canvas, tmp_path):
    def one(draw: random.Random, folder) -> str:
        site, before = draw.choice(SITES), set(loras(canvas.server))
        entry = canvas.server.wait(
            canvas.server.queue(faulty(site, draw.randint(1, canvas.calls[site]), name=folder.name.replace(", ", "-")))
        )
        message, kept = comfy_server.failure(entry), set(loras(canvas.server)) - before
        if message is None:
            raise NeverStruck
        if site in ("full", "read-only"):
            check_sentence(ValueError(message), str(canvas.base))
        steps = [int(load_adapter(file)[1]["anchor.steps"]) for file in kept]
        assert len(kept) <= 1 and all(1 <= step <= SMALL["steps"] for step in steps)
        canvas.check()
        return f"{site}, {'the steps made are kept' if kept else 'no step kept'}"

    Tally("ComfyUI memory and disk", 10).run(one, tmp_path)


def test_cancelled_at_any_moment(canvas, tmp_path):
    def one(draw: random.Random, folder) -> str:
        before, objective = set(loras(canvas.server)), draw.choice(("anchor", "prior_preservation"))
        many = {"steps": 100000, "objective": objective, "seed": draw.randrange(1000), "class_count": 50}
        prompt = canvas.server.queue(faulty("none", 0, name="cancelled", **many))
        time.sleep(draw.uniform(0, 12))
        entry = canvas.server.get(f"/history/{prompt}").get(prompt)
        assert entry is None, f"it ended by itself: {comfy_server.failure(entry)}"
        end = time.monotonic() + 120
        while not canvas.server.get(f"/history/{prompt}") and time.monotonic() < end:
            canvas.server.post("/interrupt", {})  # as ComfyUI forgets one that comes before the prompt has begun
            time.sleep(2)
        assert comfy_server.failure(canvas.server.wait(prompt)) == "interrupted"
        kept = set(loras(canvas.server)) - before
        canvas.check()
        return f"{objective}, {'the steps made are kept' if kept else 'before the first step'}"

    Tally("ComfyUI cancelled", 4).run(one, tmp_path)


def test_two_at_once(canvas, tmp_path):
    """Two prompts in the queue, the first of which may be cancelled, and two nodes in one graph."""

    def two_prompts(cancelled: bool) -> str:
        first = faulty("none", 0, name="first", **({"steps": 100000} if cancelled else {}))
        ids = [canvas.server.queue(first), canvas.server.queue(faulty("none", 0, name="second", seed=0))]
        while cancelled and not canvas.server.get(f"/history/{ids[0]}"):
            time.sleep(3)
            canvas.server.post("/interrupt", {})
            break
        ends = [comfy_server.failure(canvas.server.wait(each)) for each in ids]
        assert ends == ["interrupted" if cancelled else None, None]
        return "a cancelled and a second prompt" if cancelled else "two prompts"

    def two_nodes(chained: bool) -> str:
        prompt = faulty("none", 0, name="same")
        second = {**prompt["4"]["inputs"], "prior_weight": 0.5} | ({"model": ["4", 0]} if chained else {})
        prompt |= {"14": node("AnchorTrainLoRA", **second), "15": node("PreviewAny", source=["14", 4])}
        before = set(loras(canvas.server))
        outputs = canvas.server.run(prompt)
        files = {outputs[number]["text"][0] for number in ("5", "15")}
        assert len(files) == 2 and len(set(loras(canvas.server)) - before) == 2, f"one name for two: {files}"
        first, other = (load_adapter(outputs[number]["text"][0])[0] for number in ("5", "15"))
        assert same(first, canvas.whole) and same(other, canvas.whole) != chained
        return "two nodes in a row" if chained else "two nodes"

    cases = iter([(two_prompts, False), (two_prompts, True), (two_nodes, False), (two_nodes, True)])

    def one(draw, folder) -> str:
        make, argument = next(cases)
        told = make(argument)
        canvas.check()
        return told

    Tally("ComfyUI, two at once", 4).run(one, tmp_path)


def test_the_server_is_ended(canvas, tmp_path):
    """In a training with checkpoints, which is gone on with after the start."""
    signals = iter([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])

    def one(draw, folder) -> str:
        number, name = next(signals), folder.name.replace(" ", "-")
        prompt = with_options(canvas.server, SMALL | {"name": name, "steps": 4}, checkpoint_every=1)
        canvas.server.queue(prompt)
        checkpoints, end = canvas.base / "output/anchor_checkpoints", time.monotonic() + 300
        while not list(checkpoints.glob(f"{name}*/*.ckpt")) and time.monotonic() < end:
            time.sleep(0.05)
        canvas.server.process.send_signal(number)
        canvas.server.process.wait(60)
        canvas.start()
        (made,) = [each.name for each in checkpoints.glob(f"{name}*")]
        canvas.server.run(with_options(canvas.server, SMALL | {"name": name}, checkpoint_every=1, resume=made))
        assert same(load_adapter(loras(canvas.server)[-1])[0], canvas.whole), "the resumed training differs"
        canvas.check()
        return f"{number.name}, and gone on with"

    Tally("ComfyUI ended", 3).run(one, tmp_path)
