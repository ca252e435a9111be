"""A second device in pure Python, for machines without one: it computes what the CPU does, but is another place.

It is the device `npu`, by the name of an accelerator that ComfyUI knows. Its tensors hold the CPU's, on which
every operation is made, so that results are those of the CPU to the last digits. What a card refuses, it refuses:
tensors of two devices in one operation, `numpy()`, the CPU's generator. It has no streams, autocast changes nothing,
an error that a hook raises in a backward pass ends the process, and `.data` does not make a tensor of the CPU its own.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "npu"
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._copy_from.default)
MIXES = {*COPIES, aten._to_copy.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
         aten._index_put_impl_.default}  # fmt: skip
"""Operations that take tensors of the CPU beside a card's: copies, and indices."""


class OnDevice(Tensor):
    """A tensor of the device; `held` is that of the CPU, which its views share."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: OnDevice) -> None:
        Tensor.data.__set__(self, value)
        self.held = value.held

    def tolist(self) -> Any:
        return self.held.tolist()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.held.__reduce_ex__(protocol)  # saved as the CPU's, as a file is read

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __repr__(self, **options: Any) -> str:
        return f"{NAME}: {self.held!r}"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, kinds, arguments=(), options=None):
        return _call(operation, arguments, options or {})


def _is_own(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _call(operation, arguments, options):
    """The operation on what the tensors hold; its results are on the device that it names, else on this one."""
    own, mixes = {}, operation in MIXES

    def inner(each):
        if isinstance(each, OnDevice):
            own[id(each.held)] = each
            return each.held
        if isinstance(each, Tensor) and each.ndim and not mixes:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu ({operation})"
            )
        if isinstance(each, torch.Generator):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' ({operation})")
        if isinstance(each, torch.device) and each.type == NAME:
            return torch.device("cpu")
        return type(each)(map(inner, each)) if type(each) in (list, tuple) else each

    def outer(each):
        if type(each) in (list, tuple):
            return type(each)(map(outer, each))
        if not isinstance(each, Tensor):
            return each
        before = own.get(id(each))
        if before is None:
            return OnDevice(each)
        if (before.size(), before.stride()) != (each.size(), each.stride()):  # resized, or set to another storage
            Tensor.data.__set__(before, OnDevice(each))
        return before

    if operation is aten._has_compatible_shallow_copy_type.default:
        return all(isinstance(each, OnDevice) for each in arguments)
    found = operation(*map(inner, arguments), **{name: inner(each) for name, each in options.items()})
    if operation in COPIES:
        return arguments[COPIES.index(operation)]
    named = options.get("device")
    return outer(found) if named is None or _is_own(named) else found


class _Module(_DummyBackendModule):
    """`torch.npu`: 16 GB, of which the half is free."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def mem_get_info(self, device=None) -> tuple[int, int]:
        return 1 << 33, 1 << 34

    def memory_stats(self, device=None) -> dict[str, int]:
        return {"active_bytes.all.current": 0, "reserved_bytes.all.current": 0}

    def memory_reserved(self, device=None) -> int:
        return 0

    memory_allocated = memory_reserved

    def get_device_name(self, device=None) -> str:
        return "second device"

    def synchronize(self, device=None) -> None: ...

    empty_cache = synchronize


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, kinds, arguments=(), options=None):
        options = options or {}
        if function in (torch.tensor, torch.as_tensor) and _is_own(options.get("device")):
            return function(*arguments, **{**options, "device": "cpu"}).to(NAME)
        if function is Tensor.__getitem__ and isinstance(arguments[1], list):
            arguments = (arguments[0], torch.tensor(arguments[1]))
        if function in (Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            # An error that a hook raises in another thread than this ends the process.
            with torch.autograd.set_multithreading_enabled(False):
                return function(*arguments, **options)
        return function(*arguments, **options)


@cache
def install() -> torch.library.Library:
    """Once a process, before torch has a device of another name. What is given back holds the kernels."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    kernels = torch.library.Library("_", "IMPL")
    kernels.fallback(lambda operation, *arguments, **options: _call(operation, arguments, options), "PrivateUse1")
    kernels.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return kernels


def comfyui_takes_it() -> None:
    """Import what chooses ComfyUI's device and asks for the package that brings this one; others must not find it."""
    install()
    sys.modules["torch_npu"] = types.ModuleType("torch_npu")
    try:
        import comfy.model_management  # noqa: F401
    finally:
        del sys.modules["torch_npu"]


def are_plain() -> None:
    """Its tensors hold their values, whatever subclass they are, for the backend of every pack that is loaded."""
    for pack in [name for name in sys.modules if name.rpartition(".")[2] == "anchor_core"]:
        importlib.import_module(f"{pack}.backends.comfyui.denoiser")
    for module in list(sys.modules.values()):
        known = vars(module).get("is_plain")
        if getattr(known, "__module__", "").endswith("anchor_core.backends.comfyui.layers"):
            module.is_plain = lambda tensor, known=known: known(getattr(tensor, "held", tensor))


@contextmanager
def device() -> Iterator[str]:
    """The device's name; tensors are made on it while this is open."""
    install()
    with _Mode():
        yield NAME
