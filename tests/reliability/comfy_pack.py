"""A custom node pack for the tests: faults at a chosen call in ComfyUI's own process, and a watch over what it writes.

What is written outside of ComfyUI's base folder is a line in `outside.log` there.
"""

import os
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

BASE = Path(__file__).resolve().parents[2]
ARMED = {"site": "none", "left": 0}
SITES = ("none", "forward", "backward", "optimizer", "full", "read-only")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_OUTSIDE = os.open(BASE / "outside.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def reached(site: str) -> bool:
    """Whether this is the call that fails."""
    if ARMED["site"] != site:
        return False
    ARMED["left"] -= 1
    return ARMED["left"] == 0


def out_of_memory(site: str) -> None:
    if reached(site):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def before(site: str, function):
    def wrapped(*arguments, **options):
        out_of_memory(site)
        return function(*arguments, **options)

    return wrapped


def hook(event: str, arguments: tuple) -> None:
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "subprocess.Popen", "os.system"):
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
        return
    path = str(arguments[0])
    if "safetensors" in path and event in ("open", "os.rename"):
        for site, number in (("full", 28), ("read-only", 30)):
            if reached(site):
                raise OSError(number, os.strerror(number), path)
    if path.startswith(os.sep) and not path.startswith((str(BASE), "/dev/")) and "__pycache__" not in path:
        os.write(_OUTSIDE, f"{event} {path}\n".encode(errors="replace"))


torch.nn.functional.group_norm = before("forward", torch.nn.functional.group_norm)
torch.Tensor.backward = before("backward", torch.Tensor.backward)
register_optimizer_step_pre_hook(lambda *_: out_of_memory("optimizer"))
sys.addaudithook(hook)


class Fault:
    """Arms a fault for the nodes after it, which take `name` from it."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "arm", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"site": (list(SITES),), "call": ("INT", {"max": 10**9}), "name": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")

    def arm(self, site, call, name):
        ARMED.update(site=site, left=call)
        return (name,)


class FaultCalls:
    """How many calls of a site there were since the fault was armed with call 0, after `after` has run."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "count", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("STRING", {"forceInput": True})}}

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")

    def count(self, after):
        return {"ui": {"calls": [-ARMED["left"]]}}


NODE_CLASS_MAPPINGS = {"Fault": Fault, "FaultCalls": FaultCalls}
