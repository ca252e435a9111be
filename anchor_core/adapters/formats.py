"""Key formats of adapter files, and the conversion between them.

- `comfyui`: `lora_unet_<name>` for UNets, `diffusion_model.<name>` for transformers (the original names, with fused
  projections), each with `.lora_down.weight`, `.lora_up.weight` and `.alpha`; text encoders `lora_te_`, or `lora_te1_`
  and `lora_te2_`.
- `kohya`: the same, but `lora_unet_<name>` for transformers too.
- `diffusers`: `unet.`, `transformer.` and `text_encoder.` before diffusers' names, with `.lora_A.weight` and
  `.lora_B.weight`, into which alpha is folded.

UNets go by diffusers' names in `comfyui` and `kohya` files of SD1 and SD2, by the original ones in those of SDXL.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import check_choice, shown
from .formulas import adapted
from .names import network_family, swapped_rows, to_diffusers, to_original
from .parts import PIECE, Layers, kind_of, row_sizes, scale_of, size_of
from .prefixes import T5, module_of
from .reading import read_layers

logger = logging.getLogger(__name__)

FORMATS = ("comfyui", "kohya", "diffusers")
DIFFUSERS_PREFIXES = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")


def format_of(prefixes: list[str]) -> str:
    """The format of a file with these prefixes."""
    for format, beginnings in {"diffusers": ("unet.", "transformer."), "comfyui": ("diffusion_model.",)}.items():
        if any(prefix.startswith(beginnings) for prefix in prefixes):
            return format
    return "kohya"


def diffusers_form(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a LoRA under diffusers' names: alpha / rank goes into B. Other kinds stay as they are."""
    if "lora_down.weight" not in parts:
        return dict(parts)
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    rest = {
        part: tensor for part, tensor in parts.items() if part not in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    if "lora_up.bias" in rest:
        rest["lora_B.bias"] = rest.pop("lora_up.bias") * scale_of(parts)
    return {"lora_A.weight": down, "lora_B.weight": up * scale_of(parts), **rest}


def convert(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, to: str) -> dict[str, Tensor]:
    """An adapter file's tensors in another format, of the same effect.

    A LoRA on a fused projection splits exactly (the rows of `up`, with the same `down`), and separate ones fuse
    exactly into block form of the sum of their ranks; splitting such a one gives back the separate ones. Of other kinds
    separate layers become the whole change of the fused weight (`diff`), at the file's precision.

    Args:
        tensors: in any of `FORMATS`, of SD1, SD2, SDXL, SD3 or Flux.
        metadata: the file's; its `modelspec.architecture` is asked where names and shapes do not tell, and its
            alphas are taken where diffusers stated them there.
        to: one of `FORMATS`.

    Raises:
        ValueError: if a key is not understood, or the adapter's kind has no form in that format.
    """
    check_choice("to", to, FORMATS)
    layers, kinds, unread = read_layers(tensors, metadata)
    for prefix, kind in kinds.items():
        parts = layers[prefix]
        if to == "diffusers" and (kind != "lora" or "lora_mid.weight" in parts):
            raise ValueError(f"to is {to!r}, but this is a {kind} file, and {_NOT_CONVERTED.get(kind, _LORA_ONLY)}")
        if kind == "dora" and "dora_scale" not in parts:
            raise ValueError(f"to is {to!r}, but this is a dora file, and {_NOT_CONVERTED[kind]}")
        parts.pop("lora_magnitude_vector", None)
    strangers = [key for key in unread if not key.startswith(BUNDLED)]
    strangers += [prefix for prefix in layers if module_of(prefix) is None]
    if strangers:
        raise ValueError(
            f"this file is in no known format: {shown(strangers[0])} is of neither ComfyUI's, kohya's nor diffusers' "
            "keys"
        )
    if unread:
        logger.warning("%d bundled embeddings of the file are left out: give them as a file of their own", len(unread))
    made = renamed(layers, metadata, to)
    dense = {prefix: _dense(prefix, parts) for prefix, parts in made.items() if PIECE in parts}
    if dense:
        logger.warning(
            "%d layers are written as whole changes of their weights, which take much more room: there they are parts "
            "of one layer, and factors of these kinds have no common one", len(dense),
        )  # fmt: skip
    return _joined(made | dense)


BUNDLED = "bundle_emb."
"""Before embeddings that OneTrainer writes into a LoRA file."""


def renamed(layers: Layers, metadata: Mapping[str, str] | None, to: str) -> Layers:
    """Layers under the prefixes of a format, whether its programs read their kind or not; strangers stay as they are.

    Raises:
        ValueError: if the family is not told by names and shapes, or a layer cannot be split or fused.
    """
    named: dict[str, Layers] = {"": {}}
    result: Layers = {}
    for prefix, parts in layers.items():
        found = module_of(prefix)
        if found is None:
            result[prefix] = parts
        else:
            component, name = found
            named.setdefault(component, {})[name] = parts
    network = named.pop("")
    family = network_family(network, (metadata or {}).get("modelspec.architecture", ""), "text_encoder_2" in named)
    if to == "diffusers":
        network, prefix = _split_all(network, family), "unet." if family in ("sd", "sdxl") else "transformer."
    elif family == "sd":
        network, prefix = {to_diffusers(name, family)[0]: parts for name, parts in network.items()}, "lora_unet_"
    else:
        network, prefix = _fuse_all(network, family), "lora_unet_"
        if to == "comfyui" and family != "sdxl":
            prefix = "diffusion_model."
    result |= _prefixed(network, prefix)
    one = family == "sd" and not any(prefix.startswith("lora_te1_") for prefix in layers)
    prefixes = {"text_encoder": "lora_te_" if one else "lora_te1_", "text_encoder_2": "lora_te2_", T5: "lora_te3_"}
    if to == "diffusers":
        prefixes = {"text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2.", T5: "text_encoder_3."}
    if family == "flux":  # it has no second CLIP
        prefixes[T5] = prefixes["text_encoder_2"]
    for component, parts in named.items():
        result |= _prefixed(parts, prefixes[component])
    return result


_LORA_ONLY = "diffusers reads LoRA only"
_NOT_CONVERTED = {
    "dora": "its magnitudes depend on the base weights, so that they cannot be rewritten without the model",
}


def _prefixed(layers: Layers, prefix: str) -> Layers:
    dots = prefix.endswith(".")
    return {prefix + (name if dots else name.replace(".", "_")): parts for name, parts in layers.items()}


def _joined(layers: Layers) -> dict[str, Tensor]:
    """File keys again. Every tensor of its own memory, as safetensors wants them."""
    tensors = {}
    for prefix, parts in layers.items():
        if prefix.startswith((*DIFFUSERS_PREFIXES, "text_encoder_3.")):
            parts = diffusers_form(parts)
        if "lora_down.weight" in parts:
            parts = {"alpha": torch.tensor(float(parts["lora_down.weight"].shape[0])), **parts}
        tensors |= {f"{prefix}.{part}": tensor.clone().contiguous() for part, tensor in parts.items()}
    return tensors


def _split_all(layers: Layers, family: str) -> Layers:
    result: Layers = {}
    for name, parts in layers.items():
        names = to_diffusers(name, family)
        pieces = [swapped_rows(parts, name, family)] if len(names) == 1 else _split(parts, len(names))
        result |= {name: piece for name, piece in zip(names, pieces, strict=True) if piece is not None}
    return result


def _fuse_all(layers: Layers, family: str) -> Layers:
    result: Layers = {}
    groups: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, parts in layers.items():
        original, index = to_original(name, family)
        if index is None:
            result[original] = parts if original == name else swapped_rows(parts, original, family)
        else:
            result.setdefault(original, {})  # keeps the order
            groups.setdefault(original, {})[index] = parts
    for original, pieces in groups.items():
        result[original] = _fuse(original, pieces, len(to_diffusers(original, family)))
    return result


def _split(parts: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor] | None]:
    """One fused layer's as `count` separate ones; None for a LoRA that is 0 while others are not."""
    kind = kind_of("a fused layer", parts)
    if kind == "full" and "diff" in parts:
        sizes = row_sizes(*parts["diff"].shape[:2], count)
        rows = {part: tensor.split(sizes) for part, tensor in parts.items()}
        return [{part: pieces[index] for part, pieces in rows.items()} for index in range(count)]
    if kind in ("lokr", "loha") and "dora_scale" not in parts:
        return [{**parts, PIECE: torch.tensor([index, count])} for index in range(count)]
    if kind not in ("lora", "dora") or "lora_mid.weight" in parts:
        raise ValueError(f"a fused layer's adapter of kind {kind} cannot be split")
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    sizes = row_sizes(up.shape[0], down.shape[1], count)
    beside = {part: tensor for part, tensor in parts.items() if part in _BY_ROW}
    if any(tensor.shape[0] != len(up) for tensor in beside.values()):
        raise ValueError("a fused layer's adapter of magnitudes by input channel cannot be split")
    rows = up.split(sizes)
    used = [piece.flatten(1).any(0) for piece in rows]  # (rank,) each
    block_form = torch.stack(used).sum(0).eq(1).all() and not beside  # every rank serves one part alone
    scale = scale_of(parts)
    pieces: list[dict[str, Tensor] | None] = []
    for index, (piece, mask) in enumerate(zip(rows, used, strict=True)):
        if not block_form:
            mask = torch.ones_like(mask)
        rank = int(mask.sum())
        made = {"lora_down.weight": down[mask], "lora_up.weight": piece[:, mask]}
        made |= {"alpha": torch.tensor(scale * rank)} if "alpha" in parts else {}
        made |= {part: tensor.split(sizes)[index] for part, tensor in beside.items()}
        pieces.append(made if rank else None)
    return pieces


_BY_ROW = ("lora_up.bias", "diff_b", "dora_scale", "lora_magnitude_vector")
"""Parts beside the factors that have an element for each row."""


def _fuse(name: str, pieces: Mapping[int, Mapping[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Separate LoRAs as the fused one: with one `down` if theirs are equal, else in block form; of full, their rows.

    Other kinds give each piece's parts as `<index>/<part>`, and `piece` (0, count), which only the formulas read.
    """
    kinds = {kind_of(name, piece) for piece in pieces.values()}
    if kinds == {"full"} and all("diff" in piece for piece in pieces.values()):
        return _fuse_rows(pieces, count)
    magnitudes = {part for piece in pieces.values() for part in piece if part in _BY_ROW[2:]}
    plain = kinds <= {"lora", "dora"} and not any("lora_mid.weight" in piece for piece in pieces.values())
    whole = (
        plain
        and len(pieces) == count
        and all(
            part in piece and piece[part].shape[0] == len(piece["lora_up.weight"])
            for part in magnitudes
            for piece in pieces.values()
        )
    )
    if not plain or (magnitudes and not whole):
        held = {f"{index}/{part}": tensor for index, piece in pieces.items() for part, tensor in piece.items()}
        return {**held, PIECE: torch.tensor([0, count])}
    order = sorted(pieces)
    downs = [pieces[index]["lora_down.weight"].flatten(1) for index in order]
    ups = {index: pieces[index]["lora_up.weight"].flatten(1) for index in order}
    scales = {index: scale_of(pieces[index]) for index in order}
    width = downs[0].shape[1]
    if any(down.shape[1:] != downs[0].shape[1:] for down in downs):
        raise ValueError(f"this LoRA was made for another model: the parts of {name} read inputs of different widths")
    biases = _fused_biases(pieces, _rows_of(ups, width, count), scales)
    if len(set(scales.values())) > 1:
        ups, scales = {index: up * scales[index] for index, up in ups.items()}, dict.fromkeys(order, 1.0)
    shared = len(order) == count and all(torch.equal(down, downs[0]) for down in downs)
    sizes = _rows_of(ups, width, count)
    down = downs[0] if shared else torch.cat(downs)
    up = down.new_zeros(sum(sizes), down.shape[0])
    column = 0
    for index, piece in ups.items():
        row = sum(sizes[:index])
        up[row : row + sizes[index], column : column + piece.shape[1]] = piece
        column += 0 if shared else piece.shape[1]
    alpha = torch.tensor(scales[order[0]] * down.shape[0])
    rest = {part: torch.cat([pieces[index][part].flatten() for index in order]) for part in magnitudes}
    rest = {part: tensor[:, None] if part == "dora_scale" else tensor for part, tensor in rest.items()}
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha, **rest, **biases}


def _dense(prefix: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Separate layers' parts in a fused one (`_fuse`) as the change of its weight and bias, at the file's precision.

    Raises:
        ValueError: a kind whose change depends on the base weights.
    """
    count = int(parts[PIECE][1])
    pieces: dict[int, dict[str, Tensor]] = {}
    for index, _, part in sorted(part.partition("/") for part in parts if part != PIECE):
        pieces.setdefault(int(index), {})[part] = parts[f"{index}/{part}"]
    changes = {}
    for index, piece in pieces.items():
        kind = kind_of(prefix, piece)
        if kind in _OF_THE_BASE or any(part in piece for part in _BY_ROW[2:]):
            raise ValueError(
                f"{prefix} is one layer there and {count} here, and what a {kind} changes of a part depends on the "
                "base weights; take the file as it is, which ComfyUI and this program read with the model"
            )
        size = size_of(kind, piece)
        if size is None or math.prod(size) > LARGEST:
            said = "of no size that its parts tell" if size is None else f"{size[0]} x {size[1]}"
            raise ValueError(f"{prefix} has a part {said}, but it takes one of at most {LARGEST} weights")
        changes[index] = adapted(kind, piece, torch.zeros(size))
    if len({change.shape[1] for change in changes.values()}) > 1:
        raise ValueError(f"this LoRA was made for another model: the parts of {prefix} read inputs of different widths")
    sizes = _rows_of(changes, next(iter(changes.values())).shape[1], count)
    scales = {index: scale_of(piece) if "lora_up.bias" in piece else 1.0 for index, piece in pieces.items()}
    made = _fuse_rows({index: {"diff": change} for index, change in changes.items()}, count)
    made |= _fused_biases(pieces, sizes, scales)
    held = {tensor.dtype for piece in pieces.values() for tensor in piece.values() if tensor.ndim > 1}
    own = {dtype for dtype in held if dtype.itemsize > 1} or {torch.float16}  # 8 bits hold a factor, but no product
    precision = own.pop() if len(own) == 1 else torch.float32
    return {part: tensor.to(precision) for part, tensor in made.items()}


_OF_THE_BASE = ("dora", "glora", "oft_blocks", "ia3")
"""Kinds whose change of a weight is made of the weight itself."""

LARGEST = 2**28
"""Weights of a layer's part that is multiplied out with no model to compare it with: 1 GB, 4 times Flux' largest."""


def _fused_biases(
    pieces: Mapping[int, Mapping[str, Tensor]], sizes: list[int], scales: Mapping[int, float]
) -> dict[str, Tensor]:
    """What the pieces add to the layer's bias, (out,), as `diff_b`; nothing where none does."""
    held = {}
    for index, piece in pieces.items():
        if "diff_b" in piece or "lora_up.bias" in piece:
            held[index] = piece["diff_b"] if "diff_b" in piece else piece["lora_up.bias"] * scales[index]
    if not held:
        return {}
    like = next(iter(held.values()))
    return {"diff_b": torch.cat([held.get(index, like.new_zeros(size)) for index, size in enumerate(sizes)])}


def _fuse_rows(pieces: Mapping[int, Mapping[str, Tensor]], count: int) -> dict[str, Tensor]:
    """The changes of separate layers' weights and biases as that of the fused layer, 0 where one is not changed."""
    weights = {index: piece["diff"] for index, piece in pieces.items()}
    sizes = _rows_of(weights, next(iter(weights.values())).shape[1], count)
    result = {}
    for part in ("diff", "diff_b"):
        held = {index: piece[part] for index, piece in pieces.items() if part in piece}
        if held:
            like = next(iter(held.values()))
            rows = [held.get(index, like.new_zeros(size, *like.shape[1:])) for index, size in enumerate(sizes)]
            result[part] = torch.cat(rows)
    return result


def _rows_of(held: Mapping[int, Tensor], width: int, count: int) -> list[int]:
    """Rows of each of a fused layer's parts; of one that is not held, those that it has with an input of `width`."""
    sizes = [width] * 3 + [4 * width] if count == 4 else [next(iter(held.values())).shape[0]] * count
    return [held[index].shape[0] if index in held else size for index, size in enumerate(sizes)]
