"""The kinds of adapter: how the layers of each are made, what they train, and where the training starts.

A new kind is one entry of `KINDS`. Every kind starts at zero effect. peft makes the layers of most.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .layers import exact_layers
from .weight_kinds import FullLayer, SpectralLayer, WeightLayer

NAME = "anchor"  # peft's name for the one adapter
KRONECKER_FACTOR = 8


class Options(Protocol):
    """What a kind reads of an `AdapterConfig`, which takes its choices from here."""

    kind: str
    rank: int
    alpha: float
    dropout: float
    coft: float


Start = Callable[[Any, torch.Size, torch.Generator], Tensor]


@dataclass(frozen=True)
class Kind:
    """One kind of adapter, of peft's.

    Args:
        peft_config: of an `AdapterConfig` and the options that all kinds share.
        parts: peft's attribute of a layer -> (the tensor's name in state dicts and files, its start), in the order
            of the draws. A layer need not have all of them.
        alpha: peft's attribute of a layer that holds alpha; None if the kind has none.
        check: raises ValueError if a module of this name cannot take the config.
        reads_weights: whether a layer computes with the module's own weight, beside what the module makes of it.
        ranked: whether `rank` and `alpha` mean anything to it.
    """

    peft_config: Callable[[Options, dict[str, Any]], Any]
    parts: Mapping[str, tuple[str, Start]]
    alpha: str | None
    check: Callable[[Options, str, nn.Module], None]
    reads_weights: bool = False
    ranked: bool = True

    def inject(self, network: nn.Module, names: list[str], config: Options, ranks: dict[str, int]) -> None:
        """Put a layer around each of these modules; `ranks` is peft's `rank_pattern`."""
        from peft import inject_adapter_in_model

        shared = {"r": config.rank, "target_modules": exact_layers(names), "rank_pattern": ranks}
        inject_adapter_in_model(self.peft_config(config, shared), network, adapter_name=NAME)
        if config.coft:
            for name in names:
                # peft divides by the root of the blocks, but does not multiply by their area.
                blocks = network.get_submodule(name).oft_R[NAME]
                blocks.coft, blocks.eps = True, config.coft * blocks.block_size**2

    def factors(self, layer: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters of a layer of peft's, by name."""
        for attribute, (part, _) in self.parts.items():
            held = getattr(layer, attribute)
            if NAME in held:
                yield part, held[NAME] if isinstance(held[NAME], nn.Parameter) else held[NAME].weight

    def initialise(self, layer: Any, generator: torch.Generator) -> None:
        """Give a new layer its start, in float32."""
        starts = dict(self.parts.values())
        with torch.no_grad():
            for part, factor in self.factors(layer):
                factor.data = factor.data.float()
                factor.copy_(starts[part](layer, factor.shape, generator))


class BlockKind(Kind):
    """OFT, whose config has no pattern for layers of another rank: those of each are injected by themselves."""

    def inject(self, network: nn.Module, names: list[str], config: Options, ranks: dict[str, int]) -> None:
        groups: dict[int, list[str]] = {}
        for name in names:
            own = (rank for pattern, rank in ranks.items() if re.fullmatch(pattern.removeprefix("^"), name))
            groups.setdefault(next(own, config.rank), []).append(name)
        for rank, same in groups.items():
            vars(network).pop("peft_config", None)  # of the rank before
            super().inject(network, same, replace(config, rank=rank), {})


class BiasedKind(Kind):
    """A LoRA whose second factor has a bias, which counts alpha / rank as well: peft's `lora_bias`."""

    def factors(self, layer: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().factors(layer)
        yield "lora_up.bias", layer.lora_B[NAME].bias

    def initialise(self, layer: Any, generator: torch.Generator) -> None:
        with torch.no_grad():
            for _, factor in self.factors(layer):
                factor.data = torch.zeros_like(factor.data, dtype=torch.float32)


@dataclass(frozen=True)
class WeightKind:
    """A kind that trains weights themselves, with the interface of `Kind`; its layers are ours and start as they are.

    Args:
        layer: made around a module.
        check: raises ValueError if a module of this name cannot take the config.
    """

    layer: type[WeightLayer]
    check: Callable[[Options, str, nn.Module], None]
    alpha: None = None
    reads_weights: bool = True
    ranked: bool = False

    def inject(self, network: nn.Module, names: list[str], config: Options, ranks: dict[str, int]) -> None:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, self.layer(network.get_submodule(name)).train(False))

    def factors(self, layer: WeightLayer) -> Iterator[tuple[str, nn.Parameter]]:
        for name, factor in layer.named_parameters():
            if not name.startswith("base_layer."):
                yield name.rpartition(".")[2], factor

    def initialise(self, layer: WeightLayer, generator: torch.Generator) -> None:
        """Nothing is drawn."""


def magnitude(layer: Any) -> Tensor:
    """||W||: the norm of each output row of the base weight, in float32, in the shape of peft's DoRA magnitude."""
    weight = layer.get_base_layer().weight.detach().float()
    # By peft's own function, so that the ratio is exactly 1 at the start.
    return layer.lora_magnitude_vector[NAME].get_weight_norm(weight, torch.zeros_like(weight[:1]), 1.0)


def _zeros(layer: Any, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _by_rank(layer: Any, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """N(0, 1 / rank^2): the `gaussian` of diffusers' DreamBooth script."""
    return torch.randn(shape, generator=generator) / layer.r[NAME]


def _by_fan_in(layer: Any, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """N(0, 1 / (3 fan-in)): the variance of peft's Kaiming start."""
    return torch.randn(shape, generator=generator) / math.sqrt(3 * math.prod(shape[1:]))


def _magnitude(layer: Any, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return magnitude(layer)


def _check_rank(config: Options, name: str, module: nn.Module) -> None:
    width = min(module.weight.shape[0], math.prod(module.weight.shape[1:]))
    if config.rank > width:
        raise ValueError(
            f"rank is {config.rank}, but layer {name} is {width} wide; take a rank of at most {width} or other layers"
        )


def _check_dora(config: Options, name: str, module: nn.Module) -> None:
    _check_rank(config, name, module)
    if not module.weight.detach().float().flatten(1).any(dim=1).all():
        raise ValueError(
            f"kind is 'dora', but layer {name} has output rows of zero weight, which have no direction; take lora or "
            "other layers"
        )


def _check_blocks(config: Options, name: str, module: nn.Module) -> None:
    # peft's rotation of a larger convolution adds up the overlapping patches, so that even the identity has an effect.
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        raise ValueError(
            f"kind is 'oft', which takes linear layers and 1 x 1 convolutions, but layers selects {name}; "
            "take other layers or another kind"
        )
    width = module.weight.shape[1]
    if width % config.rank or config.rank == width:
        raise ValueError(
            f"rank is {config.rank}, but for oft it is the number of blocks into which the channels of every layer's "
            f"input are divided, such as 4 or 8, and layer {name} takes {width} channels"
        )


def has_spectrum(module: nn.Module) -> bool:
    """Whether SVDiff takes a module: linear, an ungrouped convolution, or a norm with a weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return weight.ndim == 1 or isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1


def _check_spectrum(config: Options, name: str, module: nn.Module) -> None:
    if not has_spectrum(module):
        raise ValueError(
            f"kind is 'svdiff', which takes linear and ungrouped convolution layers and norms, but layers selects "
            f"{name}; take all_linear_conv"
        )


def _check_nothing(config: Options, name: str, module: nn.Module) -> None:
    pass


def _lora(config: Options, shared: dict[str, Any], **options: Any) -> Any:
    from peft import LoraConfig

    dropout = config.dropout
    return LoraConfig(lora_alpha=config.alpha, lora_dropout=dropout, init_lora_weights=False, **shared, **options)


def _lokr(config: Options, shared: dict[str, Any]) -> Any:
    from peft import LoKrConfig

    options = {"alpha": config.alpha, "rank_dropout": config.dropout}
    return LoKrConfig(decompose_factor=KRONECKER_FACTOR, **options, **shared)


def _loha(config: Options, shared: dict[str, Any]) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(alpha=config.alpha, rank_dropout=config.dropout, **shared)


def _oft(config: Options, shared: dict[str, Any]) -> Any:
    from peft import OFTConfig

    # The Neumann series is orthogonal in the limit only.
    options = {"r": config.rank, "target_modules": shared["target_modules"]}
    return OFTConfig(oft_block_size=0, use_cayley_neumann=False, **options)


_LORA_PARTS = {"lora_A": ("lora_down.weight", _by_rank), "lora_B": ("lora_up.weight", _zeros)}

KINDS = {
    "lora": Kind(_lora, _LORA_PARTS, "lora_alpha", _check_rank),
    "dora": Kind(
        lambda config, shared: _lora(config, shared, use_dora=True),
        {**_LORA_PARTS, "lora_magnitude_vector": ("lora_magnitude_vector", _magnitude)},
        "lora_alpha",
        _check_dora,
        reads_weights=True,
    ),
    "lokr": Kind(
        _lokr,
        {
            "lokr_w1": ("lokr_w1", _zeros),
            "lokr_w2": ("lokr_w2", _by_fan_in),
            "lokr_w2_a": ("lokr_w2_a", _by_fan_in),
            "lokr_w2_b": ("lokr_w2_b", _by_fan_in),
        },
        "alpha",
        _check_rank,
    ),
    "loha": Kind(
        _loha,
        {
            "hada_w1_a": ("hada_w1_a", _by_fan_in),
            "hada_w1_b": ("hada_w1_b", _by_fan_in),
            "hada_w2_a": ("hada_w2_a", _by_fan_in),
            "hada_w2_b": ("hada_w2_b", _zeros),
        },
        "alpha",
        _check_rank,
    ),
    "oft": BlockKind(_oft, {"oft_R": ("oft_R.weight", _zeros)}, None, _check_blocks, reads_weights=True),
    "full": WeightKind(FullLayer, _check_nothing),
    "svdiff": WeightKind(SpectralLayer, _check_spectrum),
}
"""Kinds by name. LoRA: arXiv 2106.09685; DoRA: 2402.09353; LoKr: 2309.14859; LoHa: 2108.06098; OFT: 2306.07280;
full: DreamBooth's own fine-tuning, 2208.12242; SVDiff: 2303.11305."""

FILE_KINDS = {
    **KINDS,
    "lora_bias": BiasedKind(
        lambda config, shared: _lora(config, shared, lora_bias=True), _LORA_PARTS, "lora_alpha", _check_rank
    ),
}
"""The kinds of layers that a file may have."""

NO_LAYERS = "none"
"""The kind that adapts no layer at all: token vectors alone, Textual Inversion."""
