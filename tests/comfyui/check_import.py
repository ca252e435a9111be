"""Loads the pack as ComfyUI does, without the packages that ComfyUI does not bring, and writes what came with it.

    python check_import.py COMFYUI PACK OUT

`seconds` are CPU seconds of this process; `python -X importtime check_import.py ...` shows where they go.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

COMFYUI, PACK, OUT = sys.argv[1:]
NOT_OF_COMFYUI = ("diffusers", "peft", "matplotlib", "accelerate", "bitsandbytes", "prodigyopt", "schedulefree")

sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, COMFYUI)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy_config.config_parser  # noqa: E402, F401
import server  # noqa: E402, F401

import nodes  # noqa: E402

sys.modules.update(dict.fromkeys(NOT_OF_COMFYUI))  # None: importing one raises ImportError
before, started = set(sys.modules), time.process_time()
loaded = asyncio.run(nodes.load_custom_node(PACK))
seconds = time.process_time() - started
brought = {name.removeprefix(PACK).lstrip(".") for name in set(sys.modules) - before}
found = [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Anchor")]
Path(OUT).write_text(
    json.dumps({"loaded": loaded, "seconds": seconds, "brought": sorted(brought), "nodes": sorted(found)}, indent=1)
)
