"""Adapter files: safetensors that the stock LoraLoader and diffusers read, with the training settings inside.

A backend's `file_keys()` says which prefix belongs to which module, `lora_unet_down_blocks_0_...` for SD1.x. A LoRA's
keys are `<prefix>.lora_down.weight`, `.lora_up.weight` and `.alpha`, and under diffusers' dotted prefixes
(`transformer.`) `.lora_A.weight` and `.lora_B.weight`. The other kinds:

- LoKr: `lokr_w1` and `lokr_w2` (with alpha / rank inside), or `lokr_w1`, `lokr_w2_a`, `lokr_w2_b` and `alpha`.
- LoHa: `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b` and `alpha`.
- DoRA: those of a LoRA, and `dora_scale`. The stock loader divides by the norm of the base weight where DoRA has that
  of the updated one, so `dora_scale` is m ||W|| / ||W + s B A||, which makes its weight the trained one.
- OFT: `oft_R.weight`, which peft trains, and `diff`, the change of the weight. The stock `oft_blocks` rotate outputs,
  peft's blocks inputs, so no `oft_blocks` give the same weight. The file is as large as the layers,
  and the stock loader logs each `oft_R.weight` as not loaded.
- full: `diff` and `diff_b`, the changes of a module's weight and bias.
- SVDiff: `svd_shift`, which is trained, and `diff`; as with OFT.

Token vectors are a file of their own, an embedding (`tokens.py`): the whole of what a training of kind none writes, and
`embedding.safetensors` beside the adapter's file of another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, named, reason, shown
from ..writing import whole
from .adapter import Adapter
from .formats import DIFFUSERS_PREFIXES, FORMATS, convert, diffusers_form
from .kinds import NAME, NO_LAYERS
from .parts import scale_of
from .reading import STATED, check_names, checked
from .tokens import to_embedding
from .torch_file import UnreadableFile, read_sealed, read_torch


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata` to `path`, whole or not at all.

    Raises:
        ValueError: if `path` cannot be written.
    """
    with saving_adapter(path, tensors, metadata):
        pass


@contextmanager
def saving_adapter(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[None]:
    """As `save_adapter`, but the file takes its place at the end of the block, if that has not failed."""
    from safetensors import SafetensorError

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with whole(path) as part:  # safetensors' own save_file makes a file that other users cannot read
            part.write_bytes(_serialise(tensors, metadata))
            yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the adapter cannot be written to {path} ({reason(error)}); choose another place") from error


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
    """Tensors (on the CPU) and metadata of an adapter's or an embedding's file: safetensors, or one of `torch.save`.

    Raises:
        ValueError: naming the file, if it cannot be read, holds other things than tensors, or NaN or infinite values.
    """
    from safetensors import SafetensorError, safe_open

    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise ValueError(f"{shown(path, 1000)} is no file; give a file of an adapter or an embedding")
    if Path(path).suffix.lower() in PICKLES:
        tensors, metadata = _from_pickle(path), {}
    else:
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                with named(path):
                    check_names(file.keys())
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
        except (OSError, SafetensorError, TypeError, AttributeError) as error:  # the last two for dtypes of no torch's
            told = f"{shown(path, 1000)} is not a readable safetensors file ({reason(error)})"
            raise ValueError(f"{told}; give a file of an adapter or an embedding") from error
    return checked(tensors, path), metadata


PICKLES = (".pt", ".pth", ".bin", ".ckpt")
"""Files that `torch.save` wrote: A1111's embeddings, diffusers' `learned_embeds.bin` and its first LoRAs."""


def _from_pickle(path: str | Path) -> dict[str, Tensor]:
    try:
        held: Any = read_torch(path)
    except UnreadableFile as error:
        why = error.strerror or "it is no file of tensors"
        raise ValueError(f"{path} cannot be read ({why}); give a file of an adapter or an embedding") from error
    if isinstance(held, Mapping) and isinstance(held.get("string_to_param"), Mapping):
        held = {"emb_params": next(iter(held["string_to_param"].values()), None)}
    tensors = {}
    for name, each in held.items() if isinstance(held, Mapping) else ():
        if isinstance(each, Tensor):
            tensors[str(name)] = each.detach()
    if not tensors:
        raise ValueError(f"{path} holds no tensor, but it takes a file of an adapter or an embedding")
    return tensors


def to_file_keys(adapter: Adapter, file_keys: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of the adapter's file, on the CPU, by `<prefix>.<part>`; of kind none those of an embedding."""
    if adapter.config.kind == NO_LAYERS:
        return to_embedding(adapter.tokens)
    tensors = {}
    for name in adapter.module_names:
        kind = adapter.config.kind_of(name)
        parts = _WRITTEN.get(kind, _as_trained)(adapter, name, adapter.parts(name))
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
    scale = parts["lora_magnitude_vector"].flatten() / dora_norms(adapter, name, parts)
    return {**parts, "dora_scale": scale.view(-1, *[1] * (weight.dim() - 1))}


def dora_norms(adapter: Adapter, name: str, parts: Mapping[str, Tensor]) -> Tensor:
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
    return {DIFFS[part]: _as_stored(change, own[part]) for part, change in changes.items()}


def _write_svdiff(adapter: Adapter, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        change = adapter.layer(name).change().cpu()
    return {"svd_shift": parts["shift"], "diff": _as_stored(change, adapter.base_module(name).weight)}


def _as_stored(change: Tensor, weight: Tensor) -> Tensor:
    """A change of a weight that is held in half precision needs no more than that."""
    return change.half() if weight.dtype in (torch.float16, torch.bfloat16) else change


DIFFS = {"weight": "diff", "bias": "diff_b"}
_WRITTEN = {"dora": _write_dora, "lokr": _write_lokr, "oft": _write_oft, "full": _write_full, "svdiff": _write_svdiff}


def _base_weight(adapter: Adapter, name: str) -> Tensor:
    return adapter.base_module(name).weight.detach().float().cpu()


EMBEDDING_FILE = "embedding.safetensors"
"""The token vectors, beside the file of the layers that were trained with them."""


def convert_file(source: str | Path, target: str | Path, to: str) -> None:
    """Write the adapter file `source` in the format `to` as `target`, whole or not at all, with its metadata.

    Raises:
        ValueError: if `source` cannot be read or converted, or `target` cannot be written.
    """
    check_choice("to", to, FORMATS)
    tensors, metadata = load_adapter(source)
    with named(source):
        converted = convert(tensors, metadata, to=to)
    metadata.pop(STATED, None)  # alpha is among the tensors now
    save_adapter(target, converted, metadata)


def read_adapter(path: str | Path) -> dict[str, Tensor]:
    """The weights of the adapter in a checkpoint, a `state_dict()`; ValueError if it cannot be read."""
    try:
        return checked(read_sealed(path)["adapter"])
    except (UnreadableFile, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}); give one of a training") from error
