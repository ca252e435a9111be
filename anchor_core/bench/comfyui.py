"""The measurements of `bench speed` in a real ComfyUI, on SD1.5's network at full size and random weights.

A step of ComfyUI's own TrainLoraNode and of our trainings, a step of its CFG and of every guidance rule: each a process
of its own under ComfyUI's interpreter.
"""

from __future__ import annotations

from pathlib import Path

from ..guidance import RULES, make_rule
from ..writing import whole

BANKED = "anchored, bank"
"""With the anchors of the same training before it."""
TRAINED = ("stock", "plain", "anchored", BANKED)
CFG = "stock CFG"
"""A step of ComfyUI's own guider with its own LoraLoader's LoRA."""
METHODS = (*TRAINED, CFG, *RULES)
_WORKER = Path(__file__).with_name("comfyui_worker.py")


def command(comfyui: Path, python: Path, weights: Path, method: str, steps: int, side: int, device: str) -> list:
    """The process of one measurement: of `steps` steps on latents of `side`, after one that warms up."""
    return [python, _WORKER, comfyui, Path(__file__).parents[2], weights, method, steps, side, device]


def has_two_branches(rule: str) -> bool:
    """As CFG; the steps of a rule with three may have a third row to compute."""
    return len(make_rule(rule).branches) == 2


def write_weights(path: Path, dtype: str = "bfloat16") -> Path:
    """SD1.5's network at random weights in 16 bit, unless the file is there."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    if not path.exists():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(cross_attention_dim=768)  # every other default is SD1.5's
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in unet.state_dict().items()}
        with whole(path) as part:
            save_file(tensors, part)
    return path
