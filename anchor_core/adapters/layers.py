"""Which layers of a network get an adapter: presets over the module names of diffusers and of ComfyUI."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

import regex
from torch import nn

from ..checks import shown

# attn1.to_q, attn.add_k_proj, x_block.attn.qkv, img_attn.proj; a single-stream block of Flux fuses attention and MLP.
_ATTENTION = (
    r"(^|[._])(attn\d?|attention)\.[^.]+(\.0)?$"
    r"|single_blocks\.\d+\.linear[12]$|single_transformer_blocks\.\d+\.proj_out$"
)
_FEED_FORWARD = (
    r"(^|\.)ff(_context)?\.net\.(0\.proj|2)$|(^|\.)mlp\.fc[12]$|_mlp\.(net\.)?(0|0\.proj|2)$|(^|\.)ffn\.[02]$"
    r"|single_transformer_blocks\.\d+\.proj_mlp$"
)
# The first and the last convolution are as narrow as the latents.
_NOT_OUTER = r"^(?!(conv_in|conv_out|input_blocks\.0\.0|out\.2|pos_embed\.proj|x_embedder\.proj)$)"

LAYERS = {
    "attention": _ATTENTION,
    "cross_attention_kv": r"(^|\.)(attn2\.to_[kv]|cross_attn\.[kv])$",
    "attention_feed_forward": f"{_ATTENTION}|{_FEED_FORWARD}",
    "all_linear": r".",
    "all_linear_conv": _NOT_OUTER,
}
"""Presets of `AdapterConfig.layers`: patterns over names of linear modules; `all_linear_conv` of convolutions too."""

EVERYTHING = "everything"
"""The preset that has every parameter of the denoising network, norms and embeddings too: for the kind `full`."""

_TEXT_ATTENTION = r"(^|\.)self_attn\.(q|k|v|out)_proj$"
_TEXT_LAYERS = {
    name: _TEXT_ATTENTION if name in ("attention", "cross_attention_kv") else rf"{_TEXT_ATTENTION}|(^|\.)mlp\.fc[12]$"
    for name in (*LAYERS, EVERYTHING)
}
_JOINT_ATTENTION = re.compile(r"\.attn\.add_k_proj$")


def layer_choices() -> str:
    """What `AdapterConfig.layers` takes, for an error message."""
    return f"one of {', '.join(LAYERS)}, {EVERYTHING}, or a regular expression over module names"


SECONDS = 0.5  # of the processor, for all names
LENGTH = 10_000


def compile_layers(layers: str) -> regex.Pattern[str]:
    """A preset's or the user's expression; ValueError if it is none, or longer than anybody writes one."""
    try:
        if len(layers) > LENGTH:
            raise regex.error(f"it has {len(layers)} letters")
        # As `re`, but with a time limit: some expressions never end.
        return regex.compile(layers)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"layers is {shown(layers)!r} ({shown(error)}), but it takes {layer_choices()}") from error


class ExactLayers(str):
    """An `AdapterConfig.layers` that is names of modules: as an expression, which peft takes, and as they are."""

    names: frozenset[str]


def exact_layers(names: list[str]) -> ExactLayers:
    """The `AdapterConfig.layers` that matches these module names and no others."""
    made = ExactLayers("^(" + "|".join(map(re.escape, names)) + ")$")
    made.names = frozenset(names)
    return made


def matching_names(names: Iterable[str], layers: str, prefix: str = "") -> list[str]:
    """The module names that `AdapterConfig.layers` selects.

    Args:
        names: of one network's modules, without the prefix.
        layers: a preset of `LAYERS`, or a regular expression, which is searched for in `<prefix>:<name>`.
        prefix: of a text encoder, `te1`; empty for the denoising network.
    """
    names = list(names)
    if isinstance(layers, ExactLayers):
        return [name for name in names if (f"{prefix}:{name}" if prefix else name) in layers.names]
    # SD3.5 calls its second self-attention attn2 as well.
    if layers == "cross_attention_kv" and not prefix and any(map(_JOINT_ATTENTION.search, names)):
        return []
    pattern = compile_layers((_TEXT_LAYERS if prefix else LAYERS).get(layers, layers))
    full = prefix and layers not in _TEXT_LAYERS
    end = time.monotonic() + SECONDS
    try:
        return [
            name
            for name in names
            if pattern.search(f"{prefix}:{name}" if full else name, timeout=max(end - time.monotonic(), 1e-3))
        ]
    except TimeoutError as error:
        raise ValueError(
            f"layers is {shown(layers)!r}, which takes more than a second to match the names of the layers; write an "
            "expression without a repetition of a repetition, such as (a+)+"
        ) from error


def matching_modules(network: nn.Module, layers: str, prefix: str = "") -> list[str]:
    """Names of the modules of `network` that `AdapterConfig.layers` selects.

    Raises:
        ValueError: if there is none.
    """
    names = selected_modules(network, layers, prefix)
    if not names:
        raise ValueError(_no_match(network, layers))
    return names


def matching_in_all(networks: dict[str, nn.Module], layers: str, norms: bool = False) -> dict[str, list[str]]:
    """For each network by prefix, the names that `layers` selects: a preset in each, an expression in one at least.

    Args:
        norms: whether an expression selects norms and embeddings of the denoising network as well.

    Raises:
        ValueError: if there is none.
    """
    names = {prefix: selected_modules(network, layers, prefix, norms) for prefix, network in networks.items()}
    for prefix, network in networks.items():
        if not (names[prefix] if layers in _TEXT_LAYERS else any(names.values())):
            raise ValueError(_no_match(network, layers))
    return names


def selected_modules(network: nn.Module, layers: str, prefix: str = "", norms: bool = False) -> list[str]:
    """As `matching_in_all`, of one network; empty if there is none."""
    leaves = isinstance(layers, ExactLayers) or not prefix and (layers == EVERYTHING or norms and layers not in LAYERS)
    kinds = nn.Linear if layers in _TEXT_LAYERS and layers != "all_linear_conv" else (nn.Linear, nn.Conv2d)
    parts = network.named_modules()
    names = [name for name, part in parts if (is_leaf(part) if leaves else isinstance(part, kinds))]
    return names if layers == EVERYTHING and not prefix else matching_names(names, layers, prefix)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module holds parameters and no modules: such ones hold all parameters of every supported network."""
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _no_match(network: nn.Module, layers: str) -> str:
    """The sentence that says that `layers` selects nothing."""
    if layers == "cross_attention_kv":
        return (
            f"layers is {layers!r}, but this {type(network).__name__} has no cross-attention: "
            "one attention joins picture and text; take attention"
        )
    return (
        f"layers is {layers!r}, which matches no linear or convolution module of this {type(network).__name__}, "
        f"but it takes {layer_choices()}"
    )
