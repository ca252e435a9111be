"""Adapter files: safetensors that the stock LoraLoader and diffusers read, with the training settings inside.

Keys are `<prefix>.lora_down.weight`, `<prefix>.lora_up.weight` and `<prefix>.alpha`. A backend's `file_keys()` says
which prefix belongs to which module of its network, `lora_unet_down_blocks_0_...` for SD1.x.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapter import Adapter, AdapterConfig, exact_layers

if TYPE_CHECKING:
    from .data import Concept
    from .trainer import TrainSettings

logger = logging.getLogger(__name__)

_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata` to `path`, whole or not at all.

    Raises:
        ValueError: if `path` cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save

    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        # safetensors' own save_file makes a file that other users cannot read.
        part.write_bytes(
            save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {**metadata})
        )
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the adapter cannot be written to {path} ({_reason(error)}); choose another place") from error
    finally:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)


def load_adapter(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of an adapter file.

    Raises:
        ValueError: if `path` is not a readable safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({_reason(error)}); give a LoRA file") from error


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def to_file_keys(state: Mapping[str, Tensor], file_keys: Mapping[str, str]) -> dict[str, Tensor]:
    """`Adapter.state_dict()` under the names of the file."""
    tensors = {}
    for key, tensor in state.items():
        module, part = _split(key)
        tensors[f"{file_keys[module]}.{part}"] = tensor
    return tensors


def from_file_keys(tensors: Mapping[str, Tensor], file_keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a file under the module names of the network, as `Adapter.load_state_dict` takes them.

    A missing alpha means alpha = rank, as everywhere else.

    Raises:
        ValueError: if a tensor belongs to no module of the network, or a module's tensors are incomplete.
    """
    modules = {prefix: module for module, prefix in file_keys.items()}
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        prefix, part = _split(key)
        if part is None or prefix not in modules:
            raise ValueError(f"this LoRA was made for another model: {key} belongs to no module of this network")
        state[f"{modules[prefix]}.{part}"] = tensor.reshape(()) if part == "alpha" else tensor
    if not state:
        raise ValueError("this file holds no LoRA: it has no tensor")
    for module in {_split(key)[0] for key in state}:
        down = state.get(f"{module}.lora_down.weight")
        if down is None or f"{module}.lora_up.weight" not in state:
            raise ValueError(f"this file is not a whole LoRA: {file_keys[module]} lacks lora_down or lora_up")
        state.setdefault(f"{module}.alpha", torch.tensor(float(down.shape[0])))
    return state


def _split(key: str) -> tuple[str, str | None]:
    for part in _PARTS:
        if key.endswith(f".{part}"):
            return key[: -len(part) - 1], part
    return key, None


def attach_tensors(denoiser: Any, tensors: Mapping[str, Tensor]) -> Adapter:
    """Attach an adapter's tensors under file keys to `denoiser`, which has none.

    Raises:
        ValueError: if they were made for another model; the denoiser is then as before.
    """
    state = from_file_keys(tensors, denoiser.file_keys())
    ranks = {int(tensor.shape[0]) for key, tensor in state.items() if key.endswith(".lora_down.weight")}
    if len(ranks) != 1:
        raise ValueError(f"its layers have ranks {sorted(ranks)}, but one rank for all layers is supported")
    alphas = {float(tensor) for key, tensor in state.items() if key.endswith(".alpha")}
    alpha = alphas.pop() if len(alphas) == 1 else None  # else each layer has its own, from load_state_dict
    names = sorted({_split(key)[0] for key in state})
    adapter = denoiser.attach(AdapterConfig(rank=ranks.pop(), alpha=alpha, layers=exact_layers(names)))
    try:
        adapter.load_state_dict(state)
    except ValueError as error:
        denoiser.detach()
        raise ValueError(f"this LoRA was made for another model: {error}") from error
    return adapter


def attach_file(denoiser: Any, path: str | Path) -> tuple[Adapter, dict[str, str]]:
    """Attach the adapter of a file to `denoiser`, which has none; gives the adapter and the file's metadata.

    Raises:
        ValueError: if the file cannot be read, or was made for another model; the denoiser is then as before.
    """
    tensors, metadata = load_adapter(path)
    try:
        return attach_tensors(denoiser, tensors), metadata
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_trained(
    path: str | Path, denoiser: Any, concept: Concept, settings: TrainSettings, steps: int | None = None
) -> None:
    """Write the adapter attached to `denoiser` with what it was trained on; `steps` if fewer than planned were made."""
    tensors = to_file_keys(denoiser.adapter.state_dict(), denoiser.file_keys())
    save_adapter(path, tensors, adapter_metadata(denoiser, concept, settings, steps))


def adapter_metadata(
    denoiser: Any, concept: Concept, settings: TrainSettings, steps: int | None = None
) -> dict[str, str]:
    """Metadata of a trained adapter: modelspec fields, and everything that repeats the training under `anchor.`."""
    from . import __version__

    config = denoiser.adapter.config
    anchor = {
        "subject_prompt": concept.subject_prompt,
        "class_prompt": concept.class_prompt,
        "objective": settings.objective,
        "w": settings.w,
        "anchor": settings.anchor,
        "prior_weight": settings.prior_weight,
        "steps": settings.steps if steps is None else steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "rank": config.rank,
        "alpha": config.alpha,
        "layers": config.layers,
        "seed": settings.seed,
        "base_model": base_fingerprint(denoiser),
        "version": __version__,
    }
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{getattr(denoiser, 'architecture', 'stable-diffusion-v1')}/lora",
        "modelspec.title": concept.subject_prompt,
        "modelspec.trigger_phrase": concept.subject_prompt,
        **{f"anchor.{name}": str(value) for name, value in anchor.items()},
    }


def base_fingerprint(denoiser: Any) -> str:
    """16 hexadecimal digits that tell base models apart, from the first weights of each adapted module.

    The same for both backends, and whatever the dtype that holds the same values.
    """
    adapter, keys = denoiser.adapter, denoiser.file_keys()
    digest = hashlib.sha256()
    for name in sorted(adapter.module_names, key=lambda name: keys[name]):
        weight = adapter.base_module(name).weight
        digest.update(f"{keys[name]} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
