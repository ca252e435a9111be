"""The self test of `selftest.py`, under ComfyUI's interpreter.

Usage: selftest_worker.py COMFYUI ROOT MODEL RESOLUTION BATCH_SIZE STEPS DEVICE; prints a line for each finding, and
exits with 0 if it passed, 1 if not, 2 if the model cannot be trained on.
"""

from __future__ import annotations

import sys

comfyui, root, file, *numbers, device = sys.argv[1:]
sys.argv = ["main.py", *(["--cpu"] if device == "cpu" else [])]
sys.path[:] = [comfyui, *(path for path in sys.path[1:] if path != comfyui), root]  # ComfyUI's `nodes` first

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402
from comfy.sd import load_diffusion_model  # noqa: E402

import main  # noqa: E402, F401 (ComfyUI's own start, which chooses how weights are managed)


def run() -> int:
    from anchor_core.backends.comfyui.selftest import self_test

    resolution, batch_size, steps = map(int, numbers)
    with torch.inference_mode():  # as ComfyUI runs every prompt
        try:
            found = self_test(load_diffusion_model(file), resolution, batch_size, steps=steps)
        except ValueError as error:
            print(error)
            return 2
    print(found)
    return 0 if found.passed else 1


sys.exit(run())
