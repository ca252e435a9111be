"""What the checks of the reader cost: peak memory of loading a LoRA with them and without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
LAYERS, WIDTH, RANK = 250, 1024, 32
READ = {
    "unchecked": "held = load_file(file)",
    "checked": "held, _ = load_adapter(file)",
}


def peak(how: str, file: Path) -> float:
    """Of the resident memory, in MB."""
    program = f"""
import resource
from safetensors.torch import load_file
from anchor_core.adapters.file import load_adapter
file = {str(file)!r}
{READ[how]}
touched = sum(float(tensor.sum()) for tensor in held.values())  # what is mapped from the file is read
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KB on Linux")
def test_peak_memory_does_not_grow_by_more_than_a_twentieth(tmp_path):
    tensors = {}
    for number in range(LAYERS):
        tensors[f"lora_unet_block_{number}.lora_down.weight"] = torch.rand(RANK, WIDTH)
        tensors[f"lora_unet_block_{number}.lora_up.weight"] = torch.rand(WIDTH, RANK)
    save_file(tensors, tmp_path / "lora.safetensors")
    without, with_ = (peak(how, tmp_path / "lora.safetensors") for how in READ)
    size = (tmp_path / "lora.safetensors").stat().st_size >> 20
    print(f"loading a LoRA of {size} MB: {with_:.0f} MB at most, {without:.0f} without the checks")
    assert with_ < 1.05 * without
