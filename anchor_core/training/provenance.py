"""What it takes to make a training's adapter again, for its report."""

from __future__ import annotations

import hashlib
import logging
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..adapters.metadata import base_fingerprint
from ..data.prepare import Material
from ..denoiser import Denoiser
from .settings import TrainSettings

logger = logging.getLogger(__name__)

_PACKAGES = {
    "torch": "torch", "numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "diffusers": "diffusers",
    "transformers": "transformers", "peft": "peft", "prodigyopt": "prodigyopt", "schedulefree": "schedulefree",
    "bitsandbytes": "bitsandbytes",
}  # fmt: skip
"""Module -> package, of those that may compute a part of a training."""


def versions() -> dict[str, str]:
    """Of this package, Python, ComfyUI where it is the host, and each package that this process has loaded."""
    found = {"semantic-anchor": __version__, "python": platform.python_version()}
    comfyui = getattr(sys.modules.get("comfyui_version"), "__version__", None)
    if comfyui:
        found["comfyui"] = comfyui
    for module, package in _PACKAGES.items():
        if module in sys.modules:
            try:
                found[package] = version(package)
            except PackageNotFoundError:  # from a folder that was never installed
                found[package] = str(getattr(sys.modules[module], "__version__", "unknown"))
    return found


def device_name(device: torch.device) -> str:
    """The card's own name, or what instructions the processor is used with; both change the last bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def provenance(
    denoiser: Denoiser, material: Material, settings: TrainSettings, processes: int, files: Sequence[Path]
) -> dict[str, Any]:
    """Of a training that has ended: JSON values that, with the pictures and the model, make its adapter again.

    `base_model`, `pictures`, `class_pictures` and `prompts` are hashes, by which another run can tell that it is given
    the same: of the first weights of each adapted layer (a whole file of 7 GB is not read), of the pixels, masks and
    captions as they were trained on, and of what the encoders made of them. `files` are whole.
    """
    return {
        "versions": versions(),
        "device": device_name(denoiser.device),
        "dtype": str(denoiser.compute_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "subject_prompt": material.concept.subject_prompt,
        "class_prompt": material.concept.class_prompt,
        "settings": asdict(settings),
        "adapter": asdict(denoiser.adapter.config),
        "base_model": base_fingerprint(denoiser),
        **material.about,
        "prompts": material.cache.digests(),
        "files": {file.name: file_hash(file) for file in files},
    }


def file_hash(file: Path) -> str | None:
    """sha256 of a file; None if it is gone again: the training is over, and its adapter matters more than this."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        logger.warning("%s was written, but cannot be read again (%s)", file, error.strerror)
        return None
