"""Which MODELs can be trained through."""

from __future__ import annotations

import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
from torch import Tensor, nn

from .layers import LAYERS, is_gguf, is_mixed, is_plain
from .patches import origin


def check_trainable(model: comfy.model_patcher.ModelPatcher) -> None:
    """Refuse a MODEL that cannot be trained through.

    Raises:
        ValueError: one sentence that says why, and what to switch.
    """
    wrapped = model.model_options.get("model_function_wrapper")
    reasons = {
        "carries a LoRA in bypass mode; load that LoRA without bypass": bool(model.injections),
        "carries hooks; connect it without them": bool(model.hook_patches) or model.forced_hooks is not None,
        f"has a function wrapped around it by another node ({origin(wrapped)}); connect the model from before": wrapped,
        "multiplies in fp8 (fp8_e4m3fn_fast, --fast fp8_matrix_mult); load it with weight_dtype fp8_e4m3fn": any(
            isinstance(module, comfy.ops.fp8_ops.Linear) for module in model.model.modules()
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"this model cannot be trained on: it {reason}")
    for name, module in model.model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not is_plain(parameter) and not _is_known(module, parameter):
                stored = getattr(parameter, "_layout_cls", None) or parameter.dtype
                raise ValueError(
                    f"this model's {name}.{leaf} of a {type(module).__name__} is quantised ({stored}) in a way that "
                    "training does not know; connect a model in 32 or 16 bit, or in fp8"
                )


def _is_known(module: nn.Module, parameter: Tensor) -> bool:
    """Whether gradients flow through a module whose parameter stands for other values."""
    if isinstance(parameter, comfy.quant_ops.QuantizedTensor):
        casts = isinstance(module, comfy.ops.CastWeightBiasOp)
        return casts and (is_mixed(module) or isinstance(module, (*LAYERS, nn.Embedding)))
    return is_gguf(module)
