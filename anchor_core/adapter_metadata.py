"""What an adapter file says of itself: the training's settings, and which base model it is for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .adapter import AdapterConfig
from .adapter_kinds import KINDS, NO_LAYERS
from .checks import check_number
from .settings import TrainSettings

if TYPE_CHECKING:
    from .data import Concept

_BASE_VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "stable-diffusion-v3-medium": "sd3",
    "flux-1-dev": "flux1",
}
"""modelspec's architecture -> kohya's `ss_base_model_version`."""


def adapter_metadata(
    denoiser: Any, concept: Concept, settings: TrainSettings, steps: int | None = None
) -> dict[str, str]:
    """Metadata of a trained adapter: `modelspec.`, kohya's `ss_`, and all settings of the training under `anchor.`.

    No date, so that the same training makes the same file.
    """
    from . import __version__

    config, made = denoiser.adapter.config, settings.steps if steps is None else steps
    architecture = getattr(denoiser, "architecture", "stable-diffusion-v1")
    diffusers_names = any("transformer_blocks" in name for name in denoiser.adapter.module_names)
    name = "textual-inversion" if config.kind == NO_LAYERS else config.kind
    modelspec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/{name}",
        "implementation": "diffusers" if diffusers_names else "https://github.com/comfyanonymous/ComfyUI",
        "title": concept.subject_prompt,
        "trigger_phrase": concept.subject_prompt,
        "resolution": _resolution(getattr(denoiser, "default_resolution", None)),
        "prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(denoiser.prediction_type),
    }
    kohya = {
        **(_kohya_network(config) if config.kind in KINDS else {}),
        "base_model_version": _BASE_VERSIONS.get(architecture),
        "learning_rate": settings.learning_rate,
        "max_train_steps": settings.steps,
        "steps": made,
        "batch_size_per_device": settings.batch_size,
        "seed": settings.seed,
    }
    anchor = {
        **{option.name: getattr(settings, option.name) for option in fields(settings)},
        **{option.name: getattr(config, option.name) for option in fields(config) if option.name != "ranks"},
        "subject_prompt": concept.subject_prompt,
        "class_prompt": concept.class_prompt,
        "steps": made,
        "base_model": base_fingerprint(denoiser),
        "version": __version__,
    }
    groups = {"modelspec.": modelspec, "ss_": kohya, "anchor.": anchor}
    return {
        f"{prefix}{name}": str(value)
        for prefix, group in groups.items()
        for name, value in group.items()
        if value is not None
    }


def embedding_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """An adapter's metadata as the file of its token vectors has it."""
    own = {key: text for key, text in metadata.items() if not key.startswith("ss_")}
    architecture = metadata["modelspec.architecture"].partition("/")[0]
    return {**own, "modelspec.architecture": f"{architecture}/textual-inversion"}


def recommended_guidance(metadata: Mapping[str, str]) -> float:
    """The scale that a file recommends for sampling, or the default; ValueError if what it says is no scale."""
    said = metadata.get("anchor.guidance", str(TrainSettings.guidance))
    try:
        return check_number("anchor.guidance", float(said), minimum=0)
    except ValueError as error:
        raise ValueError(f"the file's anchor.guidance is {said!r}, but it takes a number of at least 0") from error


def _kohya_network(config: AdapterConfig) -> dict[str, Any]:
    ranked = KINDS[config.kind].ranked
    return {
        "network_module": "networks.lora" if config.kind == "lora" else "lycoris.kohya",
        "network_args": None if config.kind == "lora" else json.dumps({"algo": config.kind}),
        "network_dim": config.rank if ranked else None,
        "network_alpha": config.alpha if ranked else None,
    }


def _resolution(size: int | tuple[int, int] | None) -> str | None:
    """modelspec's `<width>x<height>` of one side, or of (height, width)."""
    height, width = size if isinstance(size, tuple) else (size, size)
    return None if size is None else f"{width}x{height}"


def base_fingerprint(denoiser: Any) -> str:
    """16 hexadecimal digits that tell base models apart, from the first weights of each adapted module and vocabulary.

    The same for both backends, and whatever the dtype that holds the same values.
    """
    adapter, keys = denoiser.adapter, denoiser.file_keys()
    digest = hashlib.sha256()
    weights = {keys[name]: adapter.base_module(name).weight for name in adapter.module_names}
    for prefix in () if adapter.tokens is None else adapter.tokens.vectors:
        weights[f"{prefix}:tokens"] = denoiser.text_encoders[prefix].get_input_embeddings().weight
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
