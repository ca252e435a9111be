"""`bench speed`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..checks import check_choice, check_count
from .shared import check_writable


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
