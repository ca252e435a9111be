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
- full: `diff` and `diff_b`, the changes of a module's weight and bias.
- SVDiff: `svd_shift`, which is trained, and `diff`; as with OFT.

Token vectors are a file of their own, an embedding (`tokens.py`): the whole of what a training of kind none writes, and
`embedding.safetensors` beside the adapter's file of another.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
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
    renamed,
    scale_of,
    split_layers,
    with_stated_alphas,
)
from .adapter_kinds import NAME, NO_LAYERS
from .adapter_metadata import adapter_metadata, embedding_metadata
from .checkpoint import read_adapter
from .tokens import from_embedding, is_embedding, to_embedding

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
        reason = f"{path} is not a readable safetensors file ({_reason(error)})"
        raise ValueError(f"{reason}; give a file of an adapter or an embedding") from error


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def to_file_keys(adapter: Adapter, file_keys: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of the adapter's file, on the CPU, by `<prefix>.<part>`; of kind none those of an embedding."""
    if adapter.config.kind == NO_LAYERS:
        return to_embedding(adapter.tokens)
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
    return {**parts, "diff": _as_stored(change, base)}


def _write_full(adapter: Adapter, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    own = dict(adapter.base_module(name).named_parameters(recurse=False))
    changes = {part: tensor - own[part].detach().float().cpu() for part, tensor in parts.items()}
    return {_DIFFS[part]: _as_stored(change, own[part]) for part, change in changes.items()}


def _write_svdiff(adapter: Adapter, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        change = adapter.layer(name).change().cpu()
    return {"svd_shift": parts["shift"], "diff": _as_stored(change, adapter.base_module(name).weight)}


def _as_stored(change: Tensor, weight: Tensor) -> Tensor:
    """A change of a weight that is held in half precision needs no more than that."""
    return change.half() if weight.dtype in (torch.float16, torch.bfloat16) else change


_DIFFS = {"weight": "diff", "bias": "diff_b"}
_WRITTEN = {"dora": _write_dora, "lokr": _write_lokr, "oft": _write_oft, "full": _write_full, "svdiff": _write_svdiff}


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
            layers = split_layers(renamed(tensors, metadata, format_of(list(modules))))
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


def _read_svdiff(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"shift": parts["svd_shift"]}


def _read_full(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The changes of the parameters, by their names; `attach_tensors` adds the parameters."""
    return {name: parts[part].float() for name, part in _DIFFS.items() if part in parts}


_READ = {
    "lora": _read_lora,
    "dora": _read_lora,
    "lokr": _read_lokr,
    "loha": _read_loha,
    "oft": _read_oft,
    "full": _read_full,
    "svdiff": _read_svdiff,
}


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
    "full": lambda parts: 1,
    "svdiff": lambda parts: 1,
}


def attach_tensors(
    denoiser: Any,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    embedding: Mapping[str, Tensor] | None = None,
    token: str = "",
) -> Adapter:
    """Attach an adapter's tensors, in any format and kind that can be read, to `denoiser`, which has none.

    Args:
        embedding: the tensors of an embedding file, where the adapter has token vectors. `tensors` may be one itself.
        token: the word that the vectors stand for; empty for what the metadata says.

    Raises:
        ValueError: if they were made for another model; the denoiser is then as before.
    """
    said = {**(metadata or {}), "modelspec.architecture": getattr(denoiser, "architecture", "")}
    kind, layers = NO_LAYERS, {}
    if is_embedding(tensors):
        embedding = tensors
    else:
        kind, layers = _read_layers(tensors, denoiser.file_keys(), said)
        if embedding is None and int(said.get("anchor.vectors", 0)):
            raise ValueError(
                f"it was trained together with vectors of {said.get('anchor.token')!r}, but no embedding is given; "
                "give the embedding file that was written with it"
            )
    options: dict[str, Any] = {}
    vectors = None
    if embedding is not None:
        vectors = from_embedding(embedding, denoiser.text_encoders)
        count = len(next(iter(vectors.values())))
        options |= {"vectors": count, "token": token or said.get("anchor.token", "")}
    if layers:
        ranks = {name: _RANKS[kind](parts) for name, parts in layers.items()}
        alphas = {float(parts["alpha"]) for parts in layers.values() if "alpha" in parts}
        options |= {
            "rank": Counter(ranks.values()).most_common(1)[0][0],
            "alpha": alphas.pop() if len(alphas) == 1 else None,  # else each layer has its own, from load_state_dict
            "layers": exact_layers(sorted(layers)),
            "text_encoder": any(":" in name for name in layers),
            "ranks": ranks,
        }
    adapter = denoiser.attach(AdapterConfig(kind=kind, **options), vectors=vectors)
    try:
        _fill(adapter, kind, layers)
    except ValueError as error:
        denoiser.detach()
        raise ValueError(f"this LoRA was made for another model: {error}") from error
    return adapter


def _fill(adapter: Adapter, kind: str, layers: dict[str, dict[str, Tensor]]) -> None:
    """Give a new adapter the parts that were read of each module."""
    if kind == "lokr":
        adapter.adopt_factors(layers)
        return
    scales = {name: parts.pop("dora_scale", None) for name, parts in layers.items()}
    own = adapter.state_dict()
    state = {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    if kind == "full":  # it starts as the pretrained parameters; a file need not change all
        state = {key: own[key] + change if _fits(own, key, change) else change for key, change in state.items()}
        state = {**own, **state}
    vectors = {key: own[key] for key in own if key.endswith(":tokens")}
    adapter.load_state_dict({**{key: own[key] for key in own if "magnitude" in key}, **vectors, **state})
    for name, scale in scales.items():
        if scale is not None and "lora_magnitude_vector" not in layers[name]:
            key = f"{name}.lora_magnitude_vector"
            state[key] = (scale.flatten() * _dora_norms(adapter, name, layers[name])).view(own[key].shape)
    adapter.load_state_dict({**vectors, **state})


def _fits(own: Mapping[str, Tensor], key: str, tensor: Tensor) -> bool:
    return key in own and own[key].shape == tensor.shape


EMBEDDING_FILE = "embedding.safetensors"
"""The token vectors, beside the file of the layers that were trained with them."""


def attach_file(denoiser: Any, path: str | Path, embedding: str | Path | None = None) -> tuple[Adapter, dict[str, str]]:
    """Attach the adapter of a file to `denoiser`, which has none; gives the adapter and the file's metadata.

    Args:
        path: an adapter file, or an embedding. The word of an embedding whose metadata names none is its file's name.
        embedding: the file of the token vectors that belong to the adapter; the default is `embedding.safetensors`
            beside it, if it was trained with some.

    Raises:
        ValueError: if a file cannot be read, or was made for another model; the denoiser is then as before.
    """
    tensors, metadata = load_adapter(path)
    if embedding is None and int(metadata.get("anchor.vectors", 0)) and not is_embedding(tensors):
        beside = Path(path).with_name(EMBEDDING_FILE)
        embedding = beside if beside.is_file() else None
    vectors, about = (None, metadata) if embedding is None else load_adapter(embedding)
    if vectors is not None and (is_embedding(tensors) or not is_embedding(vectors)):
        raise ValueError(
            f"embedding is {embedding}, but it takes a file of token vectors, beside an adapter file of layers"
        )
    token = about.get("anchor.token") or Path(embedding or path).stem
    try:
        return attach_tensors(denoiser, tensors, metadata, vectors, token), metadata
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
) -> list[Path]:
    """Write the adapter attached to `denoiser` with what it was trained on, and its token vectors beside it.

    Args:
        steps: if fewer than planned were made.

    Returns:
        the files: of the adapter, and of the embedding where it is another.
    """
    adapter, files = denoiser.adapter, [Path(path)]
    metadata = adapter_metadata(denoiser, concept, settings, steps)
    tensors = to_file_keys(adapter, denoiser.file_keys())
    if adapter.config.kind == "full":
        # Nothing reads these in diffusers' names: its own loaders take no `diff`, the stock one not all of them.
        tensors = convert(tensors, metadata, to="comfyui")
    save_adapter(path, tensors, metadata)
    if adapter.tokens is not None and adapter.config.kind != NO_LAYERS:
        files.append(files[0].with_name(EMBEDDING_FILE))
        save_adapter(files[1], to_embedding(adapter.tokens), embedding_metadata(metadata))
    return files
