"""What each kind's file holds, by the arithmetic that ComfyUI documents."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.attach import attach_tensors
from anchor_core.adapters.file import to_file_keys
from anchor_core.adapters.kinds import KINDS
from tests.adapters.networks import (
    Bare,
    attached,
    blocks,
    check_weights,
    inputs,
)


def lora(weight, get):
    return get("alpha") / 4 * get("lora_up.weight").flatten(1) @ get("lora_down.weight").flatten(1)


def dora(weight, get):
    flat = weight.flatten(1)
    scale = get("dora_scale").flatten(1) / flat.norm(dim=1, keepdim=True)
    return scale * (flat + lora(weight, get)) - flat


def lokr(weight, get):
    one, two, scale = get("lokr_w1"), get("lokr_w2"), 1.0
    if two is None:
        two, scale = get("lokr_w2_a") @ get("lokr_w2_b"), get("alpha") / get("lokr_w2_b").shape[0]
    return scale * torch.einsum("ab,cd->acbd", one, two.flatten(1)).reshape(len(weight), -1)


def loha(weight, get):
    one, two = (get(f"hada_w{i}_a") @ get(f"hada_w{i}_b") for i in (1, 2))
    return get("alpha") / 4 * one * two


def diff(weight, get):
    return get("diff")


FORMULAS = {"lora": lora, "dora": dora, "lokr": lokr, "loha": loha, "oft": diff, "full": diff, "svdiff": diff}


@pytest.mark.parametrize(("kind", "rank"), [*((kind, 4) for kind in KINDS), ("lokr", 2), ("oft", 2)])
def test_a_file_holds_the_weight_and_attaches_again(kind, rank, stir):
    bare = attached(kind, stir, rank=rank)
    tensors = to_file_keys(bare.adapter, bare.file_keys())
    weights = {}
    for name in bare.adapter.module_names:
        weight = bare.adapter.base_module(name).weight.detach()
        change = FORMULAS[kind](weight, lambda part, name=name: tensors.get(f"diffusion_model.{name}.{part}"))
        weights[name] = weight + change.view(weight.shape)
        if (bias := tensors.get(f"diffusion_model.{name}.diff_b")) is not None:
            weights[f"{name}.bias"] = bare.adapter.base_module(name).bias.detach() + bias
    check_weights(bare.adapter, weights)
    again = Bare(blocks(), "diffusion_model.")
    attach_tensors(again, tensors)
    assert again.adapter.config.kind == kind
    check_weights(again.adapter, weights)
    again.detach()
    attach_tensors(again, {key: tensor.bfloat16() for key, tensor in tensors.items()})
    assert all(parameter.dtype == torch.float32 for parameter in again.adapter.parameters())
    assert to_file_keys(again.adapter, again.file_keys()).keys() == tensors.keys() or kind == "lokr"


def test_a_file_of_some_changes_leaves_the_other_parameters_as_they_are():
    bare = Bare(blocks(), "diffusion_model.")
    linear, change = bare.network.linear, torch.randn(16, 24)
    attach_tensors(bare, {"diffusion_model.linear.diff": change})
    x = inputs(linear)
    with torch.no_grad():
        torch.testing.assert_close(bare.network.linear(x), linear(x) + x @ change.T)
    bare.detach()
    with pytest.raises(ValueError, match="made for another model: linear is .16, 24. here and"):
        attach_tensors(bare, {"diffusion_model.linear.diff": change[:, 1:]})
    assert bare.network.linear is linear


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_under_diffusers_prefixes_alpha_is_folded_and_both_loaders_find_their_dora(kind, stir):
    bare = attached(kind, stir, "transformer.")
    tensors = to_file_keys(bare.adapter, bare.file_keys())
    parts = {"lora_A.weight", "lora_B.weight"} | ({"dora_scale", "lora_magnitude_vector"} if kind == "dora" else set())
    assert {key.split(".", 2)[2] for key in tensors} == parts
    assert bare.adapter.config.alpha == 2 and not any("alpha" in key for key in tensors)
    again = Bare(blocks(), "transformer.")
    attach_tensors(again, tensors)
    for name in bare.adapter.module_names:
        x = inputs(bare.adapter.base_module(name))
        with torch.no_grad():
            torch.testing.assert_close(again.adapter.layer(name)(x), bare.adapter.layer(name)(x))


def test_ranks_and_alphas_may_differ_by_layer(stir):
    bare = attached("lora", stir)
    tensors = to_file_keys(bare.adapter, bare.file_keys())
    tensors["diffusion_model.linear.lora_down.weight"] = torch.randn(7, 24)
    tensors["diffusion_model.linear.lora_up.weight"] = torch.randn(16, 7)
    tensors["diffusion_model.linear.alpha"] = torch.tensor(3.5)
    del tensors["diffusion_model.wide.alpha"]
    again = Bare(blocks(), "diffusion_model.")
    adapter = attach_tensors(again, tensors)
    up, down = (tensors[f"diffusion_model.linear.lora_{part}.weight"] for part in ("up", "down"))
    weight = adapter.base_module("linear").weight.detach() + 0.5 * up @ down
    x = inputs(adapter.base_module("linear"))
    with torch.no_grad():
        expected = torch.func.functional_call(adapter.base_module("linear"), {"weight": weight}, x)
        torch.testing.assert_close(adapter.layer("linear")(x), expected)
    assert adapter.parts("wide")["alpha"] == 4 and adapter.parts("down")["alpha"] == 2


def test_a_kronecker_product_of_other_factors_attaches_and_a_wrong_one_does_not(stir):
    draw = torch.Generator().manual_seed(0)
    one, two = torch.randn(4, 12, generator=draw), torch.randn(4, 2, generator=draw)
    tensors = {"diffusion_model.linear.lokr_w1": one, "diffusion_model.linear.lokr_w2": two}
    bare = Bare(blocks(), "diffusion_model.")
    adapter = attach_tensors(bare, tensors)
    check_weights(adapter, {"linear": adapter.base_module("linear").weight.detach() + torch.kron(one, two)})
    bare.detach()
    tensors["diffusion_model.linear.lokr_w2"] = torch.randn(4, 3)
    with pytest.raises(ValueError, match="made for another model: linear"):
        attach_tensors(bare, tensors)


def test_mixed_kinds_and_unknown_parts_are_one_line(stir):
    tensors = to_file_keys((one := attached("lora", stir)).adapter, one.file_keys())
    other = to_file_keys((two := attached("loha", stir)).adapter, two.file_keys())
    mixed = {key: tensor for key, tensor in tensors.items() if ".linear." in key}
    mixed |= {key: tensor for key, tensor in other.items() if ".point." in key}
    bare = Bare(blocks(), "diffusion_model.")
    adapter = attach_tensors(bare, mixed)
    for each, name in ((one, "linear"), (two, "point")):
        x = inputs(adapter.base_module(name))
        with torch.no_grad():
            torch.testing.assert_close(adapter.layer(name)(x), each.adapter.layer(name)(x))
    bare.detach()
    bare.adapter = None
    with pytest.raises(ValueError, match=r"no whole LoRA: lora_mid.weight has 1 dimensions in diffusion_model.wide"):
        attach_tensors(bare, {**tensors, "diffusion_model.wide.lora_mid.weight": torch.zeros(1)})
    for parts, message in (
        ({"lora_up.weight": (16, 4)}, "not a whole LoRA: diffusion_model.linear lacks lora_down.weight"),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (4, 2)}, "not a whole LoRA: diffusion_model.linear lacks lokr_w2"),
        ({"hada_w1_a": (16, 4), "hada_w1_b": (4, 24)}, "not a whole LoRA: diffusion_model.linear lacks hada_w2"),
        ({"alpha": ()}, "no LoRA that can be read: diffusion_model.linear has alpha alone"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_tensors(bare, {f"diffusion_model.linear.{part}": torch.zeros(size) for part, size in parts.items()})
    assert bare.adapter is None
