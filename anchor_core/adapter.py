"""Adapters: attach to networks, switch, scale, take off without a trace. peft does the layers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_kinds import KINDS, NAME
from .adapter_layers import LAYERS, exact_layers, layer_choices, matching_in_all, matching_modules
from .adapter_strength import Blend, EarlyWeights
from .checks import check_count, check_number, check_options, option

__all__ = ["KINDS", "LAYERS", "Adapter", "AdapterConfig", "exact_layers", "matching_modules"]


@dataclass(frozen=True)
class AdapterConfig:
    """What to attach.

    Args:
        rank: of the update, at least 1 and at most the width of each layer. LoKr: of the second factor of the
            Kronecker product (the first is about 8 x 8; a second one no wider than 2 rank is a full matrix). LoHa: of
            each of the two products. OFT: channels of a block, which divide every layer's input.
        alpha: the update is multiplied by alpha / rank; None means `rank`. OFT has none.
        dropout: while training, in [0, 1). LoRA and DoRA: of the input of the update. LoKr and LoHa: of its output
            rows. OFT has none.
        layers: a preset of `LAYERS`, or a regular expression that is searched for in the names of the networks'
            linear and convolution modules.
        kind: of `KINDS`: lora, dora, lokr, loha, oft.
        text_encoder: adapt the text encoders as well.
        ranks: by module name, where it is not `rank`: that of a file whose layers differ.
    """

    rank: int = option(8, "width of the update: its capacity")
    alpha: float | None = option(None, "the update counts alpha / rank; none means rank")
    dropout: float = option(0.0, "share of the update's inputs left out in training", minimum=0, below=1)
    layers: str = option("attention", f"{', '.join(LAYERS)}, or a regular expression over the names of layers")
    kind: str = option("lora", "of the adapter", choices=tuple(KINDS))
    text_encoder: bool = option(False, "adapt the text encoders too; the anchor keeps the pretrained ones")
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(check_count("rank", self.rank)))
        check_options(self)
        check_number("alpha", self.alpha, above=0)
        if self.kind == "oft" and self.dropout:
            raise ValueError(f"dropout is {self.dropout!r}, but with kind 'oft' it takes 0: a rotation has no dropout")
        if not isinstance(self.layers, str) or not self.layers:
            raise ValueError(f"layers is {self.layers!r}, but it takes {layer_choices()}")
        try:
            re.compile(self.layers)
        except re.error as error:
            raise ValueError(f"layers is {self.layers!r} ({error}), but it takes {layer_choices()}") from error

    @property
    def trains_text(self) -> bool:
        """Whether prompts are encoded otherwise with the adapter than without it."""
        return self.text_encoder


class Adapter:
    """One adapter in one or several networks, made by `Adapter.attach`.

    Modules of the denoising network go by their own names, those of a text encoder by `te1:<name>`. With the adapter
    off the networks run their own modules alone, so the output is exactly the untouched networks'.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        config: AdapterConfig,
        layers: dict[str, Any],
        frozen: list[nn.Parameter],
    ):
        self.networks = networks
        self.config = config
        self._kind = KINDS[config.kind]
        self._layers = layers
        self._were_trainable = frozen
        self._enabled = True
        self._early: EarlyWeights | None = None
        self._strength: float | Tensor = 1.0
        self._early_rows: bool | Tensor = False
        self._blends: list[Blend] = []

    @classmethod
    def attach(
        cls,
        networks: Mapping[str, nn.Module] | nn.Module,
        config: AdapterConfig,
        seed: int = 0,
        keys: Mapping[str, str] | None = None,
    ) -> Adapter:
        """Put an adapter of zero effect into `networks`, in place, and freeze everything else.

        Args:
            networks: by prefix: "" for the denoising network (or this network alone), `te1`, ... for text encoders.
            config: what to attach.
            seed: of the factors that do not start at 0, drawn on the CPU. The global random state is left alone.
            keys: module name to a name that is the same in every backend (`file_keys`): the draw of a layer depends
                on the seed and on this name only, so that both backends start from the same adapter.

        Raises:
            ValueError: if no module matches `config.layers`, if one is too narrow for `config.rank`, or if an adapter
                is attached already; the networks are then as before.
        """
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        networks = {"": networks} if isinstance(networks, nn.Module) else dict(networks)
        check_count("seed", seed, minimum=0)
        for network in networks.values():
            if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
                raise ValueError(
                    f"this {type(network).__name__} has an adapter already; detach it before attaching another"
                )
        kind, chosen = KINDS[config.kind], matching_in_all(networks, config.layers)
        for prefix, names in chosen.items():
            for name in names:
                if _full_name(prefix, name) not in config.ranks:
                    kind.check(config, _full_name(prefix, name), networks[prefix].get_submodule(name))
        parameters = [parameter for network in networks.values() for parameter in network.parameters()]
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        adapter = cls(networks, config, {}, trainable)
        try:
            # ComfyUI runs nodes in inference mode, where a new parameter could never be trained.
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                for prefix, names in chosen.items():
                    shared = {
                        "r": config.rank,
                        "target_modules": exact_layers(names),
                        "rank_pattern": _rank_pattern(config.ranks, prefix, names),
                    }
                    if names:
                        inject_adapter_in_model(kind.peft_config(config, shared), networks[prefix], adapter_name=NAME)
                adapter._layers = adapter._injected(chosen)
                for name, layer in adapter._layers.items():
                    kind.initialise(layer, _generator(f"{seed}:{keys[name] if keys else name}"))
            adapter._set_dropout(False)
        except BaseException:  # out of memory half-way, too, leaves nothing behind
            adapter._layers = adapter._injected(chosen)
            adapter.detach()
            raise
        return adapter

    def _injected(self, chosen: Mapping[str, list[str]]) -> dict[str, Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        modules = {
            _full_name(prefix, name): self.networks[prefix].get_submodule(name)
            for prefix, names in chosen.items()
            for name in names
        }
        return {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}

    @property
    def module_names(self) -> list[str]:
        """Names of the adapted modules, in the networks' order."""
        return list(self._layers)

    def base_module(self, name: str) -> nn.Module:
        """The network's own module under an adapted name."""
        return self._layers[name].get_base_layer()

    def layer(self, name: str) -> Any:
        """peft's layer under an adapted name."""
        return self._layers[name]

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, module by module (LoRA: `down`, `up`), in float32."""
        return [factor for layer in self._layers.values() for _, factor in self._kind.factors(layer)]

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
        """The untouched networks while it is open."""
        before = self._enabled
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def scaled(self, strength: float | Tensor, early: bool | Tensor = False) -> Iterator[None]:
        """The weights W + strength (W_adapted - W), for every kind, while it is open.

        Args:
            strength: 1 as trained, 0 the base model; of the whole batch, or of each row, (B,). Inside another `scaled`
                it multiplies that one's.
            early: whether the weights of `hold_early` stand in for the adapter's; for each row, (B,), if a tensor.

        Raises:
            ValueError: here, if `early` asks for weights that are not held; by a layer, if it runs another number of
                rows than the strengths are for.
        """
        if not isinstance(strength, Tensor):
            strength = check_number("strength", strength)
        elif strength.ndim != 1:
            raise ValueError(f"strength is {tuple(strength.shape)}, but it takes a number, or one for each row, (B,)")
        early = early | self._early_rows
        if self._early is None and torch.as_tensor(early).any():
            raise ValueError("early is true, but the adapter holds no early checkpoint; give it one by hold_early")
        before = self._strength, self._early_rows
        self._set_strength(strength * self._strength, early)
        try:
            yield
        finally:
            self._set_strength(*before)

    def _set_strength(self, strength: float | Tensor, early: bool | Tensor) -> None:
        self._strength, self._early_rows = strength, early
        while self._blends:
            self._blends.pop().remove()
        rows = early.nonzero().flatten() if isinstance(early, Tensor) else early
        if isinstance(strength, Tensor) or strength != 1 or early is not False:
            layers = self._layers.items()
            self._blends = [Blend(name, layer, strength, rows, self._early) for name, layer in layers]

    def hold_early(self, state: Mapping[str, Tensor]) -> None:
        """Hold the weights of an early checkpoint of this adapter, a `state_dict()`, for `scaled`.

        Raises:
            ValueError: if names or shapes differ from the adapter's own.
        """
        self._check_fits(state, "the early checkpoint does not fit the attached adapter")
        self._early = EarlyWeights(self._kind, self._layers, state)

    @property
    def holds_early(self) -> bool:
        return self._early is not None

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
            layer.training = active  # not `train`, which would reach the base module
            for part in getattr(layer, "lora_dropout", {}).values():
                part.train(active)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU: `<module>.<part>` for each part of the kind (LoRA: `lora_down.weight`,
        `lora_up.weight`), and `<module>.alpha` (a scalar) where the kind has one."""
        return {f"{name}.{part}": tensor for name in self._layers for part, tensor in self.parts(name).items()}

    def parts(self, name: str) -> dict[str, Tensor]:
        """One module's share of `state_dict()`, by part."""
        layer, parts = self._layers[name], {}
        for part, factor in self._kind.factors(layer):
            parts[part] = factor.detach().to("cpu", copy=True).contiguous()
        if self._kind.alpha:
            parts["alpha"] = torch.tensor(float(getattr(layer, self._kind.alpha)[NAME]))
        return parts

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights and alphas from a `state_dict()`; ValueError, and nothing changed, if names or shapes differ."""
        self._check_fits(state, "these weights do not fit the attached adapter")
        with torch.inference_mode(False), torch.no_grad():
            for name, layer in self._layers.items():
                for part, factor in self._kind.factors(layer):
                    factor.copy_(state[f"{name}.{part}"])
                if self._kind.alpha:
                    alpha = float(state[f"{name}.alpha"])
                    getattr(layer, self._kind.alpha)[NAME] = alpha
                    layer.scaling[NAME] = alpha / layer.r[NAME]

    def _check_fits(self, state: Mapping[str, Tensor], message: str) -> None:
        """ValueError that begins with `message` if the names or shapes of `state` are not those of `state_dict()`."""
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
            raise ValueError(f"{message}: {'; '.join(wrong[:3])}{more}")

    def adopt_factors(self, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take LoKr's two full factors of each module, of whatever shapes, at scale 1.

        Raises:
            ValueError: if a product is not as large as the module's weight.
        """
        with torch.inference_mode(False):
            for name, layer in self._layers.items():
                one, other = layers[name]["lokr_w1"], layers[name]["lokr_w2"]
                made = (one.shape[0] * other.shape[0], one.shape[1] * other[0].numel())
                weight = layer.get_base_layer().weight
                if made != (weight.shape[0], weight[0].numel()):
                    raise ValueError(f"{name} is {tuple(weight.shape)} here and {made} there")
                for part, factor in self._kind.factors(layer):
                    factor.data = layers[name][part].to(factor).clone()
                layer.alpha[NAME], layer.scaling[NAME] = float(layer.r[NAME]), 1.0

    def detach(self) -> None:
        """Give the networks back their own modules, with the `requires_grad` they had. A second call does nothing."""
        self._set_strength(1.0, False)
        for full_name, layer in self._layers.items():
            prefix, _, name = full_name.rpartition(":")
            parent, _, leaf = name.rpartition(".")
            setattr(self.networks[prefix].get_submodule(parent), leaf, layer.get_base_layer())
        for network in self.networks.values():
            vars(network).pop("peft_config", None)
        for parameter in self._were_trainable:
            parameter.requires_grad_(True)
        self.networks, self._layers, self._were_trainable = {}, {}, []


def _full_name(prefix: str, name: str) -> str:
    return f"{prefix}:{name}" if prefix else name


def _rank_pattern(ranks: Mapping[str, int], prefix: str, names: list[str]) -> dict[str, int]:
    """peft's, with one pattern for each rank: it tries every pattern on every module."""
    groups: dict[int, list[str]] = {}
    for name in names:
        if _full_name(prefix, name) in ranks:
            groups.setdefault(ranks[_full_name(prefix, name)], []).append(re.escape(name))
    return {f"^({'|'.join(group)})": rank for rank, group in groups.items()}


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
