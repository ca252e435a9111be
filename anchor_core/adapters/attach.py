"""Adapter files back into a model: read in any format and kind, and attached to a denoiser that has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .config import AdapterConfig
from .file import DIFFS, EMBEDDING_FILE, dora_norms, load_adapter, read_adapter
from .formats import format_of, kind_of, renamed, split_layers, with_stated_alphas
from .kinds import NO_LAYERS
from .layers import exact_layers
from .tokens import from_embedding, is_embedding


def from_file_keys(tensors: Mapping[str, Tensor], file_keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a file, in any format of `formats`, under the module names of the network.

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
    return {name: parts[part].float() for name, part in DIFFS.items() if part in parts}


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
    "oft": lambda parts: len(parts["oft_R.weight"]),  # (blocks, entries above a block's diagonal)
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
            state[key] = (scale.flatten() * dora_norms(adapter, name, layers[name])).view(own[key].shape)
    adapter.load_state_dict({**vectors, **state})


def _fits(own: Mapping[str, Tensor], key: str, tensor: Tensor) -> bool:
    return key in own and own[key].shape == tensor.shape


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
