"""Our files through the LoRA loaders of diffusers and ComfyUI."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter, to_file_keys
from anchor_core.adapters.formats import FORMATS, convert
from anchor_core.adapters.kinds import KINDS
from anchor_core.adapters.names import dotted, to_diffusers, to_original
from tests.adapters.networks import (
    METADATA,
    Bare,
    attached,
    check_weights,
    transformer,
    transformer_lora,
)
from tests.comfyui import comfy_server

found = comfy_server.find()
needs_comfyui = pytest.mark.skipif(isinstance(found, str), reason=str(found))


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
