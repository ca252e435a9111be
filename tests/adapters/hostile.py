"""Seeded mutations of LoRA and embedding files, for the long test of them."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save

Entries = dict[str, tuple[str, list[int], bytes]]
"""Tensor's name -> dtype, shape and bytes, as a safetensors file has them, whether they go together or not."""

DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "I64",
    "I32",
    "I8",
    "U8",
    "BOOL",
    "F4",
    "C64",
    "X1",
)
SIZES = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
TEXTS = (
    "", "\x1b[2J\x1b[31m", "\u202etxt.exe", "\x00", "a" * 100_000, "../../etc/passwd", "nan", "-1", "1e400",
    "[" * 50_000, "{" * 3000, '{"a": ' * 3000, "null", "[]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN}',
    "9" * 5000, "\n\n\n",
    '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 2, "((((.*)*)*)*)*x": 3}}',
    '{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}', '{"unet.lora_alpha": true, "unet.use_rslora": 7}',
    '{"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 1e999, "to_k": "x"}}',
)  # fmt: skip
KEYS = ("lora_adapter_metadata", "anchor.vectors", "anchor.token", "anchor.guidance", "ss_network_module",
        "modelspec.architecture", "anchor.kind", "anchor.subject_prompt", "ot_branch")  # fmt: skip
PARTS = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha",
    "dora_scale", "lora_magnitude_vector", "diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "hada_w1_a", "hada_w1_b",
    "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "oft_blocks", "oft_R.weight", "rescale", "on_input", "weight",
    "a1.weight", "a2.weight", "b1.weight", "b2.weight", "svd_shift", "lambda_layer", "emb_params", "nothing",
)  # fmt: skip
PREFIXES = ("lora_unet_", "unet.", "diffusion_model.", "", "base_model.model.", "lycoris_", "transformer.", "lora_te_",
            "lora_te3_", "text_encoder.", "text_encoders.t5xxl.transformer.", "bundle_emb.")  # fmt: skip


def pack(entries: Entries, metadata: dict[str, str] | None = None, header: bytes | None = None) -> bytes:
    """A safetensors file, of whatever is given."""
    if header is None:
        told, start = {"__metadata__": metadata} if metadata else {}, 0
        for name, (dtype, shape, data) in entries.items():
            told[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
            start += len(data)
        header = json.dumps(told).encode()
    return struct.pack("<Q", len(header)) + header + b"".join(data for _, _, data in entries.values())


def unpack(data: bytes) -> tuple[Entries, dict[str, str]]:
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__", {})
    return {k: (v["dtype"], v["shape"], body[slice(*v["data_offsets"])]) for k, v in header.items()}, metadata


def mutated(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """What was done to a file, and the file."""
    entries, metadata = unpack(data)
    name = chance.choice(MUTATIONS)
    if name in BYTES:
        return name, BYTES[name](data, chance)
    for _ in range(chance.randint(1, 3)):
        made = FILES[name](entries, metadata, chance)
        if made is not None:
            return name, made
    return name, pack(entries, metadata)


# --- of bytes -----------------------------------------------------------------------------------------------------


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 20)):
        changed[chance.randrange(min(len(changed), chance.choice((8, 400, len(changed)))))] = chance.randrange(256)
    return bytes(changed)


def _length(data: bytes, chance: random.Random) -> bytes:
    return struct.pack("<Q", chance.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1, len(data)))) + data[8:]


def _header(data: bytes, chance: random.Random) -> bytes:
    header = chance.choice((
        b"[" * 100_000, b'{"a":' * 5000, b"{}", b"null", b"\xff\xfe", b'{"a": 1}', b'{"a": {"dtype": "F32"}}',
        b'{"__metadata__": {"a": 1}}', b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"{" + b" " * 1_000_000 + b"}",
    ))  # fmt: skip
    return struct.pack("<Q", len(header)) + header + data[-100:]


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes flipped": _flip,
    "cut off": lambda data, chance: data[: chance.randrange(len(data))],
    "length": _length,
    "header": _header,
    "more behind": lambda data, chance: data + b"\0" * chance.randint(1, 5000),
    "no file": lambda data, chance: chance.choice(
        (b"", b"PK\x03\x04", b"GIF89a" + data, b"\x80\x04K\x01.", data[::-1])
    ),
}


# --- of tensors and metadata --------------------------------------------------------------------------------------


def _one(entries: Entries, chance: random.Random) -> str:
    return chance.choice(sorted(entries)) if entries else "none"


def _put(entries: Entries, name: str, tensor: torch.Tensor) -> None:
    made, _ = unpack(save({"a": tensor.contiguous()}))
    entries[name] = made["a"]


def _shape(entries, metadata, chance):
    name = _one(entries, chance)
    shape = chance.choice(([], [0], [0, 4], [1], [7], [1, 1], [3, 5], [2, 2, 2, 2, 2, 2], [4, 0, 3], [64, 64], [2, 8]))
    _put(entries, name, torch.randn(shape))


def _swap(entries, metadata, chance):
    one, other = _one(entries, chance), _one(entries, chance)
    if entries:
        entries[one], entries[other] = entries[other], entries[one]


def _dtype(entries, metadata, chance):
    name = _one(entries, chance)
    dtype, (_, shape, data) = chance.choice(DTYPES), entries.get(name, ("F32", [1], b"\0" * 4))
    size = math.prod(shape) * SIZES.get(dtype, 1)
    entries[name] = dtype, shape, (data * 8)[:size].ljust(size, b"\x01")


def _values(entries, metadata, chance):
    name = _one(entries, chance)
    shape = entries[name][1] if name in entries else [1]
    _put(entries, name, torch.full(shape, chance.choice((math.nan, math.inf, -math.inf, 3e38, 1e-45, 0.0))))


def _lost(entries, metadata, chance):
    entries.pop(_one(entries, chance), None)


def _renamed(entries, metadata, chance):
    name = _one(entries, chance)
    word = chance.choice(
        ("\x1b[2J", "\u202e", "a" * 5000, "../x", "", ".", "..", "a.b.c", "\n", "x\0y", "(a+)+$", "é" * 300)
    )
    place = chance.choice((word, f"{name}{word}", f"{word}.{name}", f"{name.rpartition('.')[0]}.{word}"))
    if name in entries:
        entries[place] = entries.pop(name)


def _part(entries, metadata, chance):
    name = _one(entries, chance).rpartition(".")[0]
    name = name.removesuffix(".lora_down").removesuffix(".lora_up").removesuffix(".lora_A").removesuffix(".lora_B")
    shape = chance.choice(
        ([32, 4], [4, 32], [32], [1], [], [32, 32], [1, 32], [32, 1], [8, 4, 4], [3, 8, 4, 4], [2, 2])
    )
    _put(entries, f"{name}.{chance.choice(PARTS)}", torch.randn(shape))


def _prefix(entries, metadata, chance):
    name, prefix = _one(entries, chance), chance.choice(PREFIXES)
    for old in [key for key in entries if key.startswith(name[:14])]:
        entries[prefix + old.removeprefix("lora_unet_")] = entries.pop(old)


def _large(entries, metadata, chance):
    """Small factors of a product that would take terabytes."""
    name = _one(entries, chance).partition(".")[0]
    kinds = (
        "lora_down.weight lora_up.weight",
        "hada_w1_b hada_w1_a hada_w2_b hada_w2_a",
        "lokr_w1_b lokr_w1_a lokr_w2_b lokr_w2_a",
        "b2.weight b1.weight a1.weight a2.weight",
    )
    kind = chance.choice(kinds)
    entries.clear()
    for index, part in enumerate(kind.split()):
        _put(entries, f"{name}.{part}", torch.ones((1, 200_000) if index % 2 == 0 else (200_000, 1)))


def _many(entries, metadata, chance):
    count = chance.choice((2000, 120_000))
    for index in range(count):
        entries[f"lora_unet_{index}.alpha"] = "F32", [], b"\0\0\x80?"


def _metadata(entries, metadata, chance):
    for _ in range(chance.randint(1, 3)):
        metadata[chance.choice(KEYS)] = chance.choice(TEXTS)


FILES: dict[str, Callable[[Entries, dict[str, str], random.Random], bytes | None]] = {
    "shape": _shape,
    "swapped": _swap,
    "dtype": _dtype,
    "values": _values,
    "lost": _lost,
    "renamed": _renamed,
    "part": _part,
    "prefix": _prefix,
    "large": _large,
    "many": _many,
    "metadata": _metadata,
}
MUTATIONS = (*BYTES, *FILES, "shape", "part", "dtype", "metadata", "lost", "swapped")


def cases(sources: dict[str, bytes], count: int, seed: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """(source, mutation, file) of `count` files."""
    chance = random.Random(seed)
    for index in range(count):
        source = sorted(sources)[index % len(sources)]
        yield source, *mutated(sources[source], chance)


def snapshot(folder: Path) -> list[tuple[str, int, int]]:
    """Every file below a folder."""
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())
