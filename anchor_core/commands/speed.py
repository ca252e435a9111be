"""`bench speed`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..checks import check_choice, check_count
from ..training.settings import PRECISIONS
from .shared import check_writable


def add_speed_options(speed: ArgumentParser) -> None:
    speed.add_argument("--model", default="sandbox", choices=("sandbox", "sd15"), help="sd15: at random weights")
    speed.add_argument("--rounds", type=int, default=3, help="in which all methods take a turn (default 3)")
    speed.add_argument("--steps", type=int, default=6, help="timed in a measurement, after a first one (default 6)")
    speed.add_argument("--batch_size", "--batch-size", type=int, default=4, help="(default 4)")
    speed.add_argument("--rank", type=int, default=8, help="(default 8)")
    speed.add_argument("--latents", type=int, default=16, help="their edge (default 16, pictures of 64 in the sandbox)")
    speed.add_argument("--dtype", default="fp32", choices=PRECISIONS[1:], help="of the weights (default fp32)")
    speed.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    speed.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="these alone")
    speed.add_argument("--comfyui", metavar="DIR", help="against this ComfyUI's trainer and CFG too, at SD1.5's size")
    speed.add_argument("--comfyui_python", "--comfyui-python", metavar="FILE", help="(default: its .venv)")


def speed(options: Namespace) -> None:
    from ..bench import speed

    counts = {name: check_count(name, getattr(options, name)) for name in ("steps", "rank", "latents", "rounds")}
    spec = speed.Spec(
        options.model, counts["steps"], check_count("batch_size", options.batch_size), counts["rank"],
        counts["latents"], device=options.device,
        dtype={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[options.dtype],
    )  # fmt: skip
    comfyui = python = None
    if options.comfyui:
        comfyui = Path(options.comfyui)
        python = Path(options.comfyui_python or comfyui / ".venv/bin/python")
        for file in (comfyui / "main.py", python):
            if not file.is_file():
                raise ValueError(f"--comfyui: there is no file {file}; give ComfyUI's folder and its interpreter")
    for name in options.methods:
        check_choice("methods", name, speed.names(comfyui is not None))
    out = check_writable(options.out)
    result = speed.run(out, spec, rounds=counts["rounds"], comfyui=comfyui, python=python, methods=options.methods)
    print(speed.markdown(result))
