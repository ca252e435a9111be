"""Mistakes of a training that can be seen before its run, from what its nodes say and from the header of the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import folder_paths

from ..anchor_core.checks import shown
from ..anchor_core.concept import Concept
from ..anchor_core.training.methods import check_combination
from ..anchor_core.training.purposes import DECIDED, MANUAL, SUBJECT
from .presets import chosen_for, settings_of
from .references import SANDBOX

MODELS = {
    "CheckpointLoaderSimple": ("checkpoints", "ckpt_name"),
    "ImageOnlyCheckpointLoader": ("checkpoints", "ckpt_name"),
    "UNETLoader": ("diffusion_models", "unet_name"),
}
"""Loaders whose file's header is looked at: the folder, and the widget that names the file."""

_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1",
    "sd3": "stable-diffusion-v3", "flux": "flux-1",
}  # fmt: skip
"""How modelspec's architecture of a LoRA for these families begins; the sandbox is one of SD1.x too."""


def look(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows of a training before its run.

    Args:
        said: the values of the widgets, by name, of the `training` node and of those connected to it, as far as they
            are known: `concept`, `options`, and `pictures` and `model` with the `type` of the node; `loras`, those on
            the way from the model.

    Returns:
        `family`, empty if it is not known; `chosen`, what the preset decides, as far as that is known; `mistakes`, a
        list of {"about": one of the names in `said`, "text": a sentence}.

    Raises:
        ValueError: `said` is nothing of that kind.
    """
    names = ("training", "concept", "options", "pictures", "model")
    if not isinstance(said, Mapping) or not all(isinstance(said.get(name) or {}, Mapping) for name in names):
        raise ValueError("the body is no set of nodes; it takes training, concept, options, pictures and model")
    mistakes: list[dict[str, str]] = []

    def tried(about: str, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except ValueError as error:
            mistakes.append({"about": about, "text": str(error)})
            return None

    training, concept, options, pictures, model = (dict(said.get(name) or {}) for name in names)
    words = tried("concept", lambda: _concept(concept))
    count = tried("pictures", lambda: _count(pictures))
    header = _header(model)
    preset = training.pop("preset", MANUAL)
    family = header.family if header else ""
    chosen = {}
    if preset != MANUAL and family and (count or preset != SUBJECT):
        chosen = tried("training", lambda: chosen_for(preset, family, False, count or 1, options)) or {}
    decided = chosen or ({} if preset == MANUAL else DECIDED)
    settled = tried("options" if options else "training", lambda: settings_of(training, options, decided))
    if settled is not None:
        _, settings, config, data = settled
        prompts = [] if words is None else [(words.subject_prompt, words.class_prompt)]
        tried("options", lambda: check_combination(settings, config, prompts, data.caption_dropout))
        if header is not None and (chosen or preset == MANUAL):
            tried("training", lambda: _check_rank(header, config))
    for file in said.get("loras") or ():
        tried("model", lambda file=file: _check_lora(file, family))
    return {"family": family, "chosen": chosen, "mistakes": mistakes}


def _concept(words: Mapping[str, Any]) -> Concept | None:
    wanted = ("token", "class_word", "template")
    return Concept.from_words(*(words[name] for name in wanted)) if words.keys() >= set(wanted) else None


def _count(pictures: Mapping[str, Any]) -> int | None:
    """How many there are; None if that is not known."""
    from ..anchor_core.data.folder import picture_files
    from ..anchor_core.sandbox import subjects

    name = pictures.get("references")
    if pictures.get("type") != "AnchorLoadReferences" or not isinstance(name, str):
        return None
    if name.startswith(SANDBOX):
        own = name.removeprefix(SANDBOX)
        return subjects.get(own).count if own in subjects.names() else None
    if name.startswith("["):  # no folder: pictures that the node itself holds, as a list in JSON
        return _listed(pictures.get("pictures"))
    if name not in folder_paths.get_input_subfolders():
        raise ValueError(f"references is {shown(name)!r}, which is no folder in input; choose another, or press R")
    return len(picture_files(Path(folder_paths.get_input_directory()) / name))


def _listed(text: Any) -> int | None:
    try:
        held = json.loads(text) if isinstance(text, str) and text.strip() else []
    except ValueError:
        return None
    if held == []:
        raise ValueError("pictures is empty; drop some on the node, or choose a folder as references")
    return len(held) if isinstance(held, list) else None


def _header(model: Mapping[str, Any]):
    """Of the file that a loader names; None where there is none of it, or the loader is another."""
    from ..anchor_core.backends.comfyui.headers import read_header
    from ..anchor_core.sandbox.model import WEIGHTS

    if model.get("type") == "AnchorSandboxModel":
        return read_header(WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors", "sandbox")
    folder, widget = MODELS.get(str(model.get("type")), (None, None))
    name = model.get(widget)
    if folder is None or name not in folder_paths.get_filename_list(folder):
        return None
    return read_header(Path(folder_paths.get_full_path_or_raise(folder, name)))


def _check_rank(header, config) -> None:
    from ..anchor_core.adapters.kinds import KINDS

    narrowest = header.narrowest(config.layers) if config.kind in KINDS and KINDS[config.kind].ranked else None
    if narrowest is not None and config.kind != "oft" and config.rank > narrowest[1]:
        name, width = narrowest
        raise ValueError(
            f"rank is {config.rank}, but layer {name} is {width} wide; take a rank of at most {width} or other layers"
        )


def _check_lora(file: Any, family: str) -> None:
    """ValueError if what a LoRA's file says it is for is another family."""
    from ..anchor_core.backends.comfyui.headers import read_metadata

    if family not in _ARCHITECTURES or file not in folder_paths.get_filename_list("loras"):
        return
    told = read_metadata(Path(folder_paths.get_full_path_or_raise("loras", file))).get("modelspec.architecture", "")
    known = next((name for name, begins in _ARCHITECTURES.items() if told.startswith(begins)), family)
    if known != family:
        raise ValueError(f"{file} is a LoRA for {known}, but the model is of {family}; take another model or LoRA")
