"""What the header of a model's file says before anything of it is loaded: its family, and how wide its layers are."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import comfy.model_detection
import comfy.supported_models
import comfy.utils
import torch

from ...adapters.layers import matching_names
from ...families import unet_family

_CONFIGS = {
    "ZImage": "z_image", "SDXL": "sdxl", "SD3": "sd3", "Flux2": "flux2", "Flux": "flux", "Chroma": "chroma",
    "Lumina2": "lumina2", "WAN21_T2V": "wan", "QwenImage": "qwen_image",
}  # fmt: skip
"""ComfyUI's classes of models to `families.FAMILIES`, the derived ones first; as `families.FAMILY_NAMES`."""


@dataclass(frozen=True)
class Header:
    """Of a model's file.

    Attributes:
        family: of `families.FAMILIES`, or empty.
        widths: the lesser side of each linear layer of the denoising network, by the module's name.
    """

    family: str
    widths: Mapping[str, int]

    def narrowest(self, layers: str) -> tuple[str, int] | None:
        """Name and width of the narrowest linear layer that `AdapterConfig.layers` selects; None if it selects none."""
        chosen = matching_names(self.widths, layers)
        return min(((name, self.widths[name]) for name in chosen), key=lambda each: each[1], default=None)


def read_header(file: Path, family: str | None = None) -> Header | None:
    """The header of a safetensors file; None for another file, or one that holds no model that ComfyUI knows.

    Args:
        family: of a file with other names than ComfyUI's, whose whole content is the network.
    """
    state = file.stat()
    return _read(file, family, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=32)
def _read(file: Path, family: str | None, *changed: int) -> Header | None:
    shapes = _shapes(file)
    if shapes is None:
        return None
    if family is not None:
        return Header(family, _widths(shapes, ""))
    prefix = comfy.model_detection.unet_prefix_from_state_dict(shapes)
    if not any(name.startswith(prefix) for name in shapes):
        prefix = ""  # of a file that holds the network alone
    # Nothing is read of them but their shapes, and whether one norm is large.
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(tensors, prefix)
    return None if config is None else Header(_family(config), _widths(shapes, prefix))


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing for another file."""
    told = (_entries(file) or {}).get("__metadata__")
    return told if isinstance(told, dict) else {}


def _entries(file: Path) -> dict | None:
    """The header; None where it cannot be read, of which the loader says what is wrong."""
    if file.suffix not in (".safetensors", ".sft"):
        return None
    try:
        entries = json.loads(comfy.utils.safetensors_header(str(file)) or b"null")
    except (OSError, ValueError, struct.error):
        return None
    return entries if isinstance(entries, dict) else None


def _shapes(file: Path) -> dict[str, tuple[int, ...]] | None:
    try:
        return {
            name: tuple(entry["shape"])
            for name, entry in (_entries(file) or {}).items()
            if name != "__metadata__" and not name.endswith("comfy_quant")  # bytes, which are read for a kind
        } or None
    except (TypeError, KeyError):
        return None


def _family(config) -> str:
    kinds = comfy.supported_models
    found = next((name for kind, name in _CONFIGS.items() if isinstance(config, getattr(kinds, kind))), "")
    if not found and isinstance(config, (kinds.SD15, kinds.SD20)):
        return unet_family(config.unet_config["context_dim"])
    return found


def _widths(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, int]:
    ending = ".weight"
    return {
        name[len(prefix) : -len(ending)]: min(shape)
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith(ending) and len(shape) == 2
    }
