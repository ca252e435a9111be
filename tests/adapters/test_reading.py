"""The door of adapter files: what is bounded, refused and told there."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from anchor_core.adapters.attach import attach_file, attach_tensors
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import convert_file, load_adapter
from anchor_core.adapters.layers import matching_names
from anchor_core.adapters.metadata import stated_prompt, told
from anchor_core.adapters.prefixes import identity, module_of
from anchor_core.adapters.reading import STATED, read_layers
from tests.adapters.networks import Bare, blocks

PREFIX = "diffusion_model.linear"
LORA = {f"{PREFIX}.lora_down.weight": torch.ones(2, 24), f"{PREFIX}.lora_up.weight": torch.ones(16, 2)}


def layer(**parts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"{PREFIX}.{name.replace('__', '.')}": torch.ones(shape) for name, shape in parts.items()}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (layer(lora_down__weight=(0, 24), lora_up__weight=(16, 0)), "lora_down.weight has no element"),
        (layer(lora_down__weight=(), lora_up__weight=(16, 2)), "lora_down.weight has 0 dimensions"),
        (layer(lora_down__weight=(3, 24), lora_up__weight=(16, 2)), "the factors are of different ranks"),
        (layer(lora_down__weight=(2, 24)), "lacks lora_up.weight"),
        (LORA | layer(alpha=(2,)), "alpha has 2 elements instead of one"),
        (LORA | layer(diff=(16, 24)), "factors and a difference"),
        (layer(lokr_w1=(4, 4), lokr_w2_a=(4, 2)), "lacks lokr_w2"),
        (layer(lokr_w1=(4,), lokr_w2=(4, 6)), "lokr_w1 has 1 dimensions"),
        (layer(hada_w1_a=(16, 2), hada_w1_b=(2, 24), hada_w2_a=(16, 3), hada_w2_b=(2, 24)), "of different ranks"),
        (layer(oft_blocks=(4, 4, 3)), "the blocks are not square"),
        (layer(alpha=()), "has alpha alone"),
        (layer(oft_R__weight=(8, 3), diff_b=(16,)), "diff_b and oft_R.weight do not go together without diff"),
        (layer(lambda_layer=(1, 2)), "1 of its 1 layers .*T-LoRA"),
        (layer(set_weight=(16, 24)), "1 of its 1 layers .*replaces the model's"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, "holds no LoRA: 'a' is no part of a layer"),
        (LORA | {f"{PREFIX}.lora_A.one.weight": torch.ones(2, 24)}, "two LoRAs in one: .* has lora_down.weight twice"),
        (LORA | {"unet.linear.lora_A.weight": torch.ones(2, 24), "unet.linear.lora_B.weight": torch.ones(16, 2)},
         "two LoRAs in one: linear has two"),
    ],
)  # fmt: skip
def test_a_layer_that_is_not_whole_ends_in_one_sentence_with_the_files_name(tmp_path, tensors, sentence):
    save_file(tensors, tmp_path / "lora.safetensors")
    bare = Bare(blocks(), "diffusion_model.")
    network = bare.network.linear
    with pytest.raises(ValueError, match=f"lora.safetensors: this .*{sentence}") as caught:
        attach_file(bare, tmp_path / "lora.safetensors")
    assert str(caught.value).isprintable() and bare.network.linear is network


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb.alpha", "\u202etxt", "a" * 501])
def test_names_of_tensors_are_printable_and_short(tmp_path, name):
    save_file({name: torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="lora.safetensors: this file names a tensor") as caught:
        load_adapter(tmp_path / "lora.safetensors")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_numbers_of_other_types_are_refused_and_narrow_ones_read_exactly(tmp_path):
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e8m0fnu):
        save_file({"a.lora_down.weight": torch.ones(4, 8).to(dtype)}, tmp_path / "odd.safetensors")
        with pytest.raises(
            ValueError, match=f"odd.safetensors has 'a.lora_down.weight' in {dtype}".replace("torch.", "")
        ):
            load_adapter(tmp_path / "odd.safetensors")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        every = every[every.float().isfinite()]
        save_file({"a.diff": every}, tmp_path / "narrow.safetensors")
        assert torch.equal(load_adapter(tmp_path / "narrow.safetensors")[0]["a.diff"].float(), every.float())
    narrow = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in LORA.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    attach_file(Bare(blocks(), "diffusion_model."), tmp_path / "narrow.safetensors")
    save_file({f"double_blocks.0.{key}": each for key, each in narrow.items()}, tmp_path / "flux.safetensors")
    flux = {key.replace(PREFIX, "diffusion_model.double_blocks.0.img_attn.proj"): each for key, each in narrow.items()}
    save_file(flux, tmp_path / "flux.safetensors")
    convert_file(tmp_path / "flux.safetensors", tmp_path / "made.safetensors", "diffusers")
    made = load_adapter(tmp_path / "made.safetensors")[0]
    assert made["transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight"].sum() == 32


def test_a_small_file_does_not_ask_for_terabytes():
    for parts in (
        {"hada_w1_a": (10**6, 1), "hada_w1_b": (1, 10**6), "hada_w2_a": (10**6, 1), "hada_w2_b": (1, 10**6)},
        {"lokr_w1_a": (10**6, 1), "lokr_w1_b": (1, 10**6), "lokr_w2_a": (10**6, 1), "lokr_w2_b": (1, 10**6)},
        {"lora_down__weight": (1, 10**6), "lora_up__weight": (10**6, 1)},
        {"a1__weight": (24, 1), "a2__weight": (1, 24), "b1__weight": (10**6, 1), "b2__weight": (1, 10**6)},
    ):
        with pytest.raises(ValueError, match="made for another model: linear is .16, 24. here and"):
            attach_tensors(Bare(blocks(), "diffusion_model."), layer(**parts))


# --- what metadata says ------------------------------------------------------------------------------------------


def stated(**options) -> dict[str, str]:
    return {STATED: json.dumps({f"unet.{name}": value for name, value in options.items()})}


def alphas(metadata: dict[str, str]) -> dict[str, float]:
    names = ("down.attn1.to_q", "down.attn2.to_q", "down.attn2.to_k")
    tensors = {f"unet.{name}.lora_{part}.weight": torch.ones(4, 4) for name in names for part in "AB"}
    layers, _, _ = read_layers(tensors, metadata)
    return {prefix.removeprefix("unet."): float(parts["alpha"]) for prefix, parts in layers.items()}


def test_patterns_of_a_file_are_names():
    """As peft matches them: the first that is the module's name or its end."""
    one, two, three = "down.attn1.to_q", "down.attn2.to_q", "down.attn2.to_k"
    assert alphas(stated(lora_alpha=8, alpha_pattern={"attn2.to_q": 2, "to_q": 3})) == {one: 3, two: 2, three: 8}
    assert alphas(stated(lora_alpha=8, alpha_pattern={"to_q": 3, "attn2.to_q": 2})) == {one: 3, two: 3, three: 8}
    assert alphas(stated(lora_alpha=8, alpha_pattern={r"^down\.attn1\.to_q": 3, "^to_k": 5})) == {
        one: 3,
        two: 8,
        three: 8,
    }
    assert alphas(stated(lora_alpha=8, use_rslora=True)) == {one: 16, two: 16, three: 16}


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        (stated(lora_alpha=8, alpha_pattern={"(a+)+$": 2}), r"has the expression '\(a\+\)\+\$'"),
        (stated(lora_alpha=8, alpha_pattern={"(((x|xx)*)*)*y" * 50: 2}), "has the expression"),
        (stated(lora_alpha=8, alpha_pattern=["to_q"]), "no list of names"),
        (stated(lora_alpha="8"), "unet.lora_alpha is 8, but it takes a finite number"),
        (stated(lora_alpha=float("nan")), "unet.lora_alpha is nan"),
        (stated(lora_alpha=True), "unet.lora_alpha is True"),
        ({STATED: "[" * 100_000}, "is no JSON"),
        ({STATED: "[]"}, "but it takes names and values"),
        ({STATED: "x" * 2_000_000}, "no text of at most"),
    ],
)
def test_metadata_of_other_types_is_one_sentence(metadata, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        alphas(metadata)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_the_number_of_vectors_is_a_number():
    with pytest.raises(ValueError, match="anchor.vectors is 'many', but it takes a whole number"):
        attach_tensors(Bare(blocks(), "diffusion_model."), LORA, {"anchor.vectors": "many"})


def test_texts_of_a_file_are_shown_clean_and_cut():
    metadata = {"anchor.subject_prompt": "\x1b[31ma photo\nof \u202esks", "b\x07": "x" * 10_000}
    assert stated_prompt(metadata, "subject") == "?[31ma photo of ?sks" and stated_prompt(metadata, "class") is None
    lines = told(metadata).split("\n")
    assert len(lines) == 2 and all(line.isprintable() and len(line) < 1200 for line in lines)
    assert len(told({str(index): "" for index in range(10_000)}).split("\n")) == 201


# --- the user's expression ----------------------------------------------------------------------------------------


def test_an_expression_that_does_not_end_is_refused_within_a_second_or_two():
    names = [f"down_blocks.{index}.attentions.0.transformer_blocks.0.attn1.to_q" for index in range(200)]
    assert matching_names(names, r"blocks\.1\d\.") == names[10:20]
    with pytest.raises(ValueError, match="takes more than a second to match"):
        matching_names(names, r"^((.|..)+)+[A-Z]$")
    with pytest.raises(ValueError, match="layers is '.*' .*, but it takes"):
        AdapterConfig(layers="(unfinished")
    with pytest.raises(ValueError, match="20000 letters"):
        AdapterConfig(layers="a" * 20_000)


# --- layers that are not read -------------------------------------------------------------------------------------


def test_strangers_are_counted_and_most_of_them_refused(caplog):
    stranger = {key.replace("linear", "nowhere"): tensor for key, tensor in LORA.items()}
    with caplog.at_level(logging.WARNING):
        adapter = attach_tensors(Bare(blocks(), "diffusion_model."), LORA | stranger)
    assert adapter.module_names == ["linear"]
    told = [record.getMessage() for record in caplog.records if record.name.startswith("anchor_core")]
    assert told == ["1 of the LoRA's 2 layers are not read: diffusion_model.nowhere"]
    other = {key.replace("linear", "elsewhere"): tensor for key, tensor in LORA.items()}
    with pytest.raises(ValueError, match="another model: 2 of its 3 layers belong to no module .*nowhere, .*elsewhere"):
        attach_tensors(Bare(blocks(), "diffusion_model."), LORA | stranger | other)


@pytest.mark.parametrize(
    ("prefix", "module"),
    [
        ("lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0", ("t5", "encoder.block.0.layer.1.DenseReluDense.wi_0")),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", ("t5", "encoder.block.0.layer.0.SelfAttention.q")),
        ("lora_te_encoder_layers_0_mlp_fc1", ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")),
        ("lycoris_text_model_encoder_layers_0_mlp_fc1", ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")),
        ("text_encoders.clip_g.transformer.text_projection", ("text_encoder_2", "text_projection")),
        ("down_blocks.0.attentions.0.proj_in", ("", "down_blocks.0.attentions.0.proj_in")),
        ("unet.mid_block.attn1.processor.to_out", ("", "mid_block.attn1.to_out.0")),
        ("bundle_emb.sks", None),
    ],
)
def test_prefixes_name_a_network_and_a_module(prefix, module):
    assert module_of(prefix) == module
    assert (identity(prefix) is None) == (module is None)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.group = nn.Linear(24, 16), nn.LayerNorm(24), nn.GroupNorm(2, 8)


def test_kinds_may_differ_by_layer_and_parameter():
    """As ComfyUI's TrainLoraNode writes them."""
    bare = Bare(Norms(), "diffusion_model.", everything=True)
    changes = {"norm.diff": torch.randn(24), "norm.diff_b": torch.randn(24), "group.diff_b": torch.randn(8)}
    bias = torch.randn(16)
    tensors = LORA | {f"diffusion_model.{key}": each for key, each in changes.items()} | {f"{PREFIX}.diff_b": bias}
    x, picture = torch.randn(3, 24), torch.randn(2, 8, 4, 4)
    network = bare.network
    linear, norm, group = network.linear, network.norm, network.group
    adapter = attach_tensors(bare, tensors | {f"{PREFIX}.alpha": torch.tensor(1.0)})
    with torch.no_grad():
        torch.testing.assert_close(network.linear(x), linear(x) + x @ torch.ones(24, 16) + bias)
        scaled = nn.functional.layer_norm(
            x, (24,), norm.weight + changes["norm.diff"], norm.bias + changes["norm.diff_b"], norm.eps
        )
        torch.testing.assert_close(network.norm(x), scaled)
        shifted = group(picture) + changes["group.diff_b"].view(8, 1, 1)
        torch.testing.assert_close(network.group(picture), shifted)
        with adapter.scaled(0.5):
            torch.testing.assert_close(network.linear(x), linear(x) + 0.5 * (x @ torch.ones(24, 16) + bias))
