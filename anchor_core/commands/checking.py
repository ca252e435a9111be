"""The verb `selftest`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path


def selftest(options: Namespace) -> int:
    from ..bench import selftest

    comfyui = Path(options.comfyui)
    python = Path(options.python or comfyui / ".venv/bin/python")
    files = {"comfyui": comfyui / "main.py", "python": python, "model": Path(options.model or python)}
    for option, file in files.items():
        if not file.is_file():
            raise ValueError(
                f"{option}: there is no {file}; give the folder of a ComfyUI, its interpreter, a model file"
            )
    given = {name: getattr(options, name) for name in ("resolution", "batch_size", "steps", "device")}
    return 0 if selftest.run(comfyui, python, Path(options.model) if options.model else None, **given) else 1
