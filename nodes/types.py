"""The values that go from node to node, beside ComfyUI's own."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from torch import Tensor

CATEGORY = "anchor"
CONNECTED = "[connected lora]"
LoraModel = io.Custom("LORA_MODEL")  # ComfyUI's: file keys to tensors
LossMap = io.Custom("LOSS_MAP")  # ComfyUI's: {"loss": [a number a step]}
ConceptType = io.Custom("ANCHOR_CONCEPT")  # anchor_core.concept.Concept
HistoryType = io.Custom("ANCHOR_HISTORY")  # HistoryRecord
ReferencesType = io.Custom("ANCHOR_REFERENCES")  # anchor_core.data.pictures.References
OptionsType = io.Custom("ANCHOR_TRAIN_OPTIONS")  # TrainOptions


class HistoryRecord(dict[str, Any]):
    """`anchor_core.training.history.History.to_dict()`, told from a constant of a prompt by its class."""


class TrainOptions(dict[str, Any]):
    """Names of TrainSettings, AdapterConfig and DataSettings to values, told from a constant by its class."""


class AdapterTensors(dict[str, Tensor]):
    """A LORA_MODEL that remembers the metadata of its file, and the token vectors that were trained with it."""

    def __init__(
        self, tensors: dict[str, Tensor], metadata: dict[str, str], embedding: dict[str, Tensor] | None = None
    ):
        super().__init__(tensors)
        self.metadata = metadata
        self.embedding = embedding
        self.file = ""  # what messages call it; empty for "lora"


def one_each(inputs: Mapping[str, Any], lists: Collection[str] = ()) -> dict[str, Any]:
    """The inputs of a node with `is_input_list`, as other nodes have them: one value each, but for those in `lists`.

    Other nodes run once for each entry of a list that reaches them.

    Raises:
        ValueError: an input that is not in `lists` has several values.
    """
    single = {}
    for name, values in inputs.items():
        if name in lists:
            single[name] = values
        elif isinstance(values, Mapping):  # of a dynamic input
            single[name] = one_each(values)
        elif values is None or len(values) == 1:
            single[name] = None if values is None else values[0]
        else:
            raise ValueError(f"{name} is a list of {len(values)}, but it takes one; connect a single value")
    return single


def inputs_of(
    kind: type, names: Iterable[str], optional: bool = False, advanced: bool = False, **texts: str
) -> list[io.Input]:
    """The node inputs of a settings class's fields; `texts` replaces the tooltip of a field.

    Those that are `advanced` are folded away until they are asked for.
    """
    declared = {field.name: field for field in fields(kind)}
    options = {"optional": optional} | ({"advanced": True} if advanced else {})
    return [_input(declared[name], texts.get(name), options) for name in names]


def seed_input(tooltip: str) -> io.Input:
    return io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True, tooltip=tooltip)


def _input(field: Field, text: str | None, options: dict[str, Any]) -> io.Input:
    options = {"default": field.default, "tooltip": _sentence(text or field.metadata["help"])} | options
    if "choices" in field.metadata:
        return io.Combo.Input(field.name, options=list(field.metadata["choices"]), **options)
    if isinstance(field.default, bool):
        return io.Boolean.Input(field.name, **options)
    if isinstance(field.default, int):
        return io.Int.Input(field.name, min=field.metadata.get("minimum", 1), max=100_000, **options)
    if isinstance(field.default, str):
        return io.String.Input(field.name, **options)
    lowest = field.metadata.get("minimum", 0.0 if "above" in field.metadata else -100.0)
    step = 1e-6 if field.name.endswith(("learning_rate", "coft")) else 0.05
    return io.Float.Input(
        field.name, min=lowest, max=field.metadata.get("below", 1e6), step=step, round=1e-6, **options
    )


def _sentence(text: str) -> str:
    """The help of an option as a tooltip; the name of a choice that it begins with stays as it is written."""
    begins = text if text.split()[0].endswith(":") else text[0].upper() + text[1:]
    return f"{begins}."


def new_lora_file(name: str) -> Path:
    """A file `<name>_00001_.safetensors` under output/loras that does not exist yet.

    Raises:
        ValueError: the name leads out of that folder, or the folder cannot be written.
    """
    return _new_file(Path(folder_paths.get_output_directory()) / "loras", name)


def new_embedding_file(name: str) -> Path:
    """As `new_lora_file`, in the first folder where ComfyUI looks for `embedding:name`; none is below output.

    Raises:
        ValueError: also for a name that ComfyUI would not read to its end in a prompt.
    """
    odd = re.search(r"[\s<>\[\](){}\\]", name.strip())
    if odd:
        raise ValueError(f"name is {name!r}, but prompts read embedding:name up to {odd[0]!r}; take letters, - and _")
    return _new_file(Path(folder_paths.get_folder_paths("embeddings")[0]), name)


def embedding_word(path: Path) -> str:
    """What stands in a prompt for an embedding file of that folder."""
    root = Path(folder_paths.get_folder_paths("embeddings")[0])
    return f"embedding:{path.relative_to(root).with_suffix('').as_posix()}"


def _new_file(root: Path, name: str) -> Path:
    target = root / name.strip()
    if not name.strip() or target == root or not folder_paths.is_within_directory(str(root), str(target)):
        raise ValueError(f"name is {name!r}, but it takes the name of a file inside {root}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        taken = {file.name for file in target.parent.iterdir()}
        probe = target.parent / f".{target.name}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"name is {name!r}, but {target.parent} cannot be written ({error.strerror})"
        raise ValueError(f"{reason}; take another name, or start ComfyUI with other folders") from error
    number = next(n for n in range(1, len(taken) + 2) if f"{target.name}_{n:05}_.safetensors" not in taken)
    return target.with_name(f"{target.name}_{number:05}_.safetensors")


def lora_file(name: str) -> Path:
    """The path of a file of ComfyUI's `loras` folders; ValueError if there is none of that name."""
    return _listed_file("loras", name)


def embedding_file(name: str, input: str = "file") -> Path:
    """The path of a file of ComfyUI's `embeddings` folders; ValueError, naming the input, if there is none."""
    return _listed_file("embeddings", name, input)


def _listed_file(folder: str, name: str, input: str = "file") -> Path:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(f"{input} is {name!r}, which is in no {folder} folder; choose one of the list")
    return Path(path)


def lora_inputs() -> list[io.Input]:
    """`strength`, and a LoRA as `file` or as `lora`."""
    return [
        io.Float.Input(
            "strength",
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.05,
            tooltip="1 as trained, 0 the model without it. Lower it if pictures lose the prompt or look burnt: 0.7.",
        ),
        io.Combo.Input(
            "file",
            options=[CONNECTED, *folder_paths.get_filename_list("loras")],
            default=CONNECTED,
            tooltip="A file of the loras folders, or the LoRA that is connected. A new file shows after pressing R.",
        ),
        LoraModel.Input("lora", optional=True, tooltip="The LoRA, where no file is chosen."),
    ]


def lora_state(file: str) -> int | None:
    """What changes when the chosen file does."""
    return None if file == CONNECTED else lora_file(file).stat().st_mtime_ns


def chosen_lora(file: str, lora: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of the chosen file, or the connected ones; ValueError if there are neither."""
    from ..anchor_core.adapters.file import load_adapter

    if file != CONNECTED:
        tensors = AdapterTensors(*load_adapter(lora_file(file)))
        tensors.file = file
        return tensors
    if lora is None:
        raise ValueError("no LoRA is connected and no file is chosen; connect one or choose one")
    return checked_lora("lora", lora)


def checked_lora(name: str, lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a connected LoRA; ValueError if there are none, or NaN among them."""
    from ..anchor_core.adapters.reading import checked

    if not lora:
        raise ValueError(f"{name} holds no tensor; connect a LoRA that was trained")
    return AdapterTensors(checked(lora, name), getattr(lora, "metadata", None) or {}, getattr(lora, "embedding", None))
