"""Adapter files back into a model: read in any format and kind, and attached to a denoiser that has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import named, shown
from .adapter import Adapter
from .config import AdapterConfig
from .file import EMBEDDING_FILE, dora_norms, load_adapter, read_adapter
from .formats import format_of, renamed
from .formulas import adapted, check_size, is_dense, lokr_factors, plain_lora
from .kinds import NO_LAYERS, has_spectrum
from .layers import exact_layers
from .parts import PIECE, Layers, kind_of, scale_of
from .prefixes import identity
from .reading import checked, count_of, divides_by_adapted_norm, read_layers, tell_unread
from .tokens import embedding_of, from_embedding


def from_file_keys(tensors: Mapping[str, Tensor], file_keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a file, in any format of `formats`, under the module names of the network.

    A missing alpha means alpha = rank, as everywhere else. LoKr factors are multiplied out to two full ones.

    Raises:
        ValueError: if most layers belong to no module of the network, or a layer's tensors are not whole.
    """
    layers = _by_module(tensors, file_keys, {})
    return {
        f"{name}.{part}": tensor
        for name, parts in layers.items()
        for part, tensor in _READ[kind_of(name, parts)](parts).items()
    }


def _by_module(tensors: Mapping[str, Tensor], file_keys: Mapping[str, str], metadata: Mapping[str, str]) -> Layers:
    """The layers by names of modules, whatever program spelled the file's keys; says which are left out."""
    layers, _, unread = read_layers(tensors, metadata)
    modules = {prefix: module for module, prefix in file_keys.items()}
    if not layers.keys() <= modules.keys():
        # The network's own names beside those of its files: a family may have both.
        own = {f":{module.replace('.', '_')}": module for module in file_keys if ":" not in module}
        modules = own | {identity(prefix) or prefix: module for prefix, module in modules.items()}
        found = _identities(layers)
        if not set(found.values()) <= modules.keys():
            try:
                layers = renamed(layers, metadata, format_of(list(file_keys.values())))
            except ValueError:
                # A family without two ways to name its layers, or another program's names.
                if not set(found.values()) & modules.keys():
                    tell_unread(0, [*layers, *unread])
                    raise
            found = _identities(layers)
        twice = [key for key, count in Counter(found.values()).items() if count > 1 and key in modules]
        if twice:
            raise ValueError(f"this file holds two LoRAs in one: {modules[twice[0]]} has two; give one with one LoRA")
        modules = {prefix: modules[key] for prefix, key in found.items() if key in modules}
    unread += [prefix for prefix in layers if prefix not in modules]
    tell_unread(len(modules.keys() & layers.keys()), unread)
    return {modules[prefix]: parts for prefix, parts in layers.items() if prefix in modules}


def _identities(layers: Layers) -> dict[str, str]:
    return {prefix: identity(prefix) or prefix for prefix in layers}


# --- a layer's parts as `Adapter.state_dict` names them -----------------------------------------------------------


def _read_lora(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = plain_lora(parts)
    rank = parts["lora_down.weight"].shape[0]
    read = {part: parts[part] for part in ("lora_down.weight", "lora_up.weight")}
    if "diff_b" in parts or "lora_up.bias" in parts:
        scale = scale_of(parts)
        if not scale:
            raise ValueError("a bias goes with an alpha of 0, which takes it away")
        read["lora_up.bias"] = parts["diff_b"].float() / scale if "diff_b" in parts else parts["lora_up.bias"]
    return {**read, "alpha": _alpha(parts, rank)}


def _alpha(parts: Mapping[str, Tensor], rank: int) -> Tensor:
    return parts["alpha"].reshape(()).float() if "alpha" in parts else torch.tensor(float(rank))


def _read_dora(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    magnitudes = {part: parts[part] for part in ("lora_magnitude_vector", "dora_scale") if part in parts}
    return {**_read_lora(parts), **magnitudes}


def _read_loha(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    factors = {part: parts[part] for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    return {**factors, "alpha": _alpha(parts, parts["hada_w1_b"].shape[0])}


def _read_lokr(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("lokr_w1", "lokr_w2"), lokr_factors(parts)))


def _read_oft(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"oft_R.weight": parts["oft_R.weight"]}


def _read_svdiff(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"shift": parts["svd_shift"]}


_READ = {
    "lora": _read_lora,
    "lora_bias": _read_lora,
    "dora": _read_dora,
    "lokr": _read_lokr,
    "loha": _read_loha,
    "oft": _read_oft,
    "full": dict,
    "svdiff": _read_svdiff,
}
_RANKS = {
    "lora": lambda parts: parts["lora_up.weight"][0].numel(),
    "loha": lambda parts: parts["hada_w1_b"].shape[0],
    "oft": lambda parts: len(parts["oft_R.weight"]),  # (blocks, entries above a block's diagonal)
    "full": lambda parts: 1,
    "svdiff": lambda parts: 1,
} | dict.fromkeys(("dora", "lora_bias"), lambda parts: parts["lora_up.weight"][0].numel())


def _rank(kind: str, parts: Mapping[str, Tensor], weight: Tensor) -> int:
    # LoKr: a rank at which peft makes both factors full.
    return max(weight.shape[0], weight[0].numel()) if kind == "lokr" else _RANKS[kind](parts)


def _attached_kind(name: str, parts: Mapping[str, Tensor], module: nn.Module) -> str:
    """Of `FILE_KINDS`, that of the layer which computes what a file's layer says; `full` where a formula does."""
    kind = "full" if PIECE in parts else kind_of(name, parts)
    check_size(kind, parts, module.weight, name)
    if kind == "full" or is_dense(kind, parts, module.weight):
        return "full"
    if not (has_spectrum(module) if kind == "svdiff" else isinstance(module, (nn.Linear, nn.Conv2d))):
        raise ValueError(
            f"this LoRA was made for another model: {name} is a {type(module).__name__} here, which takes no {kind}"
        )
    beside = "diff_b" in parts or "lora_up.bias" in parts
    return "full" if beside and kind != "lora" else "lora_bias" if beside else kind


# --- attaching ---------------------------------------------------------------------------------------------------


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
        ValueError: if they were made for another model, or are not whole; the denoiser is then as before.
    """
    said = {**(metadata or {}), "modelspec.architecture": getattr(denoiser, "architecture", "")}
    tensors = checked(tensors)
    kind, layers = NO_LAYERS, {}
    own = embedding_of(tensors)
    if own is not None:
        embedding = tensors
    else:
        layers = _by_module(tensors, denoiser.file_keys(), said)
        if embedding is None and count_of(said, "anchor.vectors"):
            raise ValueError(
                f"it was trained together with vectors of {shown(said.get('anchor.token'))!r}, but no embedding is "
                "given; give the embedding file that was written with it"
            )
    options: dict[str, Any] = {}
    vectors = None
    if embedding is not None:
        read, called = embedding_of(checked(embedding)) or (embedding, "")
        vectors = from_embedding(read, denoiser.text_encoders)
        count = len(next(iter(vectors.values())))
        options |= {"vectors": count, "token": token or shown(said.get("anchor.token", "")) or called}
    kinds: dict[str, str] = {}
    if layers:
        weights = {name: _module(denoiser, name) for name in layers}
        kinds = {name: _attached_kind(name, parts, weights[name]) for name, parts in layers.items()}
        kind = Counter(kinds.values()).most_common(1)[0][0]
        kind = kind if kind != "lora_bias" else "lora"
        ranks = {name: _rank(kinds[name], parts, weights[name].weight) for name, parts in layers.items()}
        alphas = {float(parts["alpha"]) if "alpha" in parts else ranks[name] for name, parts in layers.items()}
        alpha = alphas.pop() if len(alphas) == 1 else None
        options |= {
            "rank": Counter(ranks.values()).most_common(1)[0][0],
            "alpha": alpha if alpha is None or alpha > 0 else None,  # a layer's own comes from load_state_dict
            "layers": exact_layers(sorted(layers)),
            "text_encoder": any(":" in name for name in layers),
            "ranks": ranks,
            "kinds": {name: each for name, each in kinds.items() if each != kind},
        }
    adapter = denoiser.attach(AdapterConfig(kind=kind, **options), vectors=vectors)
    try:
        _fill(adapter, kinds, layers, divides_by_adapted_norm(said))
    except BaseException as error:
        denoiser.detach()
        if isinstance(error, ValueError) and "made for another model" not in str(error):
            raise ValueError(f"this LoRA was made for another model: {error}") from error
        raise
    return adapter


def _module(denoiser: Any, name: str) -> nn.Module:
    prefix, _, inner = name.rpartition(":")
    return (denoiser.text_encoders[prefix] if prefix else denoiser.network).get_submodule(inner)


def _fill(adapter: Adapter, kinds: Mapping[str, str], layers: Layers, by_adapted_norm: bool) -> None:
    """Give a new adapter the parts that were read of each module."""
    own, state, scales = adapter.state_dict(), {}, {}
    for name, parts in layers.items():
        if kinds[name] == "full":
            read = _full(name, parts, own, by_adapted_norm)
        else:
            read = _READ[kinds[name]](parts)
        if kinds[name] == "lokr":
            adapter.adopt_factors(name, read["lokr_w1"], read["lokr_w2"])
            state |= {f"{name}.{part}": tensor for part, tensor in adapter.parts(name).items()}
            continue
        scale = read.pop("dora_scale", None)
        if scale is not None and "lora_magnitude_vector" not in read:
            scales[name] = scale
        state |= {f"{name}.{part}": tensor for part, tensor in read.items()}
    vectors = {key: own[key] for key in own if key.endswith(":tokens")}
    magnitudes = {key: own[key] for key in own if "magnitude" in key}
    for key in magnitudes.keys() & state.keys():
        if state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    adapter.load_state_dict({**magnitudes, **vectors, **state})
    for name, scale in scales.items():
        key = f"{name}.lora_magnitude_vector"
        scale = scale.flatten().float()
        # peft's magnitude is over the adapted weight's norm.
        scale = scale if by_adapted_norm else scale * dora_norms(adapter, name, adapter.parts(name))
        state[key] = scale.reshape(own[key].shape)
    if scales:
        adapter.load_state_dict({**magnitudes, **vectors, **state})


def _full(
    name: str, parts: Mapping[str, Tensor], own: Mapping[str, Tensor], by_adapted_norm: bool
) -> dict[str, Tensor]:
    """The parameters of a module with a file's layer in them, by their names."""
    made = {part: own[key] for part in ("weight", "bias") if (key := f"{name}.{part}") in own}
    kind = PIECE if PIECE in parts else kind_of(name, parts)
    if "weight" in made:
        made["weight"] = adapted(kind, parts, made["weight"], by_adapted_norm)
    change = parts.get("diff_b")
    if "lora_up.bias" in parts:
        change = parts["lora_up.bias"] * scale_of(parts)
    if change is not None:
        if "bias" not in made or change.shape != made["bias"].shape:
            here = tuple(made["bias"].shape) if "bias" in made else "none"
            raise ValueError(f"{name}.bias is {here} here and {tuple(change.shape)} there")
        made["bias"] = made["bias"] + change.float()
    return made


def attach_file(denoiser: Any, path: str | Path, embedding: str | Path | None = None) -> tuple[Adapter, dict[str, str]]:
    """Attach the adapter of a file to `denoiser`, which has none; gives the adapter and the file's metadata.

    Args:
        path: an adapter file, or an embedding. The word of an embedding that names none is its file's name.
        embedding: the file of the token vectors that belong to the adapter; the default is `embedding.safetensors`
            beside it, if it was trained with some.

    Raises:
        ValueError: if a file cannot be read, or was made for another model; the denoiser is then as before.
    """
    tensors, metadata = load_adapter(path)
    own = embedding_of(tensors)
    with named(path):
        if embedding is None and own is None and count_of(metadata, "anchor.vectors"):
            beside = Path(path).with_name(EMBEDDING_FILE)
            embedding = beside if beside.is_file() else None
    vectors, about = (None, metadata) if embedding is None else load_adapter(embedding)
    held = own if vectors is None else embedding_of(vectors)
    if vectors is not None and (own is not None or held is None):
        raise ValueError(
            f"embedding is {embedding}, but it takes a file of token vectors, beside an adapter file of layers"
        )
    token = shown(about.get("anchor.token", "")) or (held[1] if held else "") or Path(embedding or path).stem
    with named(path):
        return attach_tensors(denoiser, tensors, metadata, vectors, token), metadata


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
