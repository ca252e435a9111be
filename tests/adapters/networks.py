"""Networks to adapt without a backend, and what is asked of an adapter on one."""

from __future__ import annotations

import torch
from torch import nn

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import to_file_keys
from anchor_core.adapters.layers import is_leaf

METADATA = {"sd3": "stable-diffusion-v3-medium/lora", "flux": "flux-1-dev/lora"}


def predict(denoiser, make_step) -> torch.Tensor:
    with torch.no_grad():
        return make_step(denoiser).subject


def snapshot(network) -> list[tuple[str, int, bool, torch.Tensor]]:
    return [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in network.named_parameters()]


class Blocks(nn.Module):
    """A linear layer and three convolutions, one of them of stride 2."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(24, 16)
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(12, 16, 1)


class Bare:
    """What `attach_tensors` needs of a denoiser."""

    def __init__(self, network: nn.Module, prefix: str = "", architecture: str = "", everything: bool = False):
        # Frozen as a denoiser's is: torch chooses some products by it, whose last bits differ on some processors.
        self.network, self.architecture, self.adapter = network.requires_grad_(False), architecture, None
        kinds = nn.Module if everything else (nn.Linear, nn.Conv2d)
        parts = {name: part for name, part in network.named_modules() if isinstance(part, kinds) and is_leaf(part)}
        self.shapes = {name: part.weight.shape for name, part in parts.items()}
        self.keys = {name: f"{prefix}{name}" for name in self.shapes}

    def attach(self, config: AdapterConfig, seed: int = 0, vectors=None) -> Adapter:
        self.adapter = Adapter.attach({"": self.network}, config, seed, self.file_keys())
        return self.adapter

    def detach(self) -> None:
        self.adapter.detach()

    def file_keys(self) -> dict[str, str]:
        return self.keys


def blocks() -> Blocks:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Blocks()


def attached(kind: str, stir, prefix: str = "diffusion_model.", **options) -> Bare:
    bare = Bare(blocks(), prefix)
    layers = "linear|point" if kind == "oft" else "."
    stir(bare.attach(AdapterConfig(**{"rank": 4, "alpha": 2, "kind": kind, "layers": layers, **options})))
    return bare


def inputs(module: nn.Module) -> torch.Tensor:
    shape = (5, 24) if isinstance(module, nn.Linear) else (2, module.weight.shape[1], 7, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def check_weights(adapter: Adapter, weights: dict[str, torch.Tensor], strength: float = 1.0) -> None:
    """That each layer computes what its base module would with these weights, and biases by `<name>.bias`."""
    for name in adapter.module_names:
        base = adapter.base_module(name)
        x = inputs(base)
        with torch.no_grad(), adapter.scaled(strength):
            own = {"weight": weights[name]}
            if f"{name}.bias" in weights:
                own["bias"] = weights[f"{name}.bias"]
            expected = torch.func.functional_call(base, own, x)
            assert (base(x) - expected).abs().max() > 1e-2
            torch.testing.assert_close(adapter.layer(name)(x), expected, atol=1e-4, rtol=1e-4)


def transformer(family: str) -> nn.Module:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "flux":
            return FluxTransformer2DModel(
                patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
            )  # fmt: skip
        return SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=32, num_attention_heads=2,
            caption_projection_dim=64, joint_attention_dim=32, pooled_projection_dim=32, out_channels=4,
            pos_embed_max_size=8, dual_attention_layers=(0,),
        )  # fmt: skip


def transformer_lora(family: str, layers: str, stir) -> tuple[Bare, dict[str, torch.Tensor]]:
    bare = Bare(transformer(family), "transformer.", METADATA[family])
    stir(bare.attach(AdapterConfig(rank=4, layers=layers)), size=0.5)
    return bare, to_file_keys(bare.adapter, bare.file_keys())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
