"""Opening a model for diffusers, from a folder or a single-file checkpoint. Nothing is ever downloaded."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .families import FAMILIES, Family

_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines that neither train nor denoise."""

_CLIP_KEYS = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.clip_")
_CHECKPOINT_KEYS = {
    "AutoencoderKL": ("first_stage_model.", "vae."),
    "CLIPTextModel": _CLIP_KEYS,
    "CLIPTextModelWithProjection": _CLIP_KEYS,
    "T5EncoderModel": ("text_encoders.t5xxl.",),
}
"""What the keys of a checkpoint begin with that holds weights of such a part."""


def open_pipeline(path: str | Path, dtype: torch.dtype, config: str | Path | None = None) -> Any:
    """The diffusers pipeline of a folder, or of a `.safetensors` checkpoint, on the CPU.

    A checkpoint holds weights only. The configs and tokenizers come from `config`, a diffusers folder of the same
    architecture, or from Hugging Face's cache on this machine, if such a model is in it. The folder needs no weights
    but those of the autoencoder and the text encoders that the checkpoint lacks, as many of SD3 and Flux do.

    Raises:
        ValueError: if `path` is no model, not a supported one, or not a whole one.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _open_file(path, dtype, config)
    if not (path / "model_index.json").is_file():
        raise ValueError(
            f"model is {str(path)!r}, but it takes a diffusers folder, which holds a model_index.json, or a "
            ".safetensors checkpoint"
        )
    if config is not None:
        raise ValueError(f"config is {str(config)!r}, but it goes with a .safetensors checkpoint only; leave it out")
    family, parts = _check_folder(path, "model")
    with _loading(path, "give a whole diffusers folder"):
        pipeline, given = _pipeline(family, parts)
        return pipeline.from_pretrained(str(path), torch_dtype=dtype, local_files_only=True, **given)


def place(pipeline: Any, device: str | torch.device, dtype: torch.dtype) -> None:
    """Move every network of a pipeline to a device and a precision."""
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            # SDXL's autoencoder overflows in half precision, and says so.
            upcast = name == "vae" and dtype == torch.float16 and module.config.get("force_upcast")
            wanted = torch.float32 if upcast else dtype
            module.to(device)
            if module.dtype != wanted:
                module.to(wanted)


def _open_file(path: Path, dtype: torch.dtype, config: str | Path | None) -> Any:
    if find_spec("accelerate") is None:
        # Without it, diffusers leaves weights that it does not find at random values, without a word.
        raise ValueError(f"model {path} is a checkpoint, which takes the package accelerate to open; install that")
    folder = _cached_config(path) if config is None else Path(config)
    family, parts = _check_folder(folder, "config")
    with _loading(path, f"give a whole checkpoint and, as config, a folder of its architecture (not {folder})"):
        pipeline, given = _pipeline(family, parts)
        given |= _from_folder(path, folder, parts)
        try:
            opened = pipeline.from_single_file(
                str(path), config=str(folder), torch_dtype=dtype, local_files_only=True, **given
            )
        except NotImplementedError as error:  # of a weight that has no data
            raise ValueError("it lacks weights of the network or the autoencoder") from error
        for name, part in opened.components.items():
            parameters = part.named_parameters() if isinstance(part, torch.nn.Module) else ()
            missing = [key for key, weight in parameters if weight.is_meta]
            if missing:
                raise ValueError(f"it lacks {len(missing)} weights of the {name}, such as {missing[0]}")
        return opened


def _from_folder(path: Path, folder: Path, parts: Mapping[str, Sequence[str]]) -> dict[str, torch.nn.Module]:
    """The autoencoder and the text encoders that a checkpoint lacks, from the folder."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        keys = list(file.keys())
    found = {}
    for name, (library, kind) in parts.items():
        beginnings = _CHECKPOINT_KEYS.get(kind)
        if beginnings and not any(key.startswith(beginnings) for key in keys):
            part = getattr(import_module(library), kind)
            found[name] = part.from_pretrained(str(folder / name), local_files_only=True)
    return found


def _cached_config(path: Path) -> Path:
    """The folder in Hugging Face's cache that diffusers would configure this checkpoint from."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _loading(path, "give a Stable Diffusion or Flux checkpoint"):
        from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

        known = fetch_diffusers_config(load_single_file_checkpoint(str(path), local_files_only=True))
    name = known["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.json", "*.txt", "*.model"]))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"model {path} holds neither tokenizers nor configs, and {name} is not in the local cache; "
            "give config, a diffusers folder of this architecture"
        ) from error


def _pipeline(family: type[Family], parts: Mapping[str, Sequence[str]]) -> tuple[Any, dict[str, Any]]:
    """A pipeline class, and the arguments that leave out what is not needed, or not there."""
    import diffusers

    pipeline = getattr(diffusers, family.pipeline)
    known = inspect.signature(pipeline.__init__).parameters
    absent = [name for name in _with_tokenizers(family.optional) if name not in parts]
    return pipeline, dict.fromkeys(name for name in (*_LEFT_OUT, *absent) if name in known)


def _with_tokenizers(encoders: Sequence[str]) -> list[str]:
    return [part for name in encoders for part in (name, name.replace("text_encoder", "tokenizer"))]


def _check_folder(path: Path, argument: str) -> tuple[type[Family], dict[str, Sequence[str]]]:
    """A diffusers folder's family, and each of its parts with its library and class.

    Raises:
        ValueError: if the model is not supported, or a part is missing.
    """
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{argument} {path} has an unreadable model_index.json; give a diffusers folder") from error
    family = next((family for family in FAMILIES if family.pipeline == name), None)
    if family is None:
        known = ", ".join(family.pipeline for family in FAMILIES)
        raise ValueError(f"{argument} {path} is a {name}, but it takes one of {known}")
    parts = {name: part for name, part in index.items() if isinstance(part, list) and part[0] is not None}
    absent = {part for part in _with_tokenizers(family.optional) if part not in parts}
    for part in (family.part, *_with_tokenizers(family.text_parts), "vae", "scheduler"):
        # Without this, a missing tokenizer would be an empty one.
        if part not in absent and not (path / part).is_dir():
            raise ValueError(f"{argument} {path} has no folder {part}; give a whole diffusers folder")
    return family, parts


@contextmanager
def _loading(path: Path, remedy: str) -> Iterator[None]:
    """diffusers and transformers say nothing while it is open; what they raise becomes one sentence.

    Progress bars take longer to draw than a small model to load, and diffusers warns of every autoencoder but
    AutoencoderKL; what cannot be used raises.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    refusals = (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, IndexError)
    with ExitStack() as restored, warnings.catch_warnings():
        # Newer releases of diffusers warn of `torch_dtype`, older ones know no other name for it.
        warnings.simplefilter("ignore", FutureWarning)
        for part in (diffusers_logging, transformers_logging):
            restored.callback(part.set_verbosity, part.get_verbosity())
            part.set_verbosity_error()
            if part.is_progress_bar_enabled():
                restored.callback(part.enable_progress_bar)
                part.disable_progress_bar()
        try:
            yield
        except (*refusals, SafetensorError, SingleFileComponentError) as error:
            # What diffusers advises is Python code.
            reason = " ".join(str(error).split("\nPlease")[0].split())[:400]
            raise ValueError(f"model {path} cannot be loaded ({reason}); {remedy}") from error
