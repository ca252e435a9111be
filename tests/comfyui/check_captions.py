"""Run under ComfyUI's interpreter: what its tokenizers are given of a training's prompts.

Usage: check_captions.py COMFYUI PACK OUTPUT PROMPTS. OUTPUT becomes a JSON list: by prompt, tokenizer's name to
[(id, weight), ...] without padding.
"""

import json
import sys
from pathlib import Path

comfyui, pack, output, prompts = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [comfyui, pack]  # in this order: both have a `nodes`

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd1_clip  # noqa: E402
import comfy.sdxl_clip  # noqa: E402

from anchor_core.backends.comfyui.tokens import tokenize  # noqa: E402


class Clip:
    def __init__(self, tokenizer):
        self.tokenize = tokenizer.tokenize_with_weights


def told(prompt: str) -> dict[str, list]:
    found = {}
    for kind in (comfy.sd1_clip.SD1Tokenizer, comfy.sdxl_clip.SDXLTokenizer):
        for name, (batch,) in tokenize(Clip(kind()), prompt, None, {}).items():
            end = next(place for place, (token, _) in enumerate(batch) if token == 49407) + 1
            found[f"{kind.__name__} {name}"] = batch[:end]
    return found


Path(output).write_text(json.dumps([told(prompt) for prompt in json.loads(prompts)]))
