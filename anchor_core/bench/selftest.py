"""The self test of training (`backends.comfyui.selftest`) in a ComfyUI that is started for it, as a user's is."""

from __future__ import annotations

import subprocess
from pathlib import Path

_WORKER = Path(__file__).with_name("selftest_worker.py")


def run(
    comfyui: Path,
    python: Path,
    model: Path | None = None,
    *,
    resolution: int = 512,
    batch_size: int = 1,
    steps: int = 5,
    device: str = "cuda",
) -> bool:
    """Print what the self test finds on a model file; whether it passed.

    Args:
        comfyui: ComfyUI's folder.
        python: its interpreter.
        model: a checkpoint or diffusion model; None for SD1.5's network at random weights, in fp16.

    Raises:
        RuntimeError: the model cannot be trained on, or ComfyUI does not start.
    """
    import tempfile

    from .comfyui import write_weights

    with tempfile.TemporaryDirectory() as folder:
        model = model or write_weights(Path(folder) / "sd15-random.safetensors", "float16")
        command = [python, _WORKER, comfyui.resolve(), Path(__file__).resolve().parents[2], model.resolve()]
        command += [resolution, batch_size, steps, device]
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, cwd=comfyui)
    print(done.stdout, end="")
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the self test did not run (exit status {done.returncode}); what it said is above")
    return done.returncode == 0
