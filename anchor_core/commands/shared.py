"""What the verbs share."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

from ..checks import check_count


def open_model(options: Namespace):
    import torch

    from ..backends.diffusers.denoiser import DiffusersDenoiser
    from ..sandbox.model import WEIGHTS

    model = WEIGHTS if options.model == "sandbox" else options.model
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    return DiffusersDenoiser.from_pretrained(model, device(options), dtype, options.config)


def device(options: Namespace) -> str:
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def resolution(options: Namespace, denoiser) -> int:
    if options.resolution is None:
        return denoiser.default_resolution
    return check_count("resolution", options.resolution)


def check_writable(folder: str) -> Path:
    """The folder's path, after a trial that leaves nothing behind: the nearest existing parent takes a file."""
    out = Path(folder)
    parent = out
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"--out: {folder} cannot be written, because {parent} is a file; give another folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be written ({error.strerror}); give another folder") from error
    return out


def given(options: Namespace, kind: type):
    """The settings of `kind` from the options of the same names."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind) if "help" in field.metadata})


def check_embedding(options: Namespace) -> None:
    if options.embedding and not options.adapter:
        raise ValueError("--embedding: it goes with an --adapter; give the embedding file itself as --adapter")
