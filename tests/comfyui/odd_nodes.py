"""A custom node pack for the tests: values that no training makes, but other nodes may hand on."""

import torch

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def lora(value: float = 0.01, width: int = 128):
    return {f"{LAYER}.lora_{part}.weight": torch.full((4, width) if part == "down" else (width, 4), value)
            for part in ("down", "up")}  # fmt: skip


def sd3(part: int):
    from .comfy_models import build

    return build("sd3")[part]


class WithTokens(dict):
    metadata = {"anchor.vectors": "2", "anchor.token": "sks"}


VALUES = {
    "IMAGE": {
        "nan": lambda: torch.full((2, 64, 64, 3), torch.nan),
        "infinite": lambda: torch.full((2, 64, 64, 3), torch.inf),
        "pixel": lambda: torch.ones(2, 1, 1, 3),
        "none": lambda: torch.ones(0, 64, 64, 3),
        "grey": lambda: torch.ones(2, 64, 64, 1),
    },
    "LORA_MODEL": {
        "nan": lambda: lora(torch.nan),
        "none": dict,
        "wide": lambda: lora(width=99),
        "other": lambda: {"elsewhere.lora_down.weight": torch.ones(4, 9), "elsewhere.lora_up.weight": torch.ones(9, 4)},
        "tokens": lambda: WithTokens(lora()),
    },
    "CONDITIONING": {
        "nan": lambda: [[torch.full((1, 77, 128), torch.nan), {}]],
        "wide": lambda: [[torch.ones(1, 77, 768), {}]],
        "long": lambda: [[torch.ones(1, 154, 128), {}]],
        "zero": lambda: [[torch.zeros(1, 77, 128), {}]],
        "two": lambda: [[torch.ones(1, 77, 128), {}]] * 2,
        "none": list,
    },
    "CLIP": {"none": lambda: None, "sd3": lambda: sd3(1)},
    "VAE": {"none": lambda: None, "sd3": lambda: sd3(2)},
}


def node_of(kind: str) -> type:
    class Odd:
        RETURN_TYPES, FUNCTION, CATEGORY = (kind,), "make", "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"value": (list(VALUES[kind]),)}}

        def make(self, value):
            return (VALUES[kind][value](),)

    return Odd


NODE_CLASS_MAPPINGS = {f"Odd{kind}": node_of(kind) for kind in VALUES}


class OddAny:
    """Hands any constant of a prompt on, under the type that fits everything: ComfyUI compares it with nothing."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}}

    def make(self, value):
        return (value,)


NODE_CLASS_MAPPINGS["OddAny"] = OddAny
