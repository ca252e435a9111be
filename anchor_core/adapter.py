"""Adapters: attach to a network, switch, scale, take off without a trace. peft does the layers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_choice, check_count, check_number

_ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)"
LAYERS = {
    "attention": rf"(^|\.){_ATTENTION}$",
    "cross_attention_kv": r"(^|\.)attn2\.(to_k|to_v)$",
    "attention_feed_forward": rf"(^|\.)({_ATTENTION}|ff\.net\.(0\.proj|2))$",
    "all_linear": r".",
}
"""Presets of `AdapterConfig.layers`: patterns over the leaf names that diffusers and ComfyUI share."""

KINDS = ("lora",)
_NAME = "anchor"  # peft's name for the one adapter


@dataclass(frozen=True)
class AdapterConfig:
    """What to attach.

    Args:
        rank: of the update, at least 1.
        alpha: the update is alpha / rank * up @ down; None means `rank`.
        dropout: of the input of the update while training, in [0, 1).
        layers: a preset of `LAYERS`, or a regular expression that is searched for in the names of the network's
            linear and convolution modules.
        kind: `lora`.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    layers: str = "attention"
    kind: str = "lora"

    def __post_init__(self):
        check_count("rank", self.rank)
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        check_number("alpha", self.alpha, above=0)
        if check_number("dropout", self.dropout, minimum=0) >= 1:
            raise ValueError(f"dropout is {self.dropout!r}, but it takes a number from 0 to below 1")
        check_choice("kind", self.kind, KINDS)
        if not isinstance(self.layers, str) or not self.layers:
            raise ValueError(f"layers is {self.layers!r}, but it takes {_layer_choices()}")
        try:
            re.compile(self.layers)
        except re.error as error:
            raise ValueError(f"layers is {self.layers!r} ({error}), but it takes {_layer_choices()}") from error


def _layer_choices() -> str:
    return f"one of {', '.join(LAYERS)}, or a regular expression over module names"


def exact_layers(names: list[str]) -> str:
    """The `AdapterConfig.layers` that matches these module names and no others."""
    return "^(" + "|".join(map(re.escape, names)) + ")$"


def matching_modules(network: nn.Module, layers: str) -> list[str]:
    """Names of the modules of `network` that `AdapterConfig.layers` selects; ValueError if there is none."""
    pattern = re.compile(LAYERS.get(layers, layers))
    kinds = nn.Linear if layers in LAYERS else (nn.Linear, nn.Conv2d)
    names = [name for name, module in network.named_modules() if isinstance(module, kinds) and pattern.search(name)]
    if not names:
        raise ValueError(
            f"layers is {layers!r}, which matches no linear or convolution module of this {type(network).__name__}, "
            f"but it takes {_layer_choices()}"
        )
    return names


class Adapter:
    """One low-rank adapter in a network, made by `Adapter.attach`.

    With the adapter off the network runs its own modules alone, so the output is exactly the untouched network's.
    """

    def __init__(self, network: nn.Module, config: AdapterConfig, layers: dict[str, Any], frozen: list[nn.Parameter]):
        self.network = network
        self.config = config
        self._layers = layers
        self._were_trainable = frozen
        self._enabled = True
        self._strength = 1.0

    @classmethod
    def attach(
        cls, network: nn.Module, config: AdapterConfig, seed: int = 0, keys: Mapping[str, str] | None = None
    ) -> Adapter:
        """Put an adapter of zero effect into `network`, in place, and freeze everything else.

        Args:
            network: the denoising network, without an adapter.
            config: what to attach.
            seed: of the `down` matrices, drawn on the CPU from N(0, 1 / rank^2) (the `gaussian` of diffusers'
                DreamBooth script); `up` is 0. The global random state is left alone.
            keys: module name to a name that is the same in every backend (`file_keys`): the draw of a layer depends
                on the seed and on this name only, so that both backends start from the same adapter.

        Raises:
            ValueError: if no module matches `config.layers`, or if an adapter is attached already.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        check_count("seed", seed, minimum=0)
        if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
            raise ValueError(
                f"this {type(network).__name__} has an adapter already; detach it before attaching another"
            )
        names = matching_modules(network, config.layers)
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=exact_layers(names),
            init_lora_weights=False,
        )
        # ComfyUI runs nodes in inference mode, where a new parameter could never be trained.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(lora, network, adapter_name=_NAME)
            layers = {name: network.get_submodule(name) for name in names}
            for name, layer in layers.items():
                _initialise(layer, config, f"{seed}:{keys[name] if keys else name}")
        return cls(network, config, layers, trainable)

    @property
    def module_names(self) -> list[str]:
        """Names of the adapted modules, in the network's order."""
        return list(self._layers)

    def base_module(self, name: str) -> nn.Module:
        """The network's own module under an adapted name."""
        return self._layers[name].get_base_layer()

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, `down` and `up` of each module in turn, in float32."""
        return [part.weight for layer in self._layers.values() for part in (layer.lora_A[_NAME], layer.lora_B[_NAME])]

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(bool(value))
        self._enabled = bool(value)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched network while it is open."""
        before = self._enabled
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        """The update times `strength` (1 as trained, 0 the base model) while it is open."""
        before = self._strength
        self._set_strength(check_number("strength", strength))
        try:
            yield
        finally:
            self._set_strength(before)

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """The config's dropout is active while it is open, and only then."""
        self._set_dropout(True)
        try:
            yield
        finally:
            self._set_dropout(False)

    def _set_dropout(self, active: bool) -> None:
        for layer in self._layers.values():
            layer.lora_dropout[_NAME].train(active)

    def _set_strength(self, strength: float) -> None:
        self._strength = strength
        for layer in self._layers.values():
            layer.scaling[_NAME] = strength * layer.lora_alpha[_NAME] / layer.r[_NAME]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU: `<module>.lora_down.weight`, `<module>.lora_up.weight`, `<module>.alpha` (a scalar)."""
        state = {}
        for name, layer in self._layers.items():
            for key, part in (("lora_down", layer.lora_A), ("lora_up", layer.lora_B)):
                state[f"{name}.{key}.weight"] = part[_NAME].weight.detach().to("cpu", copy=True).contiguous()
            state[f"{name}.alpha"] = torch.tensor(float(layer.lora_alpha[_NAME]))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights and alphas from a `state_dict()`; ValueError, and nothing changed, if names or shapes differ."""
        own = self.state_dict()
        wrong = [f"{name} is missing" for name in own if name not in state]
        wrong += [f"{name} is unknown" for name in state if name not in own]
        wrong += [
            f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"these weights do not fit the attached adapter: {'; '.join(wrong[:3])}{more}")
        with torch.inference_mode(False), torch.no_grad():
            for name, layer in self._layers.items():
                layer.lora_A[_NAME].weight.copy_(state[f"{name}.lora_down.weight"])
                layer.lora_B[_NAME].weight.copy_(state[f"{name}.lora_up.weight"])
                layer.lora_alpha[_NAME] = float(state[f"{name}.alpha"])
        self._set_strength(self._strength)

    def detach(self) -> None:
        """Give the network back its own modules, with the `requires_grad` they had. A second call does nothing."""
        for name, layer in self._layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.network.get_submodule(parent), leaf, layer.get_base_layer())
        if self._layers:
            del self.network.peft_config
        for parameter in self._were_trainable:
            parameter.requires_grad_(True)
        self._layers, self._were_trainable = {}, []


def _initialise(layer: Any, config: AdapterConfig, name: str) -> None:
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    down, up = layer.lora_A[_NAME], layer.lora_B[_NAME]
    down.float()
    up.float()
    with torch.no_grad():
        down.weight.copy_(torch.randn(down.weight.shape, generator=generator) / config.rank)
        up.weight.zero_()
    layer.lora_dropout[_NAME].train(False)
