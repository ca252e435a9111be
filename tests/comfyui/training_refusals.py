"""Models and adapters that ComfyUI's backend cannot train on or apply, and what is said of them."""

from __future__ import annotations

import comfy.model_sampling
import comfy.ops
import comfy.quant_ops
import comfy_models as models
import contract
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import to_file_keys
from anchor_core.backends.comfyui.apply import apply_adapter
from anchor_core.backends.comfyui.denoiser import ComfyDenoiser


def refusal(kind: str) -> str:
    """What is said of a model that cannot be trained on."""
    model, clip, vae = models.build("flux" if kind == "packed_latents" else "sd1")
    if kind == "fp8_matrix_mult":
        model.model.diffusion_model.time_embed[0].__class__ = comfy.ops.fp8_ops.Linear
    elif kind == "quantised":
        layout = comfy.quant_ops.QuantizedTensor.from_float(torch.randn(32, 32), "TensorCoreFP8E4M3Layout")
        model.model.diffusion_model.quantised = torch.nn.Parameter(layout, requires_grad=False)
    elif kind == "integers":
        layer = model.model.diffusion_model.out[2]
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    elif kind == "packed_latents":
        bases = (comfy.model_sampling.ModelSamplingAV, comfy.model_sampling.CONST)
        model.add_object_patch("model_sampling", type("ModelSampling", bases, {})(model.model.model_config))
    try:
        with ComfyDenoiser(model, clip, vae) as denoiser:
            denoiser.attach(AdapterConfig(text_encoder=kind == "text_encoder"))
    except ValueError as error:
        return str(error)
    return ""


def refusal_of_adapter(kind: str) -> str:
    """What is said of an adapter for another size of the same architecture."""
    other = models.UNET | {"context_dim": 2 * models.WIDTH}
    with ComfyDenoiser(*models.build("sd1")) as denoiser, contract.attached(denoiser, kind=kind) as adapter:
        tensors = to_file_keys(adapter, denoiser.file_keys())
    models.FAMILIES["other"] = models.Family(models.supported.SD15, other)
    try:
        apply_adapter(models.build("other")[0], tensors, 1.0)
    except ValueError as error:
        return str(error)
    return ""
