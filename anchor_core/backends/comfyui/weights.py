"""The weights that ComfyUI manages, trained through in place: no second load, no copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.clip_model import CLIPLayer
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from torch import Tensor, nn

from .layers import LAYERS, asking, copying, holding, holds_its_weight, is_mixed, is_paged, is_plain, lasting, view


class Replaced(ExitStack):
    """Attributes and entries that have other values for a while."""

    def set(self, owner: Any, name: str, value: Any) -> None:
        if name in vars(owner):
            self.callback(setattr, owner, name, vars(owner)[name])
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, value)

    def set_entry(self, table: dict[str, Any], name: str, value: Any) -> None:
        self.callback(table.__setitem__, name, table[name])
        table[name] = value


class TrainableWeights:
    """Between `load` and `restore`, gradients flow through the weights of a MODEL (and CLIP); then it is as it was.

    Two things keep autograd from ComfyUI's own weights. Inference tensors cannot be saved for a backward pass: views
    over the same bytes take their places. And where a weight is made anew at each use (fp8, low VRAM, dynamic VRAM),
    autograd would keep every copy until the backward pass, or a page that holds another weight by then: such layers
    ask for their weight again instead (`layers`).

    Blocks of Flux and CLIP, moreover, add in place to what their norms have saved by then. That is an error, or under
    gradient checkpointing a wrong gradient without one; both get copies, of which no more are kept than before.

    ComfyUI may meanwhile want the memory for another model, and asks for these anew when they sample or encode. It gets
    to see them as it knows them; what it took away is loaded again by `load_again`, before the next use.
    """

    def __init__(self, *models: comfy.model_patcher.ModelPatcher):
        self._models = models
        self._changes = Replaced()
        self._moved, self._away, self._reserved = False, False, 0
        self._held: dict[nn.Module, tuple[torch.dtype, torch.device]] = {}
        self._copies = ExitStack()

    def load(self) -> None:
        """Have ComfyUI load the models, whole or in part, and make them trainable through."""
        with torch.inference_mode():  # as in every prompt: what is moved stays what it was
            comfy.model_management.load_models_gpu(list(self._models), memory_required=self._reserved)
        for model in self._models:
            model.pre_run()
        self._moved = False
        self._prepare()

    def reserve(self, memory: int, offloading: bool) -> None:
        """Have ComfyUI leave so many bytes beside the models from now on, for which it offloads some of their weights
        where `offloading` says so."""
        self._reserved = memory
        if offloading:
            with self.released():
                pass

    def load_again(self) -> None:
        """Load what ComfyUI has taken away since, for another model."""
        if self._moved:
            with self.released():
                pass

    def restore(self) -> None:
        """Give ComfyUI the tensors and layers back. A second call does nothing."""
        self._copies.close()
        self._changes.close()

    @contextmanager
    def released(self) -> Iterator[None]:
        """The models as ComfyUI knows them, while another one is loaded, which may unload these.

        Tensors that are made meanwhile are inference tensors: clone them afterwards.
        """
        with nullcontext() if self._away else self.away(), torch.inference_mode():
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """The models as ComfyUI knows them for several `released`, which change nothing then."""
        with self._layers_out():
            self.restore()
            self._away = True
            try:
                yield
            finally:
                self._away = False
            self.load()

    def hold(self, layers: Iterable[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
        """Let layers hold the very weights that they compute with, until `let_go`: copies, where they do not."""
        layers = list(layers)
        self._held |= dict.fromkeys(layers, (dtype, device))
        self._copy(layers)

    def let_go(self) -> None:
        self._held = {}
        self._copies.close()

    def _copy(self, layers: Iterable[nn.Module]) -> None:
        for layer in layers:
            dtype, device = self._held[layer]
            if not holds_its_weight(layer, device):
                self._copies.enter_context(holding(layer, dtype, device))

    # --- in ComfyUI's own modules ---------------------------------------------------------------------------------

    def _prepare(self) -> None:
        management, ops = comfy.model_management, comfy.ops
        # A weight fetched over a stream lies in a buffer that the next one overwrites; autograd may hold a norm's.
        self._changes.set(management, "NUM_STREAMS", 0)
        self._changes.set(ops, "cast_bias_weight", lasting(ops.cast_bias_weight))
        for model in self._models:
            for name, change in (
                ("partially_load", self._load_more),
                ("partially_unload", self._unload),
                ("detach", self._detach),
            ):
                self._changes.set(model, name, partial(change, model, getattr(model, name)))
        views: dict[int, Tensor] = {}
        for module in [module for model in self._models for module in model.model.modules()]:
            if not is_paged(module):  # of a page only copies are used, and ComfyUI keeps notes on the very tensor
                self._swap(module._parameters, views)
                self._swap(module._buffers, views)
            if isinstance(module, ops.CastWeightBiasOp) and (isinstance(module, LAYERS) or is_mixed(module)):
                self._change(module, asking(type(module)))
                if is_mixed(module):
                    self._changes.set(module, "_full_precision_mm", module._full_precision_mm)
            elif isinstance(module, (DoubleStreamBlock, SingleStreamBlock, CLIPLayer)):
                self._change(module, copying(type(module)))
                for child in module.children():
                    if isinstance(child, nn.LayerNorm):
                        self._change(child, copying(type(child)))
        self._copy(self._held)

    def _swap(self, table: dict[str, Tensor | None], views: dict[int, Tensor]) -> None:
        for name, tensor in table.items():
            if tensor is not None and tensor.is_inference() and is_plain(tensor):
                self._changes.set_entry(table, name, views.setdefault(id(tensor), view(tensor)))

    def _change(self, module: nn.Module, kind: type[nn.Module]) -> None:
        # Not the instance's `forward`, which gradient checkpointing wraps.
        self._changes.callback(setattr, module, "__class__", type(module))
        module.__class__ = kind

    # --- when ComfyUI moves them ----------------------------------------------------------------------------------

    def _as_known(self, method: Callable, *arguments, **options):
        """Call a method of a model's while the models are as ComfyUI knows them."""
        with self._layers_out():
            self.restore()
            with torch.inference_mode():
                said = method(*arguments, **options)
            self._prepare()
        return said

    def _load_more(self, model, method: Callable, *arguments, **options):
        # A sampler or a CLIP has its model loaded anew each time: there is nothing to load.
        if self._moved:
            return self._as_known(method, *arguments, **options)
        return None if model.is_dynamic() else 0

    def _unload(self, model, method: Callable, *arguments, **options):
        self._moved = self._moved or model.is_dynamic()
        return self._as_known(method, *arguments, **options)

    def _detach(self, model, method: Callable, unpatch_all: bool = True):
        if not unpatch_all:
            return method(unpatch_all)
        self._moved = True
        return self._as_known(method, unpatch_all)

    @contextmanager
    def _layers_out(self) -> Iterator[None]:
        """The networks' own layers in their places, without the adapter's layers around them."""
        places = []
        for network in [model.model for model in self._models]:
            for name, module in network.named_modules():
                if hasattr(module, "base_layer"):
                    parent, _, leaf = name.rpartition(".")
                    places.append((network.get_submodule(parent), leaf, module))
        for parent, leaf, module in places:
            parent._modules[leaf] = module.base_layer
        try:
            yield
        finally:
            for parent, leaf, module in places:
                parent._modules[leaf] = module
