"""The files of a training: the adapter, its token vectors, and what they say of how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..adapters.config import AdapterConfig
from ..adapters.file import EMBEDDING_FILE, load_adapter, save_adapter, saving_adapter, to_file_keys
from ..adapters.formats import DIFFUSERS_PREFIXES, convert
from ..adapters.kinds import KINDS, NO_LAYERS
from ..adapters.metadata import base_fingerprint, embedding_metadata
from ..adapters.tokens import to_embedding
from ..concept import Concept
from ..writing import claimed
from .precision import resolve
from .provenance import device_name, versions
from .settings import TrainSettings

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
    settings = resolve(settings, denoiser)
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
        **{option.name: getattr(config, option.name) for option in fields(config) if "help" in option.metadata},
        "subject_prompt": concept.subject_prompt,
        "class_prompt": concept.class_prompt,
        "steps": made,
        "base_model": base_fingerprint(denoiser),
        "version": __version__,
        "versions": json.dumps(versions()),
        "device": device_name(denoiser.device),
        "dtype": str(denoiser.compute_dtype).removeprefix("torch."),
    }
    groups = {"modelspec.": modelspec, "ss_": kohya, "anchor.": anchor}
    return {
        f"{prefix}{name}": str(value)
        for prefix, group in groups.items()
        for name, value in group.items()
        if value is not None
    }


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


@dataclass(frozen=True)
class Files:
    """Where a training writes: `adapter`, and `embedding` for token vectors that are trained beside layers.

    Args:
        new: what has come there meanwhile is not overwritten: the next number is taken, as `claimed` does.
    """

    adapter: Path
    embedding: Path
    new: bool = False

    @classmethod
    def beside(cls, adapter: Path) -> Files:
        """The token vectors in `embedding.safetensors` beside the adapter."""
        return cls(adapter, adapter.with_name(EMBEDDING_FILE))

    def at(self, step: int) -> Files:
        """Files of their own for the weights after `step` steps."""
        adapter, embedding = (
            path.with_stem(f"{path.stem.rstrip('_')}_step{step:06}") for path in (self.adapter, self.embedding)
        )
        return Files(adapter, embedding, self.new)


@dataclass(frozen=True)
class Trained:
    """An adapter as its file has it: tensors on the CPU, metadata, and the token vectors that it was trained with."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    vectors: Mapping[str, Tensor] | None

    @classmethod
    def of(cls, denoiser: Any, concept: Concept, settings: TrainSettings, steps: int | None = None) -> Trained:
        """The adapter attached to `denoiser`; `steps` if fewer than planned were made."""
        adapter = denoiser.adapter
        metadata = adapter_metadata(denoiser, concept, settings, steps)
        tensors = to_file_keys(adapter, denoiser.file_keys())
        if adapter.config.kind == "full" and any(name.startswith(DIFFUSERS_PREFIXES) for name in tensors):
            # Nothing reads these in diffusers' names: its own loaders take no `diff`, the stock one not all of them.
            tensors = convert(tensors, metadata, to="comfyui")
        return cls(tensors, metadata, None if adapter.tokens is None else to_embedding(adapter.tokens))

    @classmethod
    def read(cls, files: Sequence[Path]) -> Trained:
        """What `save` wrote to these; ValueError if it cannot be read."""
        tensors, metadata = load_adapter(files[0])
        vectors = load_adapter(files[1])[0] if len(files) > 1 else None
        return cls(tensors, metadata, tensors if metadata.get("anchor.kind") == NO_LAYERS else vectors)

    def save(self, files: Files) -> tuple[Path, ...]:
        """Write them, whole and both or none; gives the files that were written, the adapter's first.

        Raises:
            ValueError: if one cannot be written.
        """
        place = claimed if files.new else nullcontext
        if self.vectors is None or self.vectors.keys() == self.tensors.keys():
            with place(files.adapter) as adapter:
                save_adapter(adapter, self.tensors, self.metadata)
            return (adapter,)
        with (
            place(files.adapter) as adapter,
            place(files.embedding) as embedding,
            saving_adapter(adapter, self.tensors, self.metadata),
        ):
            save_adapter(embedding, self.vectors, embedding_metadata(self.metadata))
        return adapter, embedding


def save_trained(
    path: str | Path, denoiser: Any, concept: Concept, settings: TrainSettings, steps: int | None = None
) -> list[Path]:
    """Write the adapter attached to `denoiser` with what it was trained on, and its token vectors beside it.

    Args:
        steps: if fewer than planned were made.

    Returns:
        the files: of the adapter, and of the embedding where it is another.
    """
    return list(Trained.of(denoiser, concept, settings, steps).save(Files.beside(Path(path))))
