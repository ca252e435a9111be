"""Run under ComfyUI's interpreter: quantised models train, are applied to, guided and inspected as what they stand for.

Usage: check_quantised.py COMFYUI PACK OUTPUT GGUF_PACK [--paged] [FORMAT ...]. OUTPUT becomes a JSON object: format to
what is wrong by check, or "". GGUF_PACK is the folder of ComfyUI-GGUF, or "" where none of its formats is asked for.
With `--paged` the quantised models are loaded as with dynamic VRAM (`paged_vram.py`): ComfyUI's own lie in pages, and
those of ComfyUI-GGUF, which makes a plain patcher of the loader's, do not.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
import zlib
from pathlib import Path

LAYOUTS = {
    "float8_e4m3fn": ("TensorCoreFP8E4M3Layout", {}),
    "float8_e5m2": ("TensorCoreFP8E5M2Layout", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "int8_tensorwise": ("TensorWiseINT8Layout", {}),
    "int8_rotated": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True, "convrot_groupsize": 64}),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64, "quant_group_size": 64}),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", {"convrot_groupsize": 64, "group_size": 16}),
}
"""ComfyUI's formats, by what `comfy_quant` says, with the tensor layout and what it is made with."""
NATIVE = "native"
"""In the place of a format: `check_native`."""
SHORT = ("float8_e4m3fn", "nvfp4", "int8_tensorwise", NATIVE)
EXACT = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8")
"""Formats that a machine without the instructions multiplies with after dequantising: equal to what they stand for."""
SHORT_GGUF = ("Q8_0", "Q4_K")
GGUF = ("Q8_0", "Q4_0", "Q5_1", "BF16", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
K_SCALES = {
    "Q2_K": (2e-3, 80, 82), "Q3_K": (5e-4, 108), "Q4_K": (1e-4, 0, 2), "Q5_K": (5e-5, 0, 2), "Q6_K": (3e-5, 208),
}  # fmt: skip
"""The size of a block's scales and where they are in it."""

if __name__ == "__main__":
    comfyui, pack, output, gguf_pack, *formats = sys.argv[1:]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[:0] = [comfyui, pack, str(Path(__file__).parent)]  # in this order: ComfyUI has `nodes` and `tests` too

    import paged_vram

    if paged := "--paged" in formats:
        formats.remove("--paged")
        paged_vram.install()

    import comfy.options

    comfy.options.enable_args_parsing()

    import comfy.ops
    import comfy.quant_ops
    import comfy.sd
    import comfy_models as models
    import contract
    import numpy as np
    import torch
    from comfy_training import (
        assert_near,
        checked_up,
        gradients,
        guided_picture,
        picture,
        predict,
        run_training,
        trained,
    )
    from torch import Tensor

    from anchor_core.adapters.attach import attach_tensors
    from anchor_core.backends.comfyui.apply import apply_adapter
    from anchor_core.backends.comfyui.denoiser import ComfyDenoiser

    if gguf_pack:
        import gguf

        # Its `__init__` needs ComfyUI's `nodes`, which are not what is tested.
        sys.modules["gguf_pack"] = types.ModuleType("gguf_pack")
        sys.modules["gguf_pack"].__path__ = [gguf_pack]
        gguf_ops, gguf_loader, gguf_nodes, gguf_dequant = (
            importlib.import_module(f"gguf_pack.{name}") for name in ("ops", "loader", "nodes", "dequant")
        )

    WIDE = models.FLUX | {"hidden_size": 256, "num_heads": 4, "axes_dim": [16, 24, 24], "mlp_ratio": 1.0}

TRAINED = r"(img|txt)_attn\.(qkv|proj)|linear[12]|(img|txt)_mlp\.[02]"


def build(operations=None, state: dict[str, Tensor] | None = None):
    """A Flux of 256 channels; of the given layers and weights."""
    config = models.supported.Flux(dict(WIDE))
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = operations
    model = config.get_model({}, device=torch.device("cpu"))
    if state is None:
        models.fill(model.diffusion_model)
    else:
        model.diffusion_model.load_state_dict(dict(state))
    patcher = models.patcher_of(model)
    if paged and operations is not None:
        patcher = paged_vram.dynamic(patcher)
    if operations is not None and operations.__name__ == "GGMLOps":
        patcher = gguf_nodes.GGUFModelPatcher.clone(patcher)
    return patcher, models.Clip(False), models.Vae(16, False)


def plain_state() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in build()[0].model.diffusion_model.state_dict().items()}


def chosen(state: dict[str, Tensor]) -> list[str]:
    """The weights of a file that are quantised."""
    matrices = [name for name, tensor in state.items() if "_blocks." in name and tensor.ndim == 2]
    return [name for name in matrices if state[name].shape[-1] % 256 == 0]


def mixed(kind: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors with most layers quantised, and what they stand for."""
    layout, options = LAYOUTS[kind]
    file, means = dict(state), dict(state)
    conf = {"format": "int8_tensorwise" if kind.startswith("int8") else kind}
    conf |= {name: value for name, value in options.items() if name not in ("quant_group_size", "per_channel")}
    for name in chosen(state):
        tensor = comfy.quant_ops.QuantizedTensor.from_float(file.pop(name), layout, **options)
        means[name] = tensor.dequantize().float()
        file |= tensor.state_dict(name)
        told = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
        file[f"{name.removesuffix('weight')}comfy_quant"] = told
    return file, means


def gguf_file(kind: str, state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same for a file of the `gguf` package, as ComfyUI-GGUF reads it."""
    writer, quant = gguf.GGUFWriter(path, "flux"), gguf.GGMLQuantizationType[kind]
    for name, tensor in state.items():
        values = tensor.numpy()
        if name in chosen(state):
            data = k_blocks(kind, values.shape) if kind in K_SCALES else gguf.quants.quantize(values, quant)
            writer.add_tensor(name, data, raw_dtype=quant)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, read = gguf_loader.gguf_sd_loader(str(path)), gguf_dequant.dequantize_tensor
    return file, {name: read(tensor, torch.float32).as_subclass(Tensor) for name, tensor in file.items()}


def k_blocks(kind: str, shape: tuple[int, int]):
    """Blocks of any bits, with scales of a moderate size: the package reads K-quants, but does not write them."""
    size, length = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    draw, places = np.random.default_rng(0), K_SCALES[kind]
    blocks = draw.integers(0, 256, (shape[0] * shape[1] // size, length), dtype=np.uint8)
    for place in places[1:]:
        scales = (places[0] * draw.uniform(0.5, 1, len(blocks))).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def check_gradients(quantised, plain, shape, exact: bool) -> None:
    """Of adapters of each kind that reads weights and that does not, with checkpointing; none on the base itself."""
    for options in ({}, {"kind": "dora"}, {"kind": "svdiff"}, {"kind": "lokr"}):
        found = []
        for parts in (quantised, plain):
            with ComfyDenoiser(*parts) as denoiser:
                step = contract.make_step(denoiser, shape)
                found.append([gradients(denoiser, step, layers=TRAINED, **options)])
                if not options:
                    found[-1].append(gradients(denoiser, step, denoiser.blocks, layers=TRAINED))
        for ours, theirs in zip(*found):
            ours, theirs = (torch.cat([part.flatten().double() for part in each]) for each in (ours, theirs))
            cosine = torch.cosine_similarity(ours, theirs, dim=0)
            if exact:
                assert_near([ours], [theirs], 1e-5)
            assert cosine > 0.9, f"{options}: the gradient's cosine to what the weights stand for is {cosine:.4f}"


def check_endings(quantised, plain, shape, exact: bool) -> None:
    model, clip, vae = quantised
    first, before = picture(model, clip, shape), bits(model)
    for ending in (None, RuntimeError, torch.OutOfMemoryError):
        assert run_training(model, clip, vae, shape, ending) is ending
        assert torch.equal(picture(model, clip, shape), first) and bits(model) == before
        assert not paged_vram.pinned_pages()


def bits(model) -> list:
    """Every parameter as it is stored."""
    found = []
    for name, tensor in model.model.named_parameters():
        quantised = hasattr(tensor, "_qdata")
        parts = [getattr(tensor, each) for each in tensor.__tensor_flatten__()[0]] if quantised else [tensor]
        parts = [part.detach().as_subclass(Tensor).reshape(-1).view(torch.uint8) for part in parts]
        found.append((name, id(tensor), type(tensor), [zlib.crc32(part.numpy()) for part in parts]))
    return found


def check_files(quantised, plain, shape, exact: bool) -> None:
    """A LoRA from one base does on the other what it does there; ComfyUI rounds the weights that it patches."""
    tensors, wanted, _ = trained(*quantised, shape, layers=TRAINED, alpha=1.0)
    given = predict(apply_adapter(plain[0], tensors, 1.0)[0], *plain[1:], shape)
    assert near(given, wanted, 1e-4 if exact else 0.3), "on the plain base the LoRA does something else"
    with ComfyDenoiser(*quantised) as denoiser, torch.no_grad():
        attach_tensors(denoiser, tensors)
        condition = denoiser.encode_prompt("a photo of a dog")
        given = denoiser.predict(contract.draw(denoiser, shape), contract.times(denoiser), [condition] * 3)
    assert near(given, wanted, 1e-5), "read from its file the LoRA does something else"
    ours = predict(apply_adapter(quantised[0], tensors, 1.0)[0], *quantised[1:], shape)
    stock = comfy.sd.load_lora_for_models(quantised[0], None, dict(tensors), 1.0, 0.0)[0]
    assert near(ours, predict(stock, *quantised[1:], shape), 1e-4), "the stock loader does something else"
    assert near(ours, wanted, 0.3) and not near(ours, predict(*quantised, shape), 1e-3)


def near(one: Tensor, other: Tensor, limit: float) -> bool:
    return ((one - other).norm() / other.norm()).item() < limit


def check_guidance(quantised, plain, shape, exact: bool) -> None:
    """A rule with strengths by row, and a check-up, with products of factors and with dense differences."""
    for kind in ("lora", "dora"):
        tensors, *_ = trained(*plain, shape, layers=TRAINED, kind=kind)
        pictures = [guided_picture(model, clip, shape, tensors) for model, clip, _ in (quantised, plain)]
        # In ComfyUI's formats the weights are rounded again with the LoRA in them.
        limit = 0.5 if quantised[0].model.model_config.custom_operations.__name__ == "MixedPrecisionOps" else 1e-3
        assert near(*pictures, limit), f"{kind}: guided pictures differ"
        reports = []
        for parts in (quantised, plain):
            with ComfyDenoiser(*parts) as denoiser:
                reports.append(checked_up(denoiser, tensors, shape))
        assert near(*reports, 1e-3 if exact else 0.3), f"{kind}: check-ups differ"


def check_native(state: dict[str, Tensor], shape) -> None:
    """A format that this device cannot multiply trains by what its weights stand for; the layers are as before then."""
    file, means = mixed("mxfp8", state)
    quantised = build(comfy.ops.mixed_precision_ops({}, torch.float32), file)
    model, clip, _ = quantised
    try:
        picture(model, clip, shape)
        raise AssertionError("this device multiplies in mxfp8")
    except ValueError:  # ComfyUI alone
        pass
    mixed_layers = [each for each in model.model.modules() if hasattr(each, "_full_precision_mm")]
    before = [(type(each), each._full_precision_mm) for each in mixed_layers]
    check_gradients(quantised, build(None, means), shape, False)
    assert before == [(type(each), each._full_precision_mm) for each in mixed_layers] and before[0][1] is False


CHECKS = (check_gradients, check_endings, check_files, check_guidance)


def main() -> None:
    global build
    results: dict[str, dict[str, str]] = {}
    if paged:
        paged_vram.start(scale=1024)
        build = paged_vram.unpaged(build)
    shape = models.latent_shape("flux")
    with torch.inference_mode():  # as ComfyUI runs every prompt
        state = plain_state()
        for kind in formats or (*LAYOUTS, NATIVE, *(GGUF if gguf_pack else ())):
            if kind == NATIVE:
                results[kind] = {check_native.__name__: contract.outcome(check_native, state, shape)}
                continue
            if kind in LAYOUTS:
                operations = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=kind in EXACT)
                file, means = mixed(kind, state)
            else:
                operations = gguf_ops.GGMLOps
                file, means = gguf_file(kind, state, Path(output).with_suffix(f".{kind}.gguf"))
            parts = build(operations, file), build(None, means), shape, kind in EXACT or kind in GGUF
            results[kind] = {check.__name__: contract.outcome(check, *parts) for check in CHECKS}
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
