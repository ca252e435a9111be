"""The door of every node: what comes in is of the types that the node declares, whoever hands it on.

ComfyUI compares the types at the two ends of a link. A constant in the place of a link, which a prompt through the API
can have, and what comes from an output of any type (`*`) reach the nodes unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..anchor_core.checks import shown
from ..anchor_core.concept import Concept
from ..anchor_core.data.pictures import References
from .types import ConceptType, HistoryRecord, HistoryType, OptionsType, ReferencesType, TrainOptions


def _of(*classes: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, classes)


def _with(*names: str) -> Callable[[Any], bool]:
    """By what the nodes use, since other packs have models and encoders of classes of their own."""
    return lambda value: all(hasattr(value, name) for name in names)


def _conditioning(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(each, list | tuple) and len(each) == 2 for each in value)
    return pairs and all(isinstance(tensor, Tensor) and isinstance(more, dict) for tensor, more in value)


def _lora(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value) and _tensors(value.values())


def _tensors(values) -> bool:
    return all(isinstance(each, Tensor) for each in values)


TYPES: dict[str, Callable[[Any], bool]] = {
    "INT": _of(Integral),
    "FLOAT": _of(Real),
    "STRING": _of(str),
    "BOOLEAN": _of(bool),
    "COMBO": _of(str),
    io.DynamicCombo.io_type: _of(str),
    "IMAGE": _of(Tensor),
    "MASK": _of(Tensor),
    "CONDITIONING": _conditioning,
    "MODEL": _with("model", "model_options", "clone"),
    "CLIP": _with("tokenize", "encode_from_tokens_scheduled"),
    "VAE": _with("encode", "decode"),
    "CLIP_VISION": _with("encode_image", "model_type"),
    "LORA_MODEL": _lora,
    ConceptType.io_type: _of(Concept),
    ReferencesType.io_type: _of(References),
    HistoryType.io_type: _of(HistoryRecord),
    OptionsType.io_type: _of(TrainOptions),
}
"""Each type that an input of the pack has: whether a value is of it."""
RANGED = io.Int.Input | io.Float.Input
MESSAGE = 1200
"""The most letters of a message; the middle of a longer one is left out."""
WIDGETS = {"INT": "a whole number", "FLOAT": "a number", "STRING": "a text", "BOOLEAN": "true or false"}
WIDGETS |= dict.fromkeys(("COMBO", io.DynamicCombo.io_type), "one of its choices")


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """`node`, whose `execute` gets inputs of the declared types, and none that is optional and None.

    Its `execute` then raises ValueError, naming the input, for any other. What it says is fit to be shown, whatever
    text of a workflow is in it.
    """
    execute = node.execute.__func__

    @wraps(execute)
    def checking(cls, **inputs: Any) -> io.NodeOutput:
        try:
            return execute(cls, **_checked(node.define_schema().inputs, inputs, node.INPUT_IS_LIST))
        except ValueError as error:
            said = shown(error, MESSAGE)
            if said == str(error):
                raise
            raise ValueError(said) from error

    node.execute = classmethod(checking)
    return node


def _checked(declared: list[io.Input], inputs: Mapping[str, Any], lists: bool, inside: str = "") -> dict[str, Any]:
    known = {each.id: each for each in declared}
    return {
        name: value if name not in known else _input(known[name], value, lists, f"{inside}{name}")
        for name, value in inputs.items()
        if name not in known or not (known[name].optional and _is_none(value, lists))
    }


def _is_none(value: Any, lists: bool) -> bool:
    if lists and not isinstance(value, Mapping):
        return len(value) > 0 and all(each is None for each in value)
    return value is None


def _input(declared: io.Input, value: Any, lists: bool, name: str) -> Any:
    combo, kind = isinstance(declared, io.DynamicCombo.Input), declared.get_io_type()
    if isinstance(value, Mapping) and (isinstance(declared, io.Autogrow.Input) or (combo and declared.id in value)):
        return _checked(declared.get_all(), value, lists, f"{name}.")
    bare = combo and "." not in name  # what a link brings: the choice itself stands inside
    for each in value if lists else (value,):
        if each is None:
            raise ValueError(
                f"{name} is empty, but it takes {_words(declared)}; connect one, from a file of its own if a "
                "checkpoint holds none"
            )
        if bare or not TYPES[kind](each) or not _in_range(declared, each):
            plain = isinstance(each, str | int | float)
            said = shown(repr(each), 60) if plain else f"of the type {type(each).__name__}"
            raise ValueError(f"{name} is {said}, but it takes {_words(declared)}; connect or choose one")
    return value


def _in_range(declared: io.Input, value: Any) -> bool:
    """ComfyUI holds what is written into a widget to its range, but not what a link brings."""
    return not isinstance(declared, RANGED) or declared.min <= value <= declared.max


def _words(declared: io.Input) -> str:
    kind = declared.get_io_type()
    if isinstance(declared, RANGED):
        return f"{WIDGETS[kind]} from {declared.min:g} to {declared.max:g}"
    return WIDGETS.get(kind, f"what an output of the type {kind} gives")
