"""Adapter files: safetensors that the stock LoraLoader and diffusers read, with the training settings inside.

A backend's `file_keys()` says which prefix belongs to which module, `lora_unet_down_blocks_0_...` for SD1.x. A LoRA's
keys are `<prefix>.lora_down.weight`, `.lora_up.weight` and `.alpha`, and under diffusers' dotted prefixes
(`transformer.`) `.lora_A.weight` and `.lora_B.weight`. The other kinds:

- LoKr: `lokr_w1` and `lokr_w2` (with alpha / rank inside), or `lokr_w1`, `lokr_w2_a`, `lokr_w2_b` and `alpha`.
- LoHa: `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b` and `alpha`.
- DoRA: those of a LoRA, and `dora_scale`. The stock loader divides by the norm of the base weight where DoRA has that
  of the updated one, so `dora_scale` is m ||W|| / ||W + s B A||, which makes its weight the trained one.
- OFT: `oft_R.weight`, which peft trains, and `diff`, the change of the weight. The stock `oft_blocks` rotate outputs,
  peft's blocks inputs (SPECS.md 9.7), so no `oft_blocks` give the same weight. The file is as large as the layers,
  and the stock loader logs each `oft_R.weight` as not loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapter import Adapter, AdapterConfig, exact_layers
from .adapter_formats import (
    DIFFUSERS_PREFIXES,
    convert,
    diffusers_form,
    format_of,
    kind_of,
    scale_of,
    split_layers,
    with_stated_alphas,
)
from .adapter_kinds import NAME
from .checkpoint import read_adapter

if TYPE_CHECKING:
    from .data import Concept
    from .settings import TrainSettings


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata` to `path`, whole or not at all.

    Raises:
        ValueError: if `path` cannot be written.
    """
    from safetensors import SafetensorError

    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        # safetensors' own save_file makes a file that other users cannot read.
        part.write_bytes(_serialise(tensors, metadata))
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the adapter cannot be written to {path} ({_reason(error)}); choose another place") from error
    finally:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)


def _serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file: 8 of the header's length, the JSON header, the tensors."""
    from safetensors.torch import save

    if not all(isinstance(text, str) for text in metadata.values()):
        raise TypeError("the metadata of a safetensors file holds text only")
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    start = 8 + int.from_bytes(data[:8], "little")
    # safetensors writes metadata in another order every time; the same adapter is to be the same file.
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8:start])}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


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


def to_file_keys(adapter: Adapter, file_keys: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of the adapter's file, on the CPU, by `<prefix>.<part>`."""
    tensors = {}
    for name in adapter.module_names:
        parts = _WRITTEN.get(adapter.config.kind, _as_trained)(adapter, name, adapter.parts(name))
        prefix = file_keys[name]
        if prefix.startswith(DIFFUSERS_PREFIXES):
            parts = diffusers_form(parts)
        else:
            parts.pop("lora_magnitude_vector", None)  # the stock loader reads `dora_scale`, diffusers this
        tensors |= {f"{prefix}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def _as_trained(adapter: Adapter, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return parts


def _write_dora(adapter: Adapter, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = _base_weight(adapter, name)
    scale = parts["lora_magnitude_vector"].flatten() / _dora_norms(adapter, name, parts)
    return {**parts, "dora_scale": scale.view(-1, *[1] * (weight.dim() - 1))}


def _dora_norms(adapter: Adapter, name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """||W + s B A|| / ||W|| by output row, (out,): a DoRA's magnitude over the stock loader's `dora_scale`."""
    weight = _base_weight(adapter, name).flatten(1)
    up, down = (parts[f"lora_{part}.weight"].flatten(1).float() for part in ("up", "down"))
    update = scale_of(parts) * up @ down
    return (weight + update).norm(dim=1) / weight.norm(dim=1)


def _write_lokr(adapter: Adapter, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    if "lokr_w2" not in parts:
        return parts
    scaling = adapter.layer(name).scaling[NAME]  # the stock loader reads no alpha where both factors are full
    return {"lokr_w1": parts["lokr_w1"] * scaling, "lokr_w2": parts["lokr_w2"]}


def _write_oft(adapter: Adapter, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    base = adapter.base_module(name).weight
    weight = _base_weight(adapter, name).flatten(1)
    with torch.no_grad():
        rotation = adapter.layer(name).get_delta_weight(NAME).cpu()
        change = (weight @ rotation.T - weight).view(base.shape)
    return {**parts, "diff": change.half() if base.dtype in (torch.float16, torch.bfloat16) else change}


_WRITTEN = {"dora": _write_dora, "lokr": _write_lokr, "oft": _write_oft}


def _base_weight(adapter: Adapter, name: str) -> Tensor:
    return adapter.base_module(name).weight.detach().float().cpu()


def from_file_keys(tensors: Mapping[str, Tensor], file_keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a file, in any format of `adapter_formats`, under the module names of the network.

    A missing alpha means alpha = rank, as everywhere else. LoKr factors are multiplied out to two full ones.

    Raises:
        ValueError: if a tensor belongs to no module of the network, or a module's tensors are incomplete.
    """
    layers = _read_layers(tensors, file_keys, {})[1]
    return {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}


def _read_layers(
    tensors: Mapping[str, Tensor], file_keys: Mapping[str, str], metadata: Mapping[str, str]
) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The kind, and the parts of each module as `Adapter.state_dict` names them."""
    modules = {prefix: module for module, prefix in file_keys.items()}
    layers = split_layers(with_stated_alphas(tensors, metadata))
    if not layers.keys() <= modules.keys():
        stranger = next(prefix for prefix in layers if prefix not in modules)
        message = f"this LoRA was made for another model: {stranger} belongs to no module of this network"
        try:
            layers = split_layers(convert(tensors, metadata, to=format_of(list(modules))))
        except ValueError as error:
            raise ValueError(message) from error
        if not layers.keys() <= modules.keys():
            raise ValueError(message)
    kinds = {kind_of(prefix, parts) for prefix, parts in layers.items()}
    if len(kinds) > 1:
        raise ValueError(f"the file mixes {' and '.join(sorted(kinds))} layers, but one kind for all is supported")
    (kind,) = kinds
    return kind, {modules[prefix]: _READ[kind](parts) for prefix, parts in layers.items()}


def _read_lora(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    alpha = parts.get("alpha", torch.tensor(float(parts["lora_down.weight"].shape[0])))
    return {**parts, "alpha": alpha.reshape(())}


def _read_loha(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    alpha = parts.get("alpha", torch.tensor(float(parts["hada_w1_b"].shape[0])))
    return {**parts, "alpha": alpha.reshape(())}


def _read_lokr(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two full factors with the scale inside."""
    rank = next((parts[part].shape[0] for part in ("lokr_w2_b", "lokr_w1_b") if part in parts), None)
    scale = float(parts["alpha"]) / rank if rank and "alpha" in parts else 1.0
    one, other = (
        parts[name].float() if name in parts else parts[f"{name}_a"].float() @ parts[f"{name}_b"].float()
        for name in ("lokr_w1", "lokr_w2")
    )
    return {"lokr_w1": scale * one, "lokr_w2": other}


def _read_oft(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"oft_R.weight": parts["oft_R.weight"]}


_READ = {"lora": _read_lora, "dora": _read_lora, "lokr": _read_lokr, "loha": _read_loha, "oft": _read_oft}


def _lokr_width(parts: Mapping[str, Tensor]) -> int:
    """A rank at which peft makes both factors full."""
    one, other = parts["lokr_w1"], parts["lokr_w2"]
    return max(one.shape[0] * other.shape[0], one.shape[1] * other[0].numel())


_RANKS = {
    "lora": lambda parts: parts["lora_down.weight"].shape[0],
    "dora": lambda parts: parts["lora_down.weight"].shape[0],
    "loha": lambda parts: parts["hada_w1_b"].shape[0],
    "lokr": _lokr_width,
    # b (b - 1) / 2 entries above the diagonal of a block of b
    "oft": lambda parts: (1 + math.isqrt(1 + 8 * parts["oft_R.weight"].shape[1])) // 2,
}


def attach_tensors(denoiser: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Adapter:
    """Attach an adapter's tensors, in any format and kind that can be read, to `denoiser`, which has none.

    Raises:
        ValueError: if they were made for another model; the denoiser is then as before.
    """
    said = {**(metadata or {}), "modelspec.architecture": getattr(denoiser, "architecture", "")}
    kind, layers = _read_layers(tensors, denoiser.file_keys(), said)
    ranks = {name: _RANKS[kind](parts) for name, parts in layers.items()}
    alphas = {float(parts["alpha"]) for parts in layers.values() if "alpha" in parts}
    config = AdapterConfig(
        rank=Counter(ranks.values()).most_common(1)[0][0],
        alpha=alphas.pop() if len(alphas) == 1 else None,  # else each layer has its own, from load_state_dict
        layers=exact_layers(sorted(layers)),
        kind=kind,
        text_encoder=any(":" in name for name in layers),
        ranks=ranks,
    )
    adapter = denoiser.attach(config)
    try:
        if kind == "lokr":
            adapter.adopt_factors(layers)
        else:
            scales = {name: parts.pop("dora_scale", None) for name, parts in layers.items()}
            own = adapter.state_dict()
            state = {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
            adapter.load_state_dict({**{key: own[key] for key in own if "magnitude" in key}, **state})
            for name, scale in scales.items():
                if scale is not None and "lora_magnitude_vector" not in layers[name]:
                    key = f"{name}.lora_magnitude_vector"
                    state[key] = (scale.flatten() * _dora_norms(adapter, name, layers[name])).view(own[key].shape)
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
        return attach_tensors(denoiser, tensors, metadata), metadata
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_early(denoiser: Any, path: str | Path) -> dict[str, Tensor]:
    """The weights of an early checkpoint, for `Adapter.hold_early`: of an adapter file, or a checkpoint of a training.

    Args:
        denoiser: without an adapter; it is as before afterwards.

    Raises:
        ValueError: if the file cannot be read, or was made for another model.
    """
    if Path(path).suffix == ".ckpt":
        return read_adapter(path)
    adapter, _ = attach_file(denoiser, path)
    try:
        return adapter.state_dict()
    finally:
        denoiser.detach()


def save_trained(
    path: str | Path, denoiser: Any, concept: Concept, settings: TrainSettings, steps: int | None = None
) -> None:
    """Write the adapter attached to `denoiser` with what it was trained on; `steps` if fewer than planned were made."""
    tensors = to_file_keys(denoiser.adapter, denoiser.file_keys())
    save_adapter(path, tensors, adapter_metadata(denoiser, concept, settings, steps))


_BASE_VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "stable-diffusion-v3-medium": "sd3",
    "flux-1-dev": "flux1",
}
"""modelspec's architecture -> kohya's `ss_base_model_version`."""


def adapter_metadata(
    denoiser: Any, concept: Concept, settings: TrainSettings, steps: int | None = None
) -> dict[str, str]:
    """Metadata of a trained adapter: `modelspec.`, kohya's `ss_`, and all settings of the training under `anchor.`.

    No date, so that the same training makes the same file.
    """
    from . import __version__

    config, made = denoiser.adapter.config, settings.steps if steps is None else steps
    architecture = getattr(denoiser, "architecture", "stable-diffusion-v1")
    diffusers_names = any("transformer_blocks" in name for name in denoiser.adapter.module_names)
    modelspec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/{config.kind}",
        "implementation": "diffusers" if diffusers_names else "https://github.com/comfyanonymous/ComfyUI",
        "title": concept.subject_prompt,
        "trigger_phrase": concept.subject_prompt,
        "resolution": _resolution(getattr(denoiser, "default_resolution", None)),
        "prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(denoiser.prediction_type),
    }
    kohya = {
        "network_module": "networks.lora" if config.kind == "lora" else "lycoris.kohya",
        "network_args": None if config.kind == "lora" else json.dumps({"algo": config.kind}),
        "network_dim": config.rank,
        "network_alpha": config.alpha,
        "base_model_version": _BASE_VERSIONS.get(architecture),
        "learning_rate": settings.learning_rate,
        "max_train_steps": settings.steps,
        "steps": made,
        "batch_size_per_device": settings.batch_size,
        "seed": settings.seed,
    }
    anchor = {
        **{option.name: getattr(settings, option.name) for option in fields(settings)},
        **{option.name: getattr(config, option.name) for option in fields(config) if option.name != "ranks"},
        "subject_prompt": concept.subject_prompt,
        "class_prompt": concept.class_prompt,
        "steps": made,
        "base_model": base_fingerprint(denoiser),
        "version": __version__,
    }
    groups = {"modelspec.": modelspec, "ss_": kohya, "anchor.": anchor}
    return {
        f"{prefix}{name}": str(value)
        for prefix, group in groups.items()
        for name, value in group.items()
        if value is not None
    }


def _resolution(size: int | tuple[int, int] | None) -> str | None:
    """modelspec's `<width>x<height>` of one side, or of (height, width)."""
    height, width = size if isinstance(size, tuple) else (size, size)
    return None if size is None else f"{width}x{height}"


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
