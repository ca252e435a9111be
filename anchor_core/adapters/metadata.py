"""What an adapter file says of itself: the training's settings, and which base model it is for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ..checks import check_number, shown
from ..guidance import RECOMMENDED_GUIDANCE


def embedding_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """An adapter's metadata as the file of its token vectors has it."""
    own = {key: text for key, text in metadata.items() if not key.startswith("ss_")}
    architecture = metadata["modelspec.architecture"].partition("/")[0]
    return {**own, "modelspec.architecture": f"{architecture}/textual-inversion"}


def stated_prompt(metadata: Mapping[str, str], which: str) -> str | None:
    """The `subject` or `class` prompt that a file states, fit to be shown; None where it states none."""
    said = metadata.get(f"anchor.{which}_prompt")
    return None if said is None else shown(said, 2000)


def told(metadata: Mapping[str, str]) -> str:
    """What a file says of itself, a line each, fit to be shown: of each entry the start and the end."""
    lines = [f"{shown(key)}: {shown(value, 1000)}" for key, value in sorted(metadata.items())]
    return "\n".join(lines[:200] + [f"... and {len(lines) - 200} more"] * (len(lines) > 200))


def recommended_guidance(metadata: Mapping[str, str]) -> float:
    """The scale that a file recommends for sampling, or the default; ValueError if what it says is no scale."""
    said = metadata.get("anchor.guidance", str(RECOMMENDED_GUIDANCE))
    try:
        return check_number("anchor.guidance", float(said), minimum=0)
    except ValueError as error:
        raise ValueError(
            f"the file's anchor.guidance is {shown(said)!r}, but it takes a number of at least 0"
        ) from error


def base_fingerprint(denoiser: Any) -> str:
    """16 hexadecimal digits that tell base models apart, from the first weights of each adapted module and vocabulary.

    The same for both backends, and whatever the dtype that holds the same values.
    """
    adapter, keys = denoiser.adapter, denoiser.file_keys()
    digest = hashlib.sha256()
    layers = {keys[name]: adapter.base_module(name) for name in adapter.module_names}
    for prefix in () if adapter.tokens is None else adapter.tokens.vectors:
        layers[f"{prefix}:tokens"] = denoiser.text_encoders[prefix].get_input_embeddings()
    for name, layer in sorted(layers.items()):
        weight = denoiser.weight_of(layer)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
