"""The door of adapter files: what is in one is checked here, once, before anything is done with it.

A file of anybody's is data of anybody's: its sizes are bounded, its names are printable, patterns in it are read as
names, and what does not fit together ends in one sentence. Callers put the file's name before it (`checks.named`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import named, shown
from .parts import UNREAD, Layers, kind_of, split_layers

logger = logging.getLogger(__name__)

TENSORS = 100_000
"""How many tensors a file may have; the largest known, of all layers of Flux in parts, have some 10,000."""
NAME_LENGTH = 500
STATED_LENGTH = 1_000_000

STATED = "lora_adapter_metadata"  # where diffusers writes peft's config


# --- tensors ------------------------------------------------------------------------------------------------------


def check_names(names: Sequence[Any]) -> None:
    """ValueError for more tensors than a LoRA can have, or a name that no program writes."""
    if len(names) > TENSORS:
        raise ValueError(f"this file has {len(names)} tensors, but a LoRA has at most {TENSORS}; give a LoRA file")
    for name in names:
        if not isinstance(name, str) or len(name) > NAME_LENGTH or not name.isprintable():
            told = f"{shown(name, 60)!r}"
            raise ValueError(
                f"this file names a tensor {told}, but names are of at most {NAME_LENGTH} printable letters; give "
                "another file"
            )


def checked(tensors: Mapping[str, Tensor], what: Any = "it") -> dict[str, Tensor]:
    """The tensors of an adapter or an embedding, on their device, 8-bit floats as bfloat16, which holds them exactly.

    Args:
        what: the file or input that they are of, for messages.

    Raises:
        ValueError: too many, unprintable names, numbers of another type, NaN or infinite values.
    """
    with named(what):
        check_names(list(tensors))
    return {name: _number(what, name, tensor) for name, tensor in tensors.items()}


def _number(what: Any, name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{what} has {name!r} as a {type(tensor).__name__} instead of a tensor; give a LoRA or an embedding"
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    narrow = tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
    # Counts, such as alpha, may be whole numbers.
    whole = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex and tensor.numel() <= 8
    if tensor.layout != torch.strided or tensor.is_quantized or not (tensor.dtype.is_floating_point or whole):
        raise ValueError(f"{what} has {name!r} in {dtype}, but layers and vectors are of floats; convert it")
    if narrow:
        if "x2" in dtype or dtype == "float8_e8m0fnu":
            raise ValueError(
                f"{what} has {name!r} in {dtype}, packed numbers or scales, which are not read; convert it"
            )
        tensor = tensor.to(torch.bfloat16)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{what} has NaN or infinite values in {name!r}; train it again")
    return tensor


# --- layers -------------------------------------------------------------------------------------------------------


def read_layers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, also: Collection[str] = ()
) -> tuple[Layers, dict[str, str], list[str]]:
    """An adapter file's layers, by their prefixes in the file.

    Args:
        also: kinds of `UNREAD` that the caller can read.

    Returns:
        layers with an alpha where only the metadata states one; the kind of each; and what is no layer that can be
        read, said so that it may follow the name of a layer.

    Raises:
        ValueError: if the file holds no layer, or one is not whole.
    """
    layers, unread = split_layers(tensors)
    layers = {
        name: parts for prefix, held in layers.items() for name, parts in _without_processor(prefix, held).items()
    }
    kinds = {}
    for prefix in list(layers):
        kind = kind_of(prefix, layers[prefix])
        if kind in UNREAD and kind not in also:
            unread.append(f"{prefix} ({UNREAD[kind]})")
            del layers[prefix]
        else:
            kinds[prefix] = kind
            if kind == "oft_blocks" and prefix.startswith("diffusion_model.") and "alpha" in layers[prefix]:
                # ComfyUI's own training keeps the rotations within alpha, LyCORIS' within alpha times the rows.
                count, size = layers[prefix]["oft_blocks"].shape[-3:-1]
                layers[prefix]["alpha"] = layers[prefix]["alpha"].float() / (count * size)
    _state_alphas(layers, metadata or {})
    return layers, kinds, unread


def _without_processor(prefix: str, parts: dict[str, Tensor]) -> Layers:
    """A layer of x-flux's attention processors as those of the modules beside which it runs; others as they are."""
    block, found, layer = prefix.partition(".processor.")
    names = {
        "qkv_lora1": f"{block}.img_attn.qkv",
        "qkv_lora2": f"{block}.txt_attn.qkv",
        "proj_lora1": f"{block}.img_attn.proj",
        "proj_lora2": f"{block}.txt_attn.proj",
        "proj_lora": f"{block}.linear2",
    }
    if not found or layer not in (*names, "qkv_lora"):
        return {prefix: parts}
    if layer in names:
        return {names[layer]: parts}
    up = parts.get("lora_up.weight")
    if up is None or up.ndim < 2 or up.shape[0] % 3:
        raise ValueError(f"this file is not a whole LoRA: {prefix} lacks lora_up.weight of queries, keys and values")
    there = block.replace("single_blocks", "single_transformer_blocks")
    return {
        f"{there}.attn.{part}": {**parts, "lora_up.weight": rows}
        for part, rows in zip(("to_q", "to_k", "to_v"), up.chunk(3))
    }


def tell_unread(read: int, unread: Sequence[str]) -> None:
    """Log which layers of a file are left out.

    Raises:
        ValueError: if they are most of them.
    """
    if not unread:
        return
    count = read + len(unread)
    some = ", ".join(shown(each, 100) for each in unread[:3]) + (", ..." if len(unread) > 3 else "")
    if len(unread) > read:
        told = f"{len(unread)} of its {count} layers belong to no module of this network ({some})"
        raise ValueError(f"this LoRA was made for another model: {told}")
    logger.warning("%d of the LoRA's %d layers are not read: %s", len(unread), count, some)


# --- what metadata says ------------------------------------------------------------------------------------------


def _state_alphas(layers: Layers, metadata: Mapping[str, str]) -> None:
    """Give each layer of a diffusers file the alpha that only the metadata states."""
    stated = _stated(metadata)
    for prefix, parts in layers.items() if stated else ():
        component, _, name = prefix.partition(".")
        if "alpha" in parts or "lora_down.weight" not in parts or f"{component}.lora_alpha" not in stated:
            continue
        alpha = _alpha(stated, f"{component}.lora_alpha")
        patterns = stated.get(f"{component}.alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"the metadata's {component}.alpha_pattern is no list of names; convert it again")
        pattern = _first_name(patterns, name)
        if pattern is not None:
            alpha = _alpha(patterns, pattern)
        if stated.get(f"{component}.use_rslora"):
            alpha *= math.sqrt(parts["lora_down.weight"].shape[0])
        parts["alpha"] = torch.tensor(alpha)


def _stated(metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(STATED, "{}")
    if not isinstance(text, str) or len(text) > STATED_LENGTH:
        raise ValueError(f"the metadata's {STATED} is no text of at most {STATED_LENGTH} letters; convert it again")
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the metadata's {STATED} is no JSON ({shown(error)}); convert it again") from error
    if not isinstance(stated, dict):
        raise ValueError(f"the metadata's {STATED} is {shown(text, 40)!r}, but it takes names and values")
    return stated


def _alpha(stated: Mapping[str, Any], key: str) -> float:
    value = stated[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"the metadata says {shown(key, 60)} is {shown(value, 40)}, but it takes a finite number")
    return float(value)


def _first_name(patterns: Mapping[str, Any], name: str) -> str | None:
    """The first of peft's patterns that is the name of a module, or of one inside others: `to_q` for `attn.to_q`.

    peft searches them as regular expressions, which in a stranger's file may never end; its own are names.

    Raises:
        ValueError: if one is more than a name.
    """
    places = {_name(pattern): index for index, pattern in reversed(list(enumerate(patterns)))}
    words = name.split(".")
    ends = [f"^{name}", *(".".join(words[start:]) for start in range(len(words)))]
    found = [places[end] for end in ends if end in places]
    return list(patterns)[min(found)] if found else None


def _name(pattern: str) -> str:
    name = pattern.removesuffix("$").replace("\\.", ".")
    if not all(letter.isalnum() or letter in "._-" for letter in name.removeprefix("^")):
        raise ValueError(
            f"the metadata's alpha_pattern has the expression {shown(pattern, 60)!r}, but of a file only names of "
            "layers are read; convert it with the program that wrote it"
        )
    return name


def count_of(metadata: Mapping[str, str], key: str) -> int:
    """A whole number that the metadata states, 0 where it does not; ValueError if it is none."""
    said = metadata.get(key, "0")
    if not str(said).isdecimal() or len(str(said)) > 9:
        raise ValueError(f"the metadata says {key} is {shown(said, 40)!r}, but it takes a whole number")
    return int(said)


def divides_by_adapted_norm(metadata: Mapping[str, str]) -> bool:
    """Whether a `dora_scale` by output row is the weight's magnitude itself, over ||W + s B A||, as LyCORIS and
    OneTrainer train it; else it is over ||W||, as ComfyUI reads every file and as ours are written."""
    if any(key.startswith("anchor.") for key in metadata):
        return False
    module = str(metadata.get("ss_network_module", ""))
    return module.startswith("lycoris") or any(key.startswith("ot_") for key in metadata)
