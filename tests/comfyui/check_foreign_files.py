"""Run under ComfyUI's interpreter: LoRA files of other programs, for `test_foreign_files_comfyui.py`.

Usage: check_foreign_files.py COMFYUI PACK FOLDER. `FOLDER/results.json` becomes what is wrong by case, or "": whether
Apply Adapter and a denoiser's adapter make the weights of a file that ComfyUI's own loader makes of the same LoRA under
the names that it documents.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

comfyui, pack, folder = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [comfyui, pack]  # in this order: both have a `nodes`

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import comfy_models as models  # noqa: E402
import comfy_text_encoders  # noqa: E402
import contract  # noqa: E402
import torch  # noqa: E402

from anchor_core.adapters.attach import attach_tensors  # noqa: E402
from anchor_core.backends.comfyui.apply import apply_adapter  # noqa: E402
from anchor_core.backends.comfyui.denoiser import ComfyDenoiser  # noqa: E402

PROCESSOR = "_lora.down.weight", "_lora.up.weight"
PEFT = ".lora_A.weight", ".lora_B.weight"
NAMED = ".lora_A.default_0.weight", ".lora_B.default_0.weight"
KOHYA = ".lora_down.weight", ".lora_up.weight"
OLD = ".lora.down.weight", ".lora.up.weight"


def factors(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, columns, generator=draw), 0.3 * torch.randn(rows, 2, generator=draw)


def spelled(names, parts=PEFT) -> dict[str, torch.Tensor]:
    """A file: (prefix, rows, columns) for each layer."""
    file = {}
    for seed, (prefix, rows, columns) in enumerate(names):
        file |= {prefix + part: tensor for part, tensor in zip(parts, factors(rows, columns, seed))}
    return file


def unet_cases(model) -> dict[str, tuple[dict, dict]]:
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    found = [n[:-7] for n in names if n.endswith(("attn1.to_q.weight", "attn2.to_v.weight", "attn1.to_out.0.weight"))]
    state = model.model.diffusion_model.state_dict()
    sizes = {name: state[names[f"{name}.weight"]].shape for name in found}

    def file(spelling, parts=PEFT) -> dict:
        return spelled([(spelling(name), *sizes[name]) for name in found], parts)

    def processor(name: str) -> str:
        return name.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_")

    stock = file(lambda name: f"lora_unet_{name.replace('.', '_')}", KOHYA)
    original = {name: names[f"{name}.weight"][:-7] for name in found}
    cases = {
        "kohya": stock,
        "peft": file(lambda name: f"unet.{name}"),
        "peft named": file(lambda name: f"unet.{name}", NAMED),
        "diffusers old": file(lambda name: f"unet.{name}", OLD),
        "processor": file(lambda name: f"unet.{processor(name)}", PROCESSOR),
        "processor bare": file(processor, PROCESSOR),
        "base_model": file(lambda name: f"base_model.model.{name}"),
        "unet.base_model": file(lambda name: f"unet.base_model.model.{name}"),
        "bare": file(lambda name: name),
        "lycoris": file(lambda name: f"lycoris_{name.replace('.', '_')}", KOHYA),
        "original": file(lambda name: f"diffusion_model.{original[name]}", KOHYA),
    }
    same = {name: (case, stock) for name, case in cases.items()}
    narrow = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in stock.items()}
    same["fp8"] = narrow, {key: tensor.float() for key, tensor in narrow.items()}
    norm = next(n for n in names.values() if n.endswith("norm1.weight"))[:-7]
    draw = torch.Generator().manual_seed(9)
    linear = original[found[-1]]
    trained = spelled([(f"diffusion_model.{linear}", *sizes[found[-1]])], KOHYA)
    trained |= {
        f"diffusion_model.{norm}.{part}": torch.randn(state[f"{norm}.weight"].shape) for part in ("diff", "diff_b")
    }
    if f"{linear}.bias" in state:
        trained[f"diffusion_model.{linear}.diff_b"] = torch.randn(sizes[found[-1]][:1], generator=draw)
    same["TrainLoraNode"] = trained, trained
    return same


def text_cases(clip) -> dict[str, tuple[dict, dict]]:
    layers = [f"encoder.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.fc1")]
    state = clip.cond_stage_model.state_dict()

    def file(one: str, two: str, inner: str = "text_model.", parts=PEFT) -> dict:
        names = []
        for prefix, encoder in ((one, "clip_l"), (two, "clip_g")):
            for layer in layers:
                size = state[f"{encoder}.transformer.text_model.{layer}.weight"].shape
                spelling = inner + layer
                names.append((prefix + (spelling if prefix.endswith(".") else spelling.replace(".", "_")), *size))
        return spelled(names, parts)

    stock = file("lora_te1_", "lora_te2_", parts=KOHYA)
    cases = {
        "te kohya": stock,
        "te diffusers": file("text_encoder.", "text_encoder_2."),
        "te transformers 5": file("text_encoder.", "text_encoder_2.", inner=""),
        "te kohya, transformers 5": file("lora_te1_", "lora_te2_", inner="", parts=KOHYA),
        "te ComfyUI": file("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
        "te linear layer": file(
            "text_encoder.", "text_encoder_2.", parts=(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
        ),
    }
    return {name: (case, stock) for name, case in cases.items()}


def transformer_cases(model, family: str) -> dict[str, tuple[dict, dict]]:
    maps = {"flux": comfy.utils.flux_to_diffusers, "sd3": comfy.utils.mmdit_to_diffusers}
    places = maps[family](model.model.model_config.unet_config, output_prefix="")
    state = model.model.diffusion_model.state_dict()
    wanted = ("to_q.weight", "add_v_proj.weight", "to_out.0.weight", "proj_mlp.weight")
    names = []
    for name, to in places.items():
        place, offset = (to, None) if isinstance(to, str) else to[:2]
        if name.endswith(wanted) and place in state:
            size = list(state[place].shape)
            size[0] = size[0] if offset is None else offset[2]
            names.append((name[:-7], *size))

    def file(spelling, parts=PEFT) -> dict:
        return spelled([(spelling(name), *size) for name, *size in names], parts)

    stock = file(lambda name: f"transformer.{name}")
    cases = {
        "peft": stock,
        "peft named": file(lambda name: f"transformer.{name}", NAMED),
        "base_model": file(lambda name: f"base_model.model.{name}"),
        "bare": file(lambda name: name),
        "lycoris": file(lambda name: f"lycoris_{name.replace('.', '_')}", KOHYA),
        "OneTrainer": file(lambda name: f"lora_transformer_{name.replace('.', '_')}", KOHYA),
    }
    same = {name: (case, stock) for name, case in cases.items()}
    t5 = spelled([("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", 8, 8)])
    bundle = {"bundle_emb.sks.clip_l": torch.ones(1, 8)}
    same["T5 and bundled embeddings"] = stock | t5 | bundle, stock
    if family == "flux":
        same |= x_flux(state)
        name, rows, columns = names[0]
        biased = spelled([(f"transformer.{name}", rows, columns)])
        place, offset = places[f"{name}.weight"][:2]
        same["lora_B.bias"] = biased | {f"transformer.{name}.lora_B.bias": torch.ones(rows)}, biased
    return same


def x_flux(state) -> dict[str, tuple[dict, dict]]:
    names = {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
        "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
        "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
        "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
        "single_blocks.0.processor.qkv_lora": "single_blocks.0.linear1_qkv",
        "single_blocks.0.processor.proj_lora": "single_blocks.0.linear2",
    }
    hidden = state["double_blocks.0.img_attn.proj.weight"].shape[0]
    sizes = {name: (3 * hidden, hidden) for name in names if "qkv" in name}
    sizes |= {name: state[f"{names[name]}.weight"].shape for name in names if "proj" in name}
    file = spelled([(name, *sizes[name]) for name in names], (".down.weight", ".up.weight"))
    stock = spelled([(f"diffusion_model.{names[name]}", *sizes[name]) for name in names], KOHYA)
    return {"x-flux": (file, stock)}


# --- what each makes of a file ------------------------------------------------------------------------------------


def weights(patcher, patched) -> dict[str, torch.Tensor]:
    """The weights that a patched MODEL or CLIP has, those that are changed."""
    state = patcher.model_state_dict()
    return {
        key: comfy.lora.calculate_weight(patches, state[key].clone().float(), key)
        for key, patches in patched.patches.items()
    }


def check_apply(model, clip, file: dict, stock: dict) -> None:
    theirs = comfy.sd.load_lora_for_models(model, clip, stock, 1.0, 1.0)
    ours = apply_adapter(model, file, 1.0, clip)
    for base, one, other in zip((model, getattr(clip, "patcher", None)), ours, theirs):
        if base is None:
            continue
        one, other = weights(base, getattr(one, "patcher", one)), weights(base, getattr(other, "patcher", other))
        extra = {key for key in one.keys() - other.keys() if key.endswith(".bias")}
        assert one.keys() - extra == other.keys(), sorted(one.keys() ^ other.keys())
        for key, weight in other.items():
            torch.testing.assert_close(
                one[key], weight, atol=1e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
    assert any(each.patches for each in (theirs[0], getattr(theirs[1], "patcher", None)) if each is not None)


def check_attach(model, clip, vae, file: dict, stock: dict) -> None:
    theirs = comfy.sd.load_lora_for_models(model, clip if isinstance(clip, comfy.sd.CLIP) else None, stock, 1.0, 1.0)
    expected = weights(model, theirs[0])
    if theirs[1] is not None:
        expected |= weights(clip.patcher, theirs[1].patcher)
    with ComfyDenoiser(model, clip, vae) as denoiser, torch.no_grad():
        adapter = attach_tensors(denoiser, file)
        encoders = {"te1": "clip_l", "te2": "clip_g"}
        for name in adapter.module_names:
            prefix, _, inner = name.rpartition(":")
            place = f"{encoders[prefix]}.transformer.{inner}" if prefix else f"diffusion_model.{inner}"
            layer, base = adapter.layer(name), adapter.base_module(name)
            if not isinstance(base, torch.nn.Linear):
                made = layer.trained["weight"]
            else:
                zero = layer(torch.zeros(1, base.in_features))
                made = (layer(torch.eye(base.in_features)) - zero).T
                if f"{place}.bias" in expected:
                    torch.testing.assert_close(zero[0], expected[f"{place}.bias"], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                made,
                expected.pop(f"{place}.weight"),
                atol=1e-4,
                rtol=1e-4,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    assert not [key for key in expected if key.endswith(".weight")], list(expected)


LYCORIS = {"ss_network_module": "lycoris.kohya"}


class File(dict):
    """A LORA_MODEL that remembers its file's metadata."""

    metadata = LYCORIS


def kind_cases(model) -> dict[str, dict[str, torch.Tensor]]:
    """Parts of a layer of 32 x 32 and of a convolution of 32 x 32 x 3 x 3, of the kinds that LyCORIS writes."""
    draw = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=draw)

    lora = {"lora_down.weight": some(2, 32), "lora_up.weight": some(32, 2), "alpha": torch.tensor(1.0)}
    loha = {f"hada_w{i}_{part}": some(*size) for i in (1, 2) for part, size in (("a", (32, 2)), ("b", (2, 32)))}
    lokr = {"lokr_w1": some(4, 4), "lokr_w2_a": some(8, 2), "lokr_w2_b": some(2, 8), "alpha": torch.tensor(1.0)}
    oft = {"oft_blocks": some(8, 4, 4), "alpha": torch.tensor(0.01), "rescale": 1 + some(32, 1)}
    linear = {
        "dora by rows": lora | {"dora_scale": 1 + some(32, 1)},
        "dora by channels": lora | {"dora_scale": 1 + some(1, 32)},
        "loha, dora": loha | {"dora_scale": 1 + some(32, 1)},
        "lokr": lokr,
        "lokr, dora": lokr | {"dora_scale": 1 + some(1, 32)},
        "peft's dora": lora | {"lora_magnitude_vector": 1 + some(32)},
        "oft": oft,
        "boft": {"oft_blocks": some(3, 8, 4, 4)},
        "glora": {
            "a1.weight": some(32, 2),
            "a2.weight": some(2, 32),
            "b1.weight": some(32, 2),
            "b2.weight": some(2, 32),
        },
        "ia3": {"weight": some(32), "on_input": torch.tensor(0)},
        "ia3 by input": {"weight": some(32), "on_input": torch.tensor(1)},
    }
    core = {
        "lora_down.weight": some(2, 32, 1, 1),
        "lora_mid.weight": some(2, 2, 3, 3),
        "lora_up.weight": some(32, 2, 1, 1),
    }
    convolution = {
        "lora of Tucker": core,
        "loha of Tucker": {f"hada_w{i}_{part}": 5 * some(2, 32) for i in (1, 2) for part in "ab"}
        | {f"hada_t{i}": some(2, 2, 3, 3) for i in (1, 2)},
        "lokr of Tucker": {
            "lokr_w1": some(4, 4),
            "lokr_w2_a": some(2, 8),
            "lokr_w2_b": some(2, 8),
            "lokr_t2": some(2, 2, 3, 3),
        },
        "oft of a convolution": oft | {"rescale": 1 + some(32, 1, 1, 1)},
        "dora by channels of a convolution": core | {"dora_scale": 1 + some(1, 32, 1, 1)},
    }
    names = {"middle_block.1.transformer_blocks.0.attn1.to_q": linear, "middle_block.0.in_layers.2": convolution}
    return {
        kind: {f"diffusion_model.{name}.{part}": tensor for part, tensor in parts.items()}
        for name, kinds in names.items()
        for kind, parts in kinds.items()
    }


def check_kind(model, vae, file: dict) -> None:
    """That Apply Adapter, at any strength, and a denoiser make the same weight of a layer."""
    file = File(file)
    (key,) = {key.rpartition(".")[0] for key in weights(model, apply_adapter(model, file, 1.0)[0])}
    made = {s: weights(model, apply_adapter(model, file, s)[0])[f"{key}.weight"] for s in (1.0, 0.5)}
    plain = model.model_state_dict()[f"{key}.weight"].float()
    assert (made[1.0] - plain).abs().max() > 1e-2
    torch.testing.assert_close(made[0.5], (made[1.0] + plain) / 2, atol=1e-4, rtol=1e-4)
    with ComfyDenoiser(model, models.Clip(False), vae) as denoiser, torch.no_grad():
        adapter = attach_tensors(denoiser, file, file.metadata)
        name = key.removeprefix("diffusion_model.")
        layer, base = adapter.layer(name), adapter.base_module(name)
        size = (4, 32) if isinstance(base, torch.nn.Linear) else (4, 32, 8, 8)
        x = torch.randn(size, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(
            layer(x), torch.func.functional_call(base, {"weight": made[1.0]}, x), atol=1e-4, rtol=1e-4
        )


class Told(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def strangers(model) -> dict[str, tuple[dict, dict]]:
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    size = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q.weight.shape
    some = spelled([(name, *size), ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_k", *size)], KOHYA)
    other = spelled([("lora_unet_middle_block_9_nowhere", 8, 8)], KOHYA)
    return {"some": (some | other, some), "most": (spelled([("nowhere.a", 8, 8), ("nowhere.b", 8, 8)]) | other, some)}


def outcomes() -> dict[str, str]:
    found, told = {}, Told()
    logging.getLogger("anchor_core.adapters.reading").addHandler(told)
    sd1, sdxl = models.build("sd1"), comfy_text_encoders.sdxl()
    cases = [("sd1", (sd1[0], None, sd1[2]), unet_cases(sd1[0]))]
    cases += [("sdxl", sdxl, text_cases(sdxl[1]))]
    # The real ones' MLPs are four times as wide, which their files take for granted.
    models.FAMILIES["flux"] = models.Family(models.supported.Flux, models.FLUX | {"mlp_ratio": 4.0})
    for family in ("sd3", "flux"):
        built = models.build(family)
        cases.append((family, (built[0], None, built[2]), transformer_cases(built[0], family)))
    for family, (model, clip, vae), files in cases:
        plain = clip or models.Clip(False)
        for name, (file, stock) in files.items():
            applied = clip
            if name.startswith("T5"):  # of which the model's CLIP has none
                file_of_apply = {key: tensor for key, tensor in file.items() if not key.startswith("text_encoder")}
            else:
                file_of_apply = file
            found[f"{family}, {name}, apply"] = contract.outcome(check_apply, model, applied, file_of_apply, stock)
            found[f"{family}, {name}, attach"] = contract.outcome(check_attach, model, plain, vae, file, stock)
    for kind, file in kind_cases(sd1[0]).items():
        found[f"kind, {kind}"] = contract.outcome(check_kind, sd1[0], sd1[2], file)
    found["T5 is told"] = "" if any("2 of the LoRA's" in line for line in told.lines) else str(told.lines)
    told.lines.clear()
    files = strangers(sd1[0])
    found["strangers, apply"] = contract.outcome(check_apply, sd1[0], None, *files["some"])
    assert ["1 of the LoRA's 3 layers are not read: lora_unet_middle_block_9_nowhere"] == told.lines, told.lines
    for name, run in {
        "apply": lambda: apply_adapter(sd1[0], files["most"][0], 1.0),
        "attach": lambda: check_attach(*sd1, *files["most"]),
    }.items():
        told_as = contract.outcome(run)
        found[f"most are strangers, {name}"] = (
            "" if "made for another model: 3 of its 3 layers belong to no module" in told_as else told_as or "read"
        )
    return found


(Path(folder) / "results.json").write_text(json.dumps(outcomes()))
