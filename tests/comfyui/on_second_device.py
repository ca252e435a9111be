"""Start ComfyUI on the second device (`second_device.py`): on_second_device.py COMFYUI/main.py [options of ComfyUI]."""

from __future__ import annotations

import logging
import runpy
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    import second_device

    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    run = threading.Thread.run

    def run_on_device(thread: threading.Thread) -> None:
        second_device.are_plain()
        with second_device.device():  # a mode is of one thread
            run(thread)

    threading.Thread.run = run_on_device
    with second_device.device():
        import comfy.options

        comfy.options.enable_args_parsing()
        second_device.comfyui_takes_it()
        logging.root.handlers.clear()  # what is logged before ComfyUI sets it up would be logged twice from then on
        runpy.run_path(sys.argv[0], run_name="__main__")
