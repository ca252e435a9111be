"""CPU seconds that the pack adds to ComfyUI's start, under ComfyUI's interpreter.

Usage: import_worker.py COMFYUI ROOT; prints {"seconds": [one number], "peak": bytes}.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import resource
import sys
import time

comfyui, root = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, comfyui)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import server  # noqa: E402, F401

nodes = importlib.import_module("nodes")  # ComfyUI's, not ours
began = time.process_time()
loaded = asyncio.run(nodes.load_custom_node(root))
seconds = time.process_time() - began
if not loaded:
    raise SystemExit("ComfyUI did not load the pack; its messages are above")
print(json.dumps({"seconds": [round(seconds, 4)], "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF)[2]}))
