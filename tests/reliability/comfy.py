"""A ComfyUI for the suites of this room: the pack, a pack of odd values, and one of faults, in a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.comfyui import comfy_server, odd_nodes


def install(base: Path) -> Path:
    """All that a server started on `base` loads."""
    comfy_server.install_pack(base / "custom_nodes" / comfy_server.PACK)
    for name, files in {
        "odd": {odd_nodes.__file__: "__init__.py", comfy_server.ROOT / "tests/comfyui/comfy_models.py": ""},
        "faults": {Path(__file__).with_name("comfy_pack.py"): "__init__.py"},
    }.items():
        (base / "custom_nodes" / name).mkdir()
        for source, target in files.items():
            shutil.copy(source, base / "custom_nodes" / name / target)
    for folder in ("embeddings", "loras"):
        (base / "models" / folder).mkdir(parents=True)
    save_file({"emb_params": torch.randn(2, 128)}, base / "models/embeddings/pip.safetensors")
    save_file(odd_nodes.lora(), base / "models/loras/plain.safetensors")
    return base


def outside(base: Path) -> list[str]:
    """What the server wrote, started or removed outside of its folder, but for matplotlib's own folder of settings."""
    lines = (base / "outside.log").read_text().splitlines()
    return [line for line in lines if "/matplotlib" not in line]
