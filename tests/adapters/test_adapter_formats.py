from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.attach import attach_tensors
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import convert_file, load_adapter, save_adapter, to_file_keys
from anchor_core.adapters.formats import FORMATS, convert
from anchor_core.adapters.kinds import KINDS
from anchor_core.adapters.layers import is_leaf
from anchor_core.adapters.names import dotted, to_diffusers, to_original
from anchor_core.training.saving import adapter_metadata
from anchor_core.training.settings import TrainSettings
from tests.comfyui import comfy_server

found = comfy_server.find()
needs_comfyui = pytest.mark.skipif(isinstance(found, str), reason=str(found))
METADATA = {"sd3": "stable-diffusion-v3-medium/lora", "flux": "flux-1-dev/lora"}


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
        self.network, self.architecture, self.adapter = network, architecture, None
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


# --- each kind's file, by the arithmetic that ComfyUI documents ---------------------------------------------------


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


# --- the stock loaders --------------------------------------------------------------------------------------------


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


def velocity(network: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    text, pooled = torch.randn(2, 3, 32, generator=draw), torch.randn(2, 32, generator=draw)
    common = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": torch.tensor([0.3, 0.7])}
    with torch.no_grad():
        if type(network).__name__ == "SD3Transformer2DModel":
            return network(torch.randn(2, 4, 8, 8, generator=draw), **common).sample
        ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(3, 3)}
        return network(torch.randn(2, 16, 4, generator=draw), **common, **ids).sample


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformer_files_give_the_same_output_through_diffusers(family, kind, stir, tmp_path):
    from diffusers import FluxPipeline, StableDiffusion3Pipeline

    bare = Bare(transformer(family), "transformer.")
    untouched = velocity(bare.network)
    adapter = bare.attach(AdapterConfig(rank=4, alpha=2, layers="attention_feed_forward", kind=kind))
    assert torch.equal(velocity(bare.network), untouched)
    stir(adapter, size=0.5)
    save_adapter(tmp_path / "lora.safetensors", to_file_keys(adapter, bare.file_keys()), {})
    nothing = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if family == "flux":
        pipeline = FluxPipeline(transformer=transformer(family), **nothing)
    else:
        nothing |= {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = StableDiffusion3Pipeline(transformer=transformer(family), **nothing)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    ours = velocity(bare.network)
    assert (ours - untouched).abs().max() > 1e-2
    assert (velocity(pipeline.transformer) - ours).abs().max() < 1e-4


def run_comfyui(folder: Path) -> None:
    comfy_server.run_script(comfy_server.ROOT / "tests/comfyui/check_kinds.py", folder, folder=folder)


def transformer_lora(family: str, layers: str, stir) -> tuple[Bare, dict[str, torch.Tensor]]:
    bare = Bare(transformer(family), "transformer.", METADATA[family])
    stir(bare.attach(AdapterConfig(rank=4, layers=layers)), size=0.5)
    return bare, to_file_keys(bare.adapter, bare.file_keys())


def original_weights(bare: Bare, family: str) -> dict[str, torch.Tensor]:
    """Weights under the original names, at random, as large as the diffusers network's together."""
    rows, columns = {}, {}
    for name, shape in bare.shapes.items():
        original = f"diffusion_model.{to_original(name, family)[0]}.weight"
        rows[original], columns[original] = rows.get(original, 0) + shape[0], shape[1:]
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(rows[name], *columns[name], generator=draw) for name in rows}


@needs_comfyui
def test_comfyuis_stock_loader_makes_the_trained_weights_of_every_kind_and_format(tmp_path, stir):
    bares = {}
    for kind in KINDS:
        for rank in (4, 2) if kind in ("lokr", "oft") else (4,):
            bare = bares[f"{kind}{rank}"] = attached(kind, stir, rank=rank)
            prefixes = {f"diffusion_model.{name}": f"{name}.weight" for name in bare.adapter.module_names}
            base = {
                f"{name}.{part}": tensor.detach()
                for name in bare.adapter.module_names
                for part, tensor in bare.adapter.base_module(name).named_parameters()
            }
            (tmp_path / f"{kind}{rank}.json").write_text(json.dumps({"keys": prefixes}))
            save_file(base, tmp_path / f"{kind}{rank}.base.safetensors")
            save_adapter(tmp_path / f"{kind}{rank}.file.safetensors", to_file_keys(bare.adapter, bare.file_keys()), {})
    adapted = {}
    for family in ("sd3", "flux"):
        bare, tensors = transformer_lora(family, r"blocks.*(attn|ff|proj|linear)|^norm_out|^proj_out", stir)
        adapted[family] = {f"diffusion_model.{to_original(n, family)[0]}.weight" for n in bare.adapter.module_names}
        config = {"depth": 1, "depth_single_blocks": 1, "hidden_size": 32}
        for format in FORMATS:
            stem = f"{family}-{format}"
            (tmp_path / f"{stem}.json").write_text(json.dumps({"family": family, "config": config}))
            save_file(original_weights(bare, family), tmp_path / f"{stem}.base.safetensors")
            metadata = {"modelspec.architecture": METADATA[family]}
            save_adapter(tmp_path / f"{stem}.file.safetensors", convert(tensors, metadata, to=format), {})
    run_comfyui(tmp_path)
    for stem, bare in bares.items():
        made = load_file(tmp_path / f"{stem}.out.safetensors")
        for strength in (1.0, 0.5):
            own = {name.partition("/")[2]: tensor for name, tensor in made.items() if name.startswith(f"{strength}/")}
            weights = {name.removesuffix(".weight"): tensor for name, tensor in own.items()}
            check_weights(bare.adapter, weights, strength)
    for family in ("sd3", "flux"):
        base = load_file(tmp_path / f"{family}-diffusers.base.safetensors")
        theirs = load_file(tmp_path / f"{family}-diffusers.out.safetensors")
        changed = {name for name, weight in base.items() if not torch.equal(theirs[f"1.0/{name}"], weight)}
        assert changed == adapted[family] and len(changed) > 10
        for format in FORMATS:
            made = load_file(tmp_path / f"{family}-{format}.out.safetensors")
            for name, tensor in theirs.items():
                torch.testing.assert_close(made[name], tensor, atol=1e-4, rtol=1e-4)
    for family, names in json.loads((tmp_path / "names.json").read_text()).items():
        names = {new[:-7]: old[:-7] for new, old in names.items() if new.endswith(".weight")}
        # The last resolution is neither halved nor doubled, whatever the map says.
        last = {"sd": "(down_blocks|up_blocks).3", "sdxl": "(down_blocks|up_blocks).2"}[family] + ".(down|up)samplers"
        for new, old in names.items():
            if not re.match(rf"class_embedding|conv_norm_out|{last}", new):
                assert to_diffusers(old, family) == (new,)
                assert family == "sd" or to_original(new, family) == (old, None)
                assert dotted(new.replace(".", "_")) == new and dotted(old.replace(".", "_")) == old


# --- conversion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("layers", ["attention", "attention_feed_forward", "all_linear", r"attn\.(to_k|to_v)$"])
def test_round_trips_of_transformers_are_exact(family, layers, stir):
    bare, tensors = transformer_lora(family, layers, stir)
    metadata = {"modelspec.architecture": METADATA[family]}
    there = convert(tensors, metadata, to="comfyui")
    assert all(key.startswith("diffusion_model.") for key in there)
    assert equal(convert(there, metadata, to="diffusers"), tensors)
    kohya = convert(there, metadata, to="kohya")
    assert all(key.startswith("lora_unet_") for key in kohya)
    assert equal(convert(kohya, metadata, to="comfyui"), there)
    assert equal(convert(kohya, metadata, to="diffusers"), tensors)
    bare.detach()
    adapter = attach_tensors(bare, kohya)
    assert equal(to_file_keys(adapter, bare.file_keys()), tensors)


def test_a_fused_lora_splits_with_one_down_and_fuses_again(stir):
    draw = torch.Generator().manual_seed(0)
    fused = {
        "diffusion_model.single_blocks.3.linear1.lora_down.weight": torch.randn(4, 32, generator=draw),
        "diffusion_model.single_blocks.3.linear1.lora_up.weight": torch.randn(7 * 32, 4, generator=draw),
        "diffusion_model.single_blocks.3.linear1.alpha": torch.tensor(2.0),
    }
    split = convert(fused, to="diffusers")
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    update = 0.5 * fused["diffusion_model.single_blocks.3.linear1.lora_up.weight"]
    assert len(split) == 8
    prefix = "transformer.single_transformer_blocks.3"
    assert torch.equal(torch.cat([split[f"{prefix}.{name}.lora_B.weight"] for name in names]), update)
    assert all(split[f"{prefix}.{name}.lora_A.weight"].shape == (4, 32) for name in names)
    again = convert(split, to="comfyui")
    assert again["diffusion_model.single_blocks.3.linear1.lora_down.weight"].shape == (4, 32)
    assert torch.equal(again["diffusion_model.single_blocks.3.linear1.lora_up.weight"], update)


def test_changes_of_all_weights_of_sd3_are_those_of_its_checkpoint(stir):
    from tests.backends.single_files import _mmdit

    network = transformer("sd3")
    before = _mmdit(network)
    bare = Bare(network, "transformer.", everything=True)
    stir(bare.attach(AdapterConfig(kind="full", layers="everything")))
    tensors = to_file_keys(bare.adapter, bare.file_keys())
    changes = convert(tensors, {"modelspec.architecture": METADATA["sd3"]}, to="comfyui")
    trained = {f"{n}.{p}": v for n in bare.adapter.module_names for p, v in bare.adapter.layer(n).trained.items()}
    bare.detach()
    network.load_state_dict(trained, strict=False)
    after, names = _mmdit(network), {"weight": "diff", "bias": "diff_b"}
    for key, tensor in after.items():
        module, _, leaf = key.removeprefix("model.").rpartition(".")
        if leaf != "pos_embed":  # which does not train
            torch.testing.assert_close(changes.pop(f"{module}.{names[leaf]}"), tensor - before[key])
    assert not changes


def test_changes_of_a_fused_layer_of_flux_are_its_parts_one_below_the_other():
    draw = torch.Generator().manual_seed(0)
    block, parts = "transformer.single_transformer_blocks.3", ("attn.to_q", "attn.to_k", "proj_mlp")
    diffs = {name: torch.randn(128 if name == "proj_mlp" else 32, 32, generator=draw) for name in parts}
    tensors = {f"{block}.{name}.diff": tensor for name, tensor in diffs.items()}
    tensors |= {f"{block}.{name}.diff_b": tensor[:, 0] for name, tensor in diffs.items()}
    tensors |= {f"{block}.attn.norm_q.diff": torch.ones(8)}
    made, original = convert(tensors, to="comfyui"), "diffusion_model.single_blocks.3"
    rows = [diffs["attn.to_q"], diffs["attn.to_k"], torch.zeros(32, 32), diffs["proj_mlp"]]
    assert torch.equal(made[f"{original}.linear1.diff"], torch.cat(rows))
    assert torch.equal(made[f"{original}.linear1.diff_b"], torch.cat(rows)[:, 0])
    assert torch.equal(made[f"{original}.norm.query_norm.diff"], torch.ones(8)) and len(made) == 3
    with pytest.raises(ValueError, match="^to is 'diffusers', but this is a full file, and diffusers reads LoRA only"):
        convert(tensors, to="diffusers")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def unet(sdxl: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    types = (down[0], down[1], down[1]) if sdxl else (down[1], down[1], down[0])
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4} if sdxl else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 16, 32), layers_per_block=2, down_block_types=types,
            up_block_types=(up[0], up[0], up[1]) if sdxl else (up[1], up[0], up[0]), cross_attention_dim=24,
            attention_head_dim=4, norm_num_groups=4, projection_class_embeddings_input_dim=24 + 6 * 4 if sdxl else None,
            transformer_layers_per_block=(1, 1, 2) if sdxl else 1, **extra,
        )  # fmt: skip


def noise(network: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 3, 24, generator=draw)
    extra = {"text_embeds": torch.randn(2, 24, generator=draw), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return network(x, torch.tensor([10, 500]), text, added_cond_kwargs=extra).sample


@pytest.mark.parametrize("sdxl", [False, True])
def test_unet_files_of_every_format_have_one_effect_and_round_trips_are_exact(sdxl, stir, tmp_path):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    bare = Bare(unet(sdxl), "unet.")
    stir(bare.attach(AdapterConfig(rank=2, layers="all_linear_conv")), size=0.2)
    tensors, ours = to_file_keys(bare.adapter, bare.file_keys()), noise(bare.network)
    bare.detach()
    kohya = convert(tensors, to="kohya")
    assert any(key.startswith("lora_unet_input_blocks" if sdxl else "lora_unet_down_blocks") for key in kohya)
    assert equal(convert(kohya, to="diffusers"), tensors) and equal(convert(tensors, to="comfyui"), kohya)
    attach_tensors(bare, kohya)
    assert torch.equal(noise(bare.network), ours)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "feature_extractor"))
    if sdxl:
        nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "text_encoder_2", "tokenizer_2"))
    pipelines = {True: StableDiffusionXLPipeline, False: StableDiffusionPipeline}
    only = {} if sdxl else {"safety_checker": None}
    for format, file in {"diffusers": tensors, "kohya": kohya}.items():
        save_adapter(tmp_path / f"{format}.safetensors", file, {})
        pipeline = pipelines[sdxl](unet=unet(sdxl), **nothing, **only)
        pipeline.load_lora_weights(tmp_path, weight_name=f"{format}.safetensors")
        assert (noise(pipeline.unet) - ours).abs().max() < 1e-4


def test_text_encoders_change_their_prefix():
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    for network, ours, count in (
        ("lora_unet_down_blocks_0_attentions_0_proj_in", ("lora_te_",), 1),
        ("lora_unet_input_blocks_4_1_proj_in", ("lora_te1_", "lora_te2_"), 2),
    ):
        file = {
            f"{prefix}.{part}": tensor
            for prefix in (network, *(f"{te}{name.replace('.', '_')}" for te in ours))
            for part, tensor in (
                ("lora_down.weight", torch.ones(2, 8)),
                ("lora_up.weight", torch.ones(8, 2)),
                ("alpha", torch.tensor(2.0)),
            )
        }
        metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base"} if count == 2 else {}
        other = convert(file, metadata, to="diffusers")
        encoders = ["text_encoder", "text_encoder_2"][:count]
        assert {key for key in other if key.startswith("text")} == {
            f"{encoder}.{name}.lora_{part}.weight" for encoder in encoders for part in "AB"
        }
        assert equal(convert(other, metadata, to="kohya"), file)


def test_what_cannot_be_converted_says_why(stir, tmp_path):
    for kind, reason in (("dora", "magnitudes depend on the base weights"), ("loha", "diffusers reads LoRA only")):
        bare = attached(kind, stir, "diffusion_model.double_blocks.0.")
        with pytest.raises(ValueError, match=f"^to is 'diffusers'.*{reason}"):
            convert(to_file_keys(bare.adapter, bare.file_keys()), to="diffusers")
    peft = attached("dora", stir, "transformer.single_transformer_blocks.0.")
    tensors = to_file_keys(peft.adapter, peft.file_keys())
    with pytest.raises(ValueError, match="^to is 'kohya', but this is a dora file"):
        convert({key: tensor for key, tensor in tensors.items() if "dora_scale" not in key}, to="kohya")
    down, up = torch.ones(1, 5), torch.ones(5, 1)
    either = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": down}
    either["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = up
    with pytest.raises(ValueError, match="both SD3 and Flux"):
        convert(either, to="comfyui")
    with pytest.raises(ValueError, match="^to is 'other', but it takes one of comfyui, kohya, diffusers"):
        convert(either, to="other")
    with pytest.raises(ValueError, match="in no known format: nowhere"):
        convert({"nowhere.lora_down.weight": down, "nowhere.lora_up.weight": up}, to="kohya")
    save_adapter(tmp_path / "one.safetensors", either, {})
    with pytest.raises(ValueError, match=r"one\.safetensors: .*both SD3 and Flux") as caught:
        convert_file(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "kohya")
    assert "\n" not in str(caught.value) and not (tmp_path / "two.safetensors").exists()


def test_convert_file_carries_the_metadata(stir, tmp_path):
    _, tensors = transformer_lora("flux", "attention", stir)
    metadata = {"modelspec.architecture": METADATA["flux"], "anchor.w": "0.5"}
    save_adapter(tmp_path / "one.safetensors", tensors, metadata)
    convert_file(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "comfyui")
    made, carried = load_adapter(tmp_path / "two.safetensors")
    assert carried == metadata and equal(made, convert(tensors, metadata, to="comfyui"))


# --- metadata -----------------------------------------------------------------------------------------------------


def test_metadata_holds_every_setting_and_what_others_read(eps_denoiser, concept):
    eps_denoiser.attach(AdapterConfig(rank=3, kind="loha", layers="cross_attention_kv"))
    settings = TrainSettings(steps=9, seed=4)
    metadata = adapter_metadata(eps_denoiser, concept, settings, steps=5)
    assert {name: metadata[f"anchor.{name}"] for name in vars(settings)} == {
        name: str(5 if name == "steps" else value) for name, value in vars(settings).items()
    }
    expected = {
        "anchor.kind": "loha",
        "anchor.text_encoder": "False",
        "anchor.dropout": "0.0",
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "loha"}',
        "ss_network_dim": "3",
        "ss_network_alpha": "3.0",
        "ss_base_model_version": "sd_v1",
        "ss_max_train_steps": "9",
        "ss_steps": "5",
        "modelspec.architecture": "stable-diffusion-v1/loha",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
    }
    assert {name: metadata[name] for name in expected} == expected
    assert "anchor.ranks" not in metadata and "None" not in metadata.values()


def test_the_same_adapter_is_the_same_file_in_every_process(tmp_path):
    program = (
        "import sys, torch; from anchor_core.adapter_file import save_adapter; "
        "save_adapter(sys.argv[1], {'b': torch.ones(3), 'a': torch.zeros(2)}, {str(i): 'x' for i in range(20)})"
    )
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for file in files:
        subprocess.run([sys.executable, "-c", program, str(file)], check=True, cwd=comfy_server.ROOT)
    assert files[0].read_bytes() == files[1].read_bytes()
    tensors, metadata = load_adapter(files[0])
    assert torch.equal(tensors["b"], torch.ones(3)) and metadata["7"] == "x" and len(metadata) == 20
