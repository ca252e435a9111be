"""Run under ComfyUI's interpreter: what its stock LoRA loader makes of our files, for `test_stock_loaders.py`.

Usage: check_kinds.py COMFYUI FOLDER. Each `<case>.json` in FOLDER has `keys` (file prefix to weight name) or `family`
and `config` (then the stock key maps for transformers are used), beside `<case>.base.safetensors` (weights) and
`<case>.file.safetensors` (the adapter). Writes `<case>.out.safetensors`, the patched weights by `<strength>/<name>`,
and `names.json`: ComfyUI's maps of module names, diffusers' to its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

comfyui, folder = sys.argv[1], Path(sys.argv[2])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfyui)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.utils  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

TRANSFORMERS = {"sd3": comfy.utils.mmdit_to_diffusers, "flux": comfy.utils.flux_to_diffusers}
UNETS = {
    "sd": {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    },
    "sdxl": {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    },
}


def key_map(case: dict) -> dict:
    if "keys" in case:
        return case["keys"]
    names = TRANSFORMERS[case["family"]](case["config"], output_prefix="diffusion_model.")
    suffix = ".weight"
    keys = {f"transformer.{name.removesuffix(suffix)}": to for name, to in names.items() if name.endswith(suffix)}
    for to in list(keys.values()):
        name = to if isinstance(to, str) else to[0]
        keys[name.removesuffix(suffix)] = keys[f"lora_unet_{name[16:-7].replace('.', '_')}"] = name
    return keys


def patched(case: dict, base: dict, file: dict, strength: float) -> dict:
    weights = {name: tensor.clone() for name, tensor in base.items()}
    for key, patch in comfy.lora.load_lora(dict(file), key_map(case)).items():
        name, offset, function = (*((key,) if isinstance(key, str) else key), None, None)[:3]
        patches = [(strength, patch, 1.0, offset, function)]
        weights[name] = comfy.lora.calculate_weight(patches, weights[name], name)
    return {f"{strength}/{name}": tensor.contiguous() for name, tensor in weights.items()}


for path in sorted(folder.glob("*.json")):
    case, stem = json.loads(path.read_text()), path.with_suffix("")
    base, file = (load_file(f"{stem}.{part}.safetensors") for part in ("base", "file"))
    save_file(patched(case, base, file, 1.0) | patched(case, base, file, 0.5), f"{stem}.out.safetensors")

maps = {name: comfy.utils.unet_to_diffusers(config) for name, config in UNETS.items()}
(folder / "names.json").write_text(json.dumps(maps))
