"""What of the command line computes, on one device: verbs_on_device.py DEVICE FOLDER --some | --all.

Each verb writes into a folder of its own. `--some` is a training and a picture, `--all` every verb, objective, kind of
adapter, method and rule. `npu` is the second device of `tests/comfyui/second_device.py`.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from anchor_core import cli
from anchor_core.adapters.kinds import KINDS
from anchor_core.branches import CLASS
from anchor_core.guidance import RULES, make_rule
from anchor_core.objectives import OBJECTIVES
from anchor_core.training.methods import METHODS
from tests.comfyui import second_device

PROMPTS = ["--subject", "a photo of a sks star", "--class", "a photo of a star"]
TRAIN = ["train", "--steps=2", "--batch_size=2", "--rank=2", "--class_pictures=2"]


def verbs(folder: Path, everything: bool):
    """(name, arguments) of each call, in an order in which the files that one reads are there."""
    pictures, adapter = folder / "pip", folder / "anchored/adapter.safetensors"
    references, drawn = ["--references", pictures], ["--prompt", "a photo of a sks star", "--steps=1", "--count=1"]
    keeps = ["--text_encoder", "--vectors=1", "--class_weight=0.5", "--checkpoint_every=1", "--probe_every=1"]
    yield "pip", ["sandbox", "subject", "pip"]
    yield "anchored", [*TRAIN, *references, *PROMPTS, *keeps]
    yield "sampled", ["sample", "--adapter", adapter, *drawn, "--guidance=2"]
    if not everything:
        return
    yield "adjusted", ["sample", "--adapter", adapter, *drawn, "--class", "a photo of a star", "--adjust=token"]
    yield "checked", ["checkup", adapter, *references, "--timesteps=2", "--noises=1", "--count=1", "--steps=1"]
    yield "inspected", ["inspect", "--adapter", adapter, *references]
    yield "strengths", ["sweep", "--adapter", adapter, *drawn, *references, "--judge=sandbox", "--strength=0,1"]
    compared = [*references, "--judge=sandbox", "--pictures", f"ours={folder / 'sampled'}", "--adapters"]
    yield "compared", ["compare", *compared, f"ours={adapter}", *PROMPTS]
    yield "banked", [*TRAIN, *references, *PROMPTS, "--draws=2", "--sweep=w=0,1", "--cache", folder / "cache"]
    yield "anchored", [*TRAIN, *references, *PROMPTS, *keeps, "--steps=3", "--resume"]
    for name in OBJECTIVES:
        yield f"objective {name}", [*TRAIN, *references, *PROMPTS, "--objective", name, "--vectors=1"]
    for name in KINDS:
        yield f"kind {name}", [*TRAIN, *references, *PROMPTS, "--kind", name, "--ema=0.5", "--micro_batch=1"]
    for name in METHODS:
        yield f"method {name}", [*TRAIN, *references, *PROMPTS, "--method", name, "--gradient_checkpointing"]
    for name in RULES:
        more = [*(["--early", adapter] if name == "autoguidance" else []),
                *(PROMPTS[2:] if CLASS in make_rule(name).branches else [])]  # fmt: skip
        yield f"rule {name}", ["sample", "--adapter", adapter, *drawn, "--rule", name, *more]


def main(device: str, folder: Path, everything: bool) -> int:
    for name, (verb, *arguments) in verbs(folder, everything):
        where = [] if verb == "sandbox" else ["--model", "sandbox", "--device", device]
        status = cli.main([verb, *map(str, arguments), *where, "--out", str(folder / name)])
        if status:
            print(f"{name} ended with {status}", file=sys.stderr)
            return status
    return 0


if __name__ == "__main__":
    chosen, out, *options = sys.argv[1:]
    with second_device.device() if chosen == second_device.NAME else nullcontext():
        sys.exit(main(chosen, Path(out), "--all" in options))
