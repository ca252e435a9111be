"""Trainings of the command line that are killed, interrupted and terminated at random moments."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from anchor_core import cli
from anchor_core.adapters.file import load_adapter
from tests.reliability.trainings import NeverStruck, Tally, age, leftovers, same

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which Windows does not do"),
]

SIGNALS = {
    "killed": (signal.SIGKILL,), "interrupted": (signal.SIGINT,), "terminated": (signal.SIGTERM,),
    "interrupted twice": (signal.SIGINT, signal.SIGINT), "terminated twice": (signal.SIGTERM, signal.SIGTERM),
}  # fmt: skip
WAYS = {"lora": ["--rank", "2"], "lora and token": ["--rank", "2", "--vectors", "1"]}
STEPS = 12


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    for number in range(3):
        Image.effect_noise((16, 16), 50 + number).convert("RGB").save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def trained(model_folders, references, tmp_path_factory):
    """By way: the tensors of an undisturbed training, and the seconds that it takes."""
    found = {}
    for way in WAYS:
        out = tmp_path_factory.mktemp("unbroken")
        began = time.perf_counter()
        assert cli.main(arguments(way, model_folders["epsilon"], references, out)) == 0
        found[way] = contents(out), time.perf_counter() - began
    return found


def arguments(way: str, model: Path, references: Path, out: Path, every: int = 0) -> list[str]:
    return [
        "train", "--model", str(model), "--references", str(references), "--out", str(out), "--resolution", "16",
        "--steps", str(STEPS), "--batch_size", "2", "--subject", "a photo of a sks dog", "--class", "a photo of a dog",
        "--device", "cpu", "--probe_every", "4", "--checkpoint_every", str(every), *WAYS[way],
    ]  # fmt: skip


def contents(out: Path) -> dict[str, Tensor]:
    files = {file.name: load_adapter(file)[0] for file in out.glob("*.safetensors")}
    return {f"{name} {key}": tensor for name, tensors in files.items() for key, tensor in tensors.items()}


def begun(command: list[str], log: Path) -> int:
    """The id of a process that runs the command, with what it says in `log`; it has begun."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        status = 70
        try:
            with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                os.write(writing, b"1")
                status = cli.main(command)
        except SystemExit as ended:
            status = ended.code
        except BaseException as error:
            log.write_text(f"{log.read_text()}\nTraceback: {error!r}")
        finally:
            os._exit(status)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return process


def test_ended_by_signals_at_random_moments(model_folders, references, trained, tmp_path):
    def one(draw: random.Random, folder: Path) -> str:
        folder.mkdir()
        way, how, every = draw.choice(sorted(WAYS)), draw.choice(sorted(SIGNALS)), draw.choice((0, 1, 3))
        out, (whole, seconds) = folder / "out", trained[way]
        command = arguments(way, model_folders["epsilon"], references, out, every=every)
        process = begun(command, folder / "log")
        time.sleep(draw.uniform(0, seconds))
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            raise NeverStruck
        for number in SIGNALS[how]:
            os.kill(process, number)
            time.sleep(draw.uniform(0, 0.2))
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                break
        if not ended:
            _, status = os.waitpid(process, 0)
        code, said = os.waitstatus_to_exitcode(status), (folder / "log").read_text()
        assert code in (0, 130, *(-number for number in SIGNALS[how])), f"{how}: {code}, {said[-500:]}"
        assert "Traceback" not in said, f"{how}: {said[-1500:]}"
        files = list(out.glob("*.safetensors"))
        steps = [int(load_adapter(file)[1]["anchor.steps"]) for file in files]
        assert all(1 <= step <= STEPS for step in steps) and (len(set(steps)) <= 1 or how == "killed")
        age(folder)
        resumed = ["--resume"] if (out / "checkpoints").is_dir() else []
        assert cli.main([*command, *resumed]) == 0, "the next training failed"
        assert same(contents(out), whole), "the next training differs"
        assert not leftovers(folder), f"left over: {leftovers(folder)}"
        return f"{how} with {'a' if files else 'no'} file"

    sys.stdout.flush()
    Tally("signals", 48).run(one, tmp_path)
