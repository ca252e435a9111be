"""Run under ComfyUI's interpreter: headers of model files as they are distributed, without their weights.

Usage: headers_of_models.py COMFYUI FOLDER. Writes FOLDER/sd1.safetensors and so on: the names and shapes of ComfyUI's
own networks at full size, built on the meta device; no data follows the header.
"""

import json
import struct
import sys
from pathlib import Path

comfyui, folder = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfyui)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True}
SD1 = UNET | {
    "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "channel_mult": [1, 2, 4, 4],
    "transformer_depth_middle": 1, "transformer_depth_output": [1] * 9 + [0] * 3, "num_heads": 8, "context_dim": 768,
    "legacy": False,
}  # fmt: skip
SDXL = UNET | {
    "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_head_channels": 64,
    "context_dim": 2048, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
    "legacy": False,
}  # fmt: skip
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
    "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56],
    "txt_ids_dims": [], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
NETWORKS = {
    "sd1": (UNetModel, SD1, "model.diffusion_model."),
    "sdxl": (UNetModel, SDXL, "model.diffusion_model."),
    "flux": (Flux, FLUX, ""),  # of a file that holds the network alone
}

for name, (kind, config, prefix) in NETWORKS.items():
    network = kind(**config, device="meta", operations=comfy.ops.disable_weight_init)
    entries = {
        f"{prefix}{key}": {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [0, 0]}
        for key, tensor in network.state_dict().items()
    }
    header = json.dumps(entries).encode()
    (Path(folder) / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
