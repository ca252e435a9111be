"""ComfyUI's frozen layers with gradients through them, whose weights are made anew at each use.

A weight may be cast to the computing dtype, patched with a LoRA, dequantised, fetched from the host, or lie in a page
that is given to something else after the use (dynamic VRAM). What autograd kept of it would fill the memory, or be
another weight by the backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

SOURCES = ("_v", "weight_function", "bias_function")
"""Attributes by which ComfyUI tells a layer where its weight comes from."""


def is_paged(module: nn.Module) -> bool:
    """Whether a module's weights lie in pages that may be evicted between two uses."""
    return hasattr(module, "_v")


def is_mixed(module: nn.Module) -> bool:
    """Whether a module is the linear layer of ComfyUI's mixed precision, which is no `nn.Linear`."""
    return hasattr(module, "_full_precision_mm") and not hasattr(module, "num_experts")


def is_gguf(module: nn.Module) -> bool:
    """Whether a module is a layer of ComfyUI-GGUF, which casts its weights itself."""
    return hasattr(module, "is_ggml_quantized")


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its values itself, and is not a quantised one that stands for them."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()


def asks_again(module: nn.Module) -> bool:
    """Whether the weight in use is another than the tensor that a layer holds: cast, fetched or patched each time."""
    return bool(
        is_mixed(module)
        or getattr(module, "comfy_cast_weights", False)
        or getattr(module, "weight_function", ())
        or getattr(module, "bias_function", ())
    )


def holds_its_weight(layer: nn.Module, device: torch.device) -> bool:
    """Whether the tensor that a layer holds is its weight: in 16 or 32 bit, on the device, every LoRA patched in."""
    if not isinstance(layer, comfy.ops.CastWeightBiasOp):
        return True  # ComfyUI has no other place for it
    if is_paged(layer) or layer.weight_function:
        return False
    return is_plain(layer.weight) and layer.weight.dtype.itemsize > 1 and layer.weight.device.type == device.type


def dequantised(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that a tensor stands for, as a plain tensor."""
    return (tensor.dequantize() if isinstance(tensor, comfy.quant_ops.QuantizedTensor) else tensor).to(dtype)


def plain_values(layer: nn.Module, tensor: Tensor, device: torch.device) -> Tensor:
    """What one of a layer's stored tensors stands for, in float32, without LoRAs; of its own memory."""
    if is_gguf(layer) and hasattr(tensor, "tensor_type"):
        bare = type(tensor)(tensor.as_subclass(Tensor), tensor_type=tensor.tensor_type, tensor_shape=tensor.shape)
        return layer.get_weight(bare.to(device), torch.float32).clone()
    return dequantised(tensor.detach().to(device), torch.float32).clone()


def view(tensor: Tensor) -> Tensor:
    """Another tensor over the same bytes: an inference tensor in inference mode, else one that autograd may save."""
    other = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    other.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(other, requires_grad=False) if isinstance(tensor, nn.Parameter) else other


# --- weights that are asked for again -----------------------------------------------------------------------------


@contextmanager
def weight_in_use(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The weight and bias that a layer computes with, as plain tensors; they may be gone afterwards."""
    casting = {"dtype": dtype, "bias_dtype": dtype, "device": device}
    if is_gguf(layer):
        yield layer.cast_bias_weight(**casting)
        return
    with comfy.ops.CastBiasWeightContext(layer, **casting, offloadable=True) as (weight, bias):
        yield dequantised(weight, dtype), bias


class _AskAgain(torch.autograd.Function):
    """A frozen linear or convolution layer whose backward pass casts the weight again: nothing is kept between."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return layer.forward(x.detach())  # a quantised layer has an autograd function of its own else

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        layer, dtype, gradient = ctx.layer, ctx.dtype, gradient.to(ctx.dtype)
        with weight_in_use(layer, dtype, gradient.device) as (weight, _):
            if isinstance(layer, nn.Linear):
                scale = getattr(layer, "pre_quant_scale", None)  # what a quantised layer multiplies its input with
                gradient = gradient @ weight
                return gradient if scale is None else gradient * scale.to(gradient), None
            # The layer's own convolution, whatever its padding: it is linear, so any point serves.
            with torch.enable_grad():
                x = gradient.new_zeros(()).expand(ctx.shape).requires_grad_()
                y = layer._conv_forward(x, view(weight) if weight.is_inference() else weight, None)
            return torch.autograd.grad(y, x, gradient)[0], None


@cache
def asking(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of linear or convolution layers whose weights autograd does not keep."""

    def forward(layer: nn.Module, x: Tensor, *arguments, **options) -> Tensor:
        if arguments or options or not asks_again(layer):
            return kind.forward(layer, x, *arguments, **options)
        if x.requires_grad and torch.is_grad_enabled():
            return _AskAgain.apply(x, layer)
        with torch.no_grad() if is_paged(layer) else nullcontext():  # nothing to keep, so nothing to copy
            try:
                return kind.forward(layer, x)
            except ValueError as error:  # torch's for a product that this device has not, as of two e5m2
                if not is_mixed(layer) or layer._full_precision_mm:
                    raise
                _tell_dequantised(layer.quant_format, str(error))
                layer._full_precision_mm = True
            return kind.forward(layer, x)

    # peft knows linear layers by their class; nothing of `nn.Linear` itself is run.
    bases = (kind,) if issubclass(kind, LAYERS) else (kind, nn.Linear)
    return type(kind.__name__, bases, {"forward": forward, "_asked_again": kind})


@cache  # once, not for each layer
def _tell_dequantised(stored: str, error: str) -> None:
    logger.warning("%s weights are dequantised for each product, as this device has none for them (%s)", stored, error)


def lasting(cast):
    """ComfyUI's `cast_bias_weight` with weights that autograd may keep, where they would lie in pages.

    Pages and pinned memory are filled in inference mode, as in a prompt: what is made in one mode would be in the way
    in the other. What autograd could keep, such as a norm's, is copied out of the page.
    """

    def cast_bias_weight(module: nn.Module, *arguments, **options):
        if not is_paged(module):
            return cast(module, *arguments, **options)
        with torch.inference_mode():
            weight, bias, *rest = cast(module, *arguments, **options)
        if torch.is_grad_enabled() and not isinstance(module, nn.Embedding):
            weight, bias = (None if each is None else each.clone() for each in (weight, bias))
        return weight, bias, *rest

    return cast_bias_weight


@contextmanager
def holding(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """A layer with a copy of its weight in use in the place of what that is made of, for adapters that read it."""
    with torch.no_grad(), weight_in_use(layer, dtype, device) as (weight, bias):
        copies = {
            name: nn.Parameter(view(each).clone(), False)
            for name, each in (("weight", weight), ("bias", bias))
            if each is not None
        }
    parameters = dict(layer._parameters)
    sources = {name: vars(layer).pop(name) for name in SOURCES if name in vars(layer)}
    layer._parameters.update(copies)
    try:
        yield
    finally:
        layer._parameters.update(parameters)
        vars(layer).update(sources)


# --- layers that add in place -------------------------------------------------------------------------------------


@cache
def copying(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of modules that get copies of what they, or what comes after them, add to in place."""

    def forward(module: nn.Module, *arguments, **options):
        if torch.is_grad_enabled():
            arguments = [value.clone() for value in arguments[:1]] + list(arguments[1:])
            options |= {name: options[name].clone() for name in ("img", "txt") if name in options}
        return kind.forward(module, *arguments, **options)

    return type(kind.__name__, (kind,), {"forward": forward})
