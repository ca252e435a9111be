"""The values that go from node to node, beside ComfyUI's own."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io
from torch import Tensor

CATEGORY = "anchor"
LoraModel = io.Custom("LORA_MODEL")  # ComfyUI's: file keys to tensors
LossMap = io.Custom("LOSS_MAP")  # ComfyUI's: {"loss": [a number a step]}
ConceptType = io.Custom("ANCHOR_CONCEPT")  # anchor_core.data.Concept
HistoryType = io.Custom("ANCHOR_HISTORY")  # anchor_core.trainer.History.to_dict()


class AdapterTensors(dict[str, Tensor]):
    """A LORA_MODEL that remembers the metadata of its file."""

    def __init__(self, tensors: dict[str, Tensor], metadata: dict[str, str]):
        super().__init__(tensors)
        self.metadata = metadata


def new_lora_file(name: str) -> Path:
    """A file `<name>_00001_.safetensors` under output/loras that does not exist yet.

    Raises:
        ValueError: the name leads out of that folder, or the folder cannot be written.
    """
    root = Path(folder_paths.get_output_directory()) / "loras"
    target = root / name.strip()
    if not name.strip() or target == root or not folder_paths.is_within_directory(str(root), str(target)):
        raise ValueError(f"name is {name!r}, but it takes the name of a file inside output/loras")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        taken = {file.name for file in target.parent.iterdir()}
        probe = target.parent / f".{target.name}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"{target.parent} cannot be written ({error.strerror})"
        raise ValueError(f"{reason}; free it or start ComfyUI with another --output-directory") from error
    number = next(n for n in range(1, len(taken) + 2) if f"{target.name}_{n:05}_.safetensors" not in taken)
    return target.with_name(f"{target.name}_{number:05}_.safetensors")


def lora_file(name: str) -> Path:
    """The path of a file of ComfyUI's `loras` folders; ValueError if there is none of that name."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ValueError(f"file is {name!r}, which is in no loras folder; choose one of the list")
    return Path(path)
