"""Conversion of kinds that no factors of a fused layer can hold: the same change of the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anchor_core.adapters.attach import attach_tensors
from anchor_core.adapters.formats import convert
from tests.adapters.networks import Bare

WIDTH = 16
PARTS = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
FUSED = "diffusion_model.double_blocks.0.img_attn.qkv"
FLUX = {"modelspec.architecture": "flux-1-dev/lokr"}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100 * sum(shape)))


def lokr(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A LoKr's parts and the change that LyCORIS' paper defines, alpha / rank kron(w1, w2a w2b)."""
    one, a, b = draw(4, 4, seed=seed), draw(4, 2, seed=seed), draw(2, 4, seed=seed)
    parts = {"lokr_w1": one, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    return parts, 0.5 * torch.einsum("ab,cd->acbd", one, a @ b).reshape(WIDTH, WIDTH)


def loha(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    parts = {f"hada_w{i}_{side}": draw(*size, seed=seed + i) for i in (1, 2)
             for side, size in (("a", (WIDTH, 2)), ("b", (2, WIDTH)))}  # fmt: skip
    change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    return {**parts, "alpha": torch.tensor(2.0)}, change


def file(layers, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {f"lycoris_{name.replace('.', '_')}.{part}": tensor.to(dtype)
            for name, parts in layers.items() for part, tensor in parts.items()}  # fmt: skip


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
@pytest.mark.parametrize("kinds", [(lokr, lokr, lokr), (loha, loha, loha), (lokr, loha, lokr), (lokr, None, loha)])
def test_separate_layers_become_the_change_of_the_fused_one(kinds, to):
    made = {name: kind(seed) for seed, (name, kind) in enumerate(zip(PARTS, kinds)) if kind is not None}
    expected = torch.cat([made[name][1] if name in made else torch.zeros(WIDTH, WIDTH) for name in PARTS])
    converted = convert(file({name: parts for name, (parts, _) in made.items()}), FLUX, to=to)
    name = FUSED if to == "comfyui" else "lora_unet_double_blocks_0_img_attn_qkv"
    assert converted.keys() == {f"{name}.diff"}
    torch.testing.assert_close(converted[f"{name}.diff"], expected)


def test_biases_and_the_precision_of_the_file_stay():
    layers = {name: lokr(seed)[0] for seed, name in enumerate(PARTS)}
    layers[PARTS[1]]["diff_b"] = draw(WIDTH)
    converted = convert(file(layers, torch.bfloat16), FLUX, to="comfyui")
    assert {tensor.dtype for tensor in converted.values()} == {torch.bfloat16}
    expected = torch.cat([torch.zeros(WIDTH), draw(WIDTH), torch.zeros(WIDTH)]).bfloat16()
    torch.testing.assert_close(converted[f"{FUSED}.diff_b"], expected)


def test_what_depends_on_the_base_weights_is_refused_and_what_is_too_large():
    layers = {name: lokr(seed)[0] for seed, name in enumerate(PARTS)}
    layers[PARTS[0]]["dora_scale"] = torch.ones(WIDTH, 1)
    with pytest.raises(ValueError, match="is one layer there and 3 here, and what a lokr changes .* base weights"):
        convert(file(layers), FLUX, to="comfyui")
    layers[PARTS[0]] = {"lokr_w1": torch.ones(2**12, 1), "lokr_w2": torch.ones(2**12, 2**12)}
    with pytest.raises(ValueError, match="has a part 16777216 x 4096, but it takes one of at most"):
        convert(file(layers), FLUX, to="comfyui")
    layers[PARTS[0]] = {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(4, 5)}
    with pytest.raises(ValueError, match="read inputs of different widths"):
        convert(file(layers), FLUX, to="comfyui")


def test_magnitudes_of_separate_layers_are_read_on_the_fused_one():
    """DoRA on output rows: each part of the weight, W + its change, by scale over the norm of W's rows."""
    layer, changes = nn.Linear(WIDTH, 3 * WIDTH, bias=False), []
    layers, weights = {}, layer.weight.detach().clone().split(WIDTH)
    for seed, (name, weight) in enumerate(zip(PARTS, weights)):
        layers[name], change = lokr(seed)
        scale = layers[name]["dora_scale"] = draw(WIDTH, 1, seed=seed).abs()
        changes.append((weight + change) * scale / weight.norm(dim=1, keepdim=True))
    block = nn.ModuleDict({"img_attn": nn.ModuleDict({"qkv": layer})})
    network = nn.ModuleDict({"double_blocks": nn.ModuleList([block])})
    bare = Bare(network, "diffusion_model.", "flux-1-dev/lokr")
    attach_tensors(bare, file(layers))
    x = draw(5, WIDTH)
    with torch.no_grad():
        made = block["img_attn"]["qkv"](x)
    torch.testing.assert_close(made, x @ torch.cat(changes).T, atol=1e-4, rtol=1e-4)
