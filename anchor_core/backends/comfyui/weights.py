"""The weights that ComfyUI manages, trained through in place: no second load, no copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import torch
from comfy.clip_model import CLIPLayer
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class TrainableWeights:
    """Between `load` and `restore`, gradients flow through the weights of a MODEL (and CLIP); then it is as it was.

    Two things keep autograd from ComfyUI's own weights. Inference tensors cannot be saved for a backward pass: views
    over the same bytes take their places. And where a weight is cast to the computing dtype, fetched from memory or
    patched with a LoRA at each use (fp8, low VRAM), autograd would keep every such copy until the backward pass: such
    layers ask for their weight again instead (`_AskAgain`).

    Blocks of Flux and CLIP, moreover, add in place to what their norms have saved by then. That is an error, or under
    gradient checkpointing a wrong gradient without one; both get copies, of which no more are kept than before.
    """

    def __init__(self, *models: comfy.model_patcher.ModelPatcher):
        self._models = models
        self._swapped: list[tuple[dict, str, Tensor]] = []
        self._classes: list[tuple[nn.Module, type]] = []
        self._streams = 0

    def load(self) -> None:
        """Have ComfyUI load the models, whole or in part, and make them trainable through."""
        management = comfy.model_management
        with torch.inference_mode():  # as in every prompt: what is moved stays what it was
            management.load_models_gpu(list(self._models))
        for model in self._models:
            model.pre_run()
        # A weight fetched over a stream lies in a buffer that the next one overwrites; autograd may hold a norm's.
        self._streams, management.NUM_STREAMS = management.NUM_STREAMS, 0
        views: dict[int, Tensor] = {}
        for module in self._modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_inference():
                        self._swapped.append((table, name, tensor))
                        table[name] = views.setdefault(id(tensor), _view(tensor))
            if isinstance(module, LAYERS) and isinstance(module, comfy.ops.CastWeightBiasOp):
                self._change(module, _asking(type(module)))
            elif isinstance(module, (DoubleStreamBlock, SingleStreamBlock, CLIPLayer)):
                self._change(module, _copying(type(module)))
                for child in module.children():
                    if isinstance(child, nn.LayerNorm):
                        self._change(child, _copying(type(child)))

    def _modules(self) -> list[nn.Module]:
        return [module for model in self._models for module in model.model.modules()]

    def _change(self, module: nn.Module, kind: type[nn.Module]) -> None:
        # Not the instance's `forward`, which gradient checkpointing wraps.
        self._classes.append((module, type(module)))
        module.__class__ = kind

    def restore(self) -> None:
        """Give ComfyUI the tensors and layers back. A second call does nothing."""
        while self._classes:
            module, module.__class__ = self._classes.pop()
        while self._swapped:
            table, name, original = self._swapped.pop()
            current = table[name]
            if current.data_ptr() != original.data_ptr():  # ComfyUI moved the weights to another device meanwhile
                with torch.inference_mode():
                    original.data = _view(current).data
            table[name] = original
        if self._streams:
            comfy.model_management.NUM_STREAMS, self._streams = self._streams, 0

    @contextmanager
    def released(self) -> Iterator[None]:
        """The models as ComfyUI knows them, while another one is loaded, which may unload these.

        Tensors that are made meanwhile are inference tensors: clone them afterwards.
        """
        with ExitStack() as stack:
            for model in self._models:
                stack.enter_context(_layers_out(model.model))
            self.restore()
            with torch.inference_mode():
                yield
            self.load()


class _AskAgain(torch.autograd.Function):
    """A frozen linear or convolution layer whose backward pass casts the weight again: nothing is kept between."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return layer.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        layer, dtype, gradient = ctx.layer, ctx.dtype, gradient.to(ctx.dtype)
        casting = {"dtype": dtype, "bias_dtype": dtype, "device": gradient.device, "offloadable": True}
        with comfy.ops.CastBiasWeightContext(layer, **casting) as (weight, _):
            if isinstance(layer, nn.Linear):
                return gradient @ weight, None
            # The layer's own convolution, whatever its padding: it is linear, so any point serves.
            with torch.enable_grad():
                x = gradient.new_zeros(()).expand(ctx.shape).requires_grad_()
                y = layer._conv_forward(x, weight, None)
            return torch.autograd.grad(y, x, gradient)[0], None


def asks_again(module: nn.Module) -> bool:
    """Whether a layer's weight in use is another than the tensor it holds: cast, fetched or patched each time."""
    return bool(
        getattr(module, "comfy_cast_weights", False)
        or getattr(module, "weight_function", ())
        or getattr(module, "bias_function", ())
    )


@cache
def _asking(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(layer: nn.Module, x: Tensor, *arguments, **options) -> Tensor:
        if arguments or options or not (x.requires_grad and torch.is_grad_enabled() and asks_again(layer)):
            return kind.forward(layer, x, *arguments, **options)
        return _AskAgain.apply(x, layer)

    return type(kind.__name__, (kind,), {"forward": forward})


@cache
def _copying(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(module: nn.Module, *arguments, **options):
        if torch.is_grad_enabled():
            arguments = [value.clone() for value in arguments[:1]] + list(arguments[1:])
            options |= {name: options[name].clone() for name in ("img", "txt") if name in options}
        return kind.forward(module, *arguments, **options)

    return type(kind.__name__, (kind,), {"forward": forward})


def _view(tensor: Tensor) -> Tensor:
    """Another tensor over the same bytes: an inference tensor in inference mode, else one that autograd may save."""
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view


@contextmanager
def _layers_out(network: nn.Module) -> Iterator[None]:
    """The network's own layers in their places, without the adapter's layers around them."""
    wrapped = [(name, module) for name, module in network.named_modules() if hasattr(module, "base_layer")]
    places = [(network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], m) for name, m in wrapped]
    for parent, leaf, module in places:
        parent._modules[leaf] = module.base_layer
    try:
        yield
    finally:
        for parent, leaf, module in places:
            parent._modules[leaf] = module


def check_trainable(model: comfy.model_patcher.ModelPatcher) -> None:
    """Refuse a MODEL that cannot be trained through.

    Raises:
        ValueError: one sentence that says why, and what to switch.
    """
    reasons = {
        "pages its weights (dynamic VRAM); start ComfyUI with --disable-dynamic-vram": model.is_dynamic(),
        "carries a LoRA in bypass mode; load that LoRA without bypass": bool(model.injections),
        "carries hooks; connect it without them": bool(model.hook_patches) or model.forced_hooks is not None,
        "has a function wrapped around it by another node; connect the model from before that node": (
            "model_function_wrapper" in model.model_options
        ),
        "multiplies in fp8 (fp8_e4m3fn_fast, --fast fp8_matrix_mult); load it with weight_dtype fp8_e4m3fn": any(
            isinstance(module, comfy.ops.fp8_ops.Linear) for module in model.model.modules()
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"this model cannot be trained on: it {reason}")
    for name, parameter in model.model.named_parameters():
        kind = type(parameter.data)
        if isinstance(parameter, comfy.quant_ops.QuantizedTensor) or not parameter.is_floating_point():
            stored = getattr(parameter, "_layout_cls", None) or parameter.dtype
            raise ValueError(
                f"this model's {name} is quantised ({stored}); connect a model in 32 or 16 bit, or in plain fp8"
            )
        if kind is not Tensor:
            raise ValueError(f"this model's {name} is a {kind.__name__}; connect a model of plain tensors")
