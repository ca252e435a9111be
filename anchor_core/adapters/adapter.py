"""Adapters: attach to networks, switch, scale, take off without a trace. peft does the layers of most kinds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_number
from .config import AdapterConfig
from .kinds import FILE_KINDS, KINDS, NAME, Kind, WeightKind, has_spectrum
from .layers import EVERYTHING, LAYERS, exact_layers, matching_in_all, matching_modules
from .strength import Blend, EarlyWeights
from .tokens import TokenVectors

__all__ = ["KINDS", "LAYERS", "Adapter", "AdapterConfig", "exact_layers", "matching_modules"]


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
        self.tokens: TokenVectors | None = None
        self._layers = layers
        self._were_trainable = frozen
        self._enabled = True
        self._early: EarlyWeights | None = None
        self._strength: float | Tensor = 1.0
        self._early_rows: bool | Tensor = False
        self._blends: list[Blend] = []
        self._lasting: list[Any] = []

    @classmethod
    def attach(
        cls,
        networks: Mapping[str, nn.Module] | nn.Module,
        config: AdapterConfig,
        seed: int = 0,
        keys: Mapping[str, str] | None = None,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> Adapter:
        """Put an adapter of zero effect into `networks`, in place, and freeze everything else.

        Args:
            networks: by prefix: "" for the denoising network (or this network alone), `te1`, ... for text encoders.
            config: what to attach.
            seed: of the factors that do not start at 0, drawn on the CPU. The global random state is left alone.
            keys: module name to a name that is the same in every backend (`file_keys`): the draw of a layer depends
                on the seed and on this name only, so that both backends start from the same adapter.
            vectors: (config.vectors, width) by text encoder, which the token's training starts from.

        Raises:
            ValueError: if no module matches `config.layers`, or none of the text encoders that are to be adapted, if
                one is too narrow for `config.rank`, or if an adapter is attached already; the networks are then as
                before.
        """
        networks = {"": networks} if isinstance(networks, nn.Module) else dict(networks)
        check_count("seed", seed, minimum=0)
        for network in networks.values():
            if any(map(_is_layer, network.modules())):
                raise ValueError(
                    f"this {type(network).__name__} has an adapter already; detach it before attaching another"
                )
        chosen = {}
        if config.used_kinds:
            chosen = matching_in_all(networks, config.layers, norms="full" in config.used_kinds)
            if (config.kind, config.layers) == ("svdiff", EVERYTHING):
                for prefix, names in chosen.items():
                    chosen[prefix] = [each for each in names if has_spectrum(networks[prefix].get_submodule(each))]
        if config.text_encoder and not any(names for prefix, names in chosen.items() if prefix):
            raise ValueError(
                f"text_encoder is True, but layers {config.layers!r} selects none of its layers; leave it off, or "
                "write an expression that does"
            )
        for prefix, names in chosen.items():
            for name in names:
                full_name = _full_name(prefix, name)
                if full_name not in config.ranks:
                    _kind(config, full_name).check(config, full_name, networks[prefix].get_submodule(name))
        parameters = [parameter for network in networks.values() for parameter in network.parameters()]
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        adapter = cls(networks, config, {}, trainable)
        try:
            # ComfyUI runs nodes in inference mode, where a new parameter could never be trained.
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                for prefix, names in chosen.items():
                    for kind, own in _by_kind(config, prefix, names).items():
                        vars(networks[prefix]).pop("peft_config", None)  # of the kind before
                        FILE_KINDS[kind].inject(networks[prefix], own, config, _rank_pattern(config.ranks, prefix, own))
                adapter._layers = adapter._injected(chosen)
                for name, layer in adapter._layers.items():
                    adapter.kind(name).initialise(layer, _generator(f"{seed}:{keys[name] if keys else name}"))
                if config.vectors:
                    adapter.tokens = TokenVectors(config.token, vectors)
            adapter._set_dropout(False)
            if config.detach_start:
                kv = [layer for name, layer in adapter._layers.items() if ":" not in name]
                adapter._lasting = [layer.register_forward_hook(_detach_first) for layer in kv]
        except BaseException:  # out of memory half-way, too, leaves nothing behind
            adapter._layers = adapter._injected(chosen)
            adapter.detach()
            raise
        return adapter

    def _injected(self, chosen: Mapping[str, list[str]]) -> dict[str, Any]:
        modules = {
            _full_name(prefix, name): self.networks[prefix].get_submodule(name)
            for prefix, names in chosen.items()
            for name in names
        }
        return {name: module for name, module in modules.items() if _is_layer(module)}

    @property
    def module_names(self) -> list[str]:
        """Names of the adapted modules, in the networks' order."""
        return list(self._layers)

    def base_module(self, name: str) -> nn.Module:
        """The network's own module under an adapted name."""
        return self._layers[name].get_base_layer()

    def kind(self, name: str) -> Kind | WeightKind:
        """The kind of the layer under an adapted name."""
        return _kind(self.config, name)

    def layer(self, name: str) -> Any:
        """The adapter's layer, peft's or ours, under an adapted name."""
        return self._layers[name]

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters in float32: module by module (LoRA: `down`, `up`), then the token's vectors."""
        return [factor for group in self.parameter_groups() for factor in group["params"]]

    def parameter_groups(
        self, token_learning_rate: float = 0.0, norm_learning_rate: float = 0.0
    ) -> list[dict[str, Any]]:
        """`parameters()` as an optimizer takes them: in one group, or the token's vectors, and what trains of norms,
        with rates of their own."""
        factors, norms = [], []
        for name, layer in self._layers.items():
            weight = getattr(self.base_module(name), "weight", None)
            is_norm = bool(norm_learning_rate) and weight is not None and weight.ndim == 1
            (norms if is_norm else factors).extend(factor for _, factor in self.kind(name).factors(layer))
        vectors = [] if self.tokens is None else list(self.tokens.vectors.values())
        if not token_learning_rate:
            factors, vectors = [*factors, *vectors], []
        groups = [
            {"params": factors},
            {"params": norms, "lr": norm_learning_rate},
            {"params": vectors, "lr": token_learning_rate},
        ]
        return [group for group in groups if group["params"]]

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
        kinds = {name: self.kind(name) for name in self._layers}
        self._early = EarlyWeights(kinds, self._layers, state)

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
        `lora_up.weight`), and `<module>.alpha` (a scalar) where the kind has one; `<text encoder>:tokens`."""
        state = {f"{name}.{part}": tensor for name in self._layers for part, tensor in self.parts(name).items()}
        return state if self.tokens is None else state | self.tokens.state_dict()

    def parts(self, name: str) -> dict[str, Tensor]:
        """One module's share of `state_dict()`, by part."""
        layer, kind, parts = self._layers[name], self.kind(name), {}
        for part, factor in kind.factors(layer):
            parts[part] = factor.detach().to("cpu", copy=True).contiguous()
        if kind.alpha:
            parts["alpha"] = torch.tensor(float(getattr(layer, kind.alpha)[NAME]))
        return parts

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights and alphas from a `state_dict()`; ValueError, and nothing changed, if names or shapes differ."""
        self._check_fits(state, "these weights do not fit the attached adapter")
        with torch.inference_mode(False), torch.no_grad():
            if self.tokens is not None:
                self.tokens.load_state_dict(state)
            for name, layer in self._layers.items():
                kind = self.kind(name)
                for part, factor in kind.factors(layer):
                    factor.copy_(state[f"{name}.{part}"])
                if kind.alpha:
                    alpha = float(state[f"{name}.alpha"])
                    getattr(layer, kind.alpha)[NAME] = alpha
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

    def adopt_factors(self, name: str, one: Tensor, other: Tensor) -> None:
        """Take LoKr's two full factors of a module, whose product is as large as its weight, at scale 1."""
        layer = self._layers[name]
        with torch.inference_mode(False):
            for factor, given in zip((factor for _, factor in self.kind(name).factors(layer)), (one, other)):
                factor.data = given.to(factor).clone()
            layer.alpha[NAME], layer.scaling[NAME] = float(layer.r[NAME]), 1.0

    def detach(self) -> None:
        """Give the networks back their own modules, with the `requires_grad` they had. A second call does nothing."""
        self._set_strength(1.0, False)
        for hook in self._lasting:
            hook.remove()
        for full_name, layer in self._layers.items():
            prefix, _, name = full_name.rpartition(":")
            parent, _, leaf = name.rpartition(".")
            setattr(self.networks[prefix].get_submodule(parent), leaf, layer.get_base_layer())
        for network in self.networks.values():
            vars(network).pop("peft_config", None)
        for parameter in self._were_trainable:
            parameter.requires_grad_(True)
        self.networks, self._layers, self._were_trainable, self._lasting, self.tokens = {}, {}, [], [], None


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is an adapter's, peft's or ours, around one of the network's."""
    return hasattr(module, "get_base_layer")


def _detach_first(layer: Any, inputs: tuple, output: Tensor) -> Tensor:
    """Keys or values (B, tokens, channels) without a gradient by the first token's."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)


def _full_name(prefix: str, name: str) -> str:
    return f"{prefix}:{name}" if prefix else name


def _kind(config: AdapterConfig, name: str) -> Kind | WeightKind:
    return FILE_KINDS[config.kind_of(name)]


def _by_kind(config: AdapterConfig, prefix: str, names: list[str]) -> dict[str, list[str]]:
    """A network's module names by their kind."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(config.kind_of(_full_name(prefix, name)), []).append(name)
    return groups


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
