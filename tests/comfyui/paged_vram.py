"""ComfyUI's dynamic VRAM on a machine without a GPU: a page pool that evicts and overwrites what is not pinned.

`install()` before anything of `comfy` is imported; `start()` after it. The device `CARD` then stands for a card: it is
the CPU under another name, so that everything computes. Tensors whose storage was given to `offload` lie on the `HOST`,
all others on the card. Weights get to the card as they do on a real one, through `ModelPatcherDynamic` and `Pages`.
`torch.Tensor.device` is replaced: only in a process of its own. That tensors of both devices are mixed goes unnoticed.

Whoever keeps a view of a page, of a cast buffer or of a stolen pin beyond the use that it was lent for reads NaN: pages
are filled with 0xFF bytes (NaN in each floating format) when they are evicted. `POOL` says when that happens.
"""

from __future__ import annotations

import ctypes
import random
import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import nn

HOST, CARD = torch.device("cpu"), torch.device("cpu", 0)
POISON = 0xFF


@dataclass
class Pool:
    """How the pool behaves, and what it counted."""

    page: int = 4096
    pages: int = 10**9  # that fit the card
    evict: float = 1.0  # the chance that a page goes as soon as nothing pins it
    refuse: float = 0.0  # the chance that a fault finds no room, so that the weight takes a temporary buffer
    pins: int = 1 << 30  # bytes of host memory that may be pinned
    random: random.Random = field(default_factory=lambda: random.Random(0))
    counts: Counter = field(default_factory=Counter)

    def set(self, **changes) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        self.random.seed(0)
        self.counts.clear()


POOL = Pool()


class _Bytes:
    """Memory that keeps its address, lent as fresh tensors: inference tensors in inference mode, as the real ones."""

    def __init__(self, size: int):
        self.memory = bytearray(max(int(size), 1))
        self.address = ctypes.addressof((ctypes.c_char * len(self.memory)).from_buffer(self.memory))

    def tensor(self, offset: int, size: int) -> torch.Tensor:
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=offset)

    def poison(self, offset: int, size: int) -> None:
        self.memory[offset : offset + size] = bytes([POISON]) * size


class Pages:
    """`ModelVBAR`: addresses for a model's weights, of which some pages are on the card."""

    def __init__(self, size: int, device: int):
        self._bytes, self._end = _Bytes(size), 0
        self._serials: dict[int, int] = {}
        self._pinned: Counter = Counter()
        _ALL.append(self)

    def alloc(self, size: int) -> tuple[Pages, int, int]:
        start = self._end = (self._end + 511) & ~511
        self._end += size
        if self._end > len(self._bytes.memory):
            raise MemoryError("no addresses are left")
        return self, start, size

    def _range(self, start: int, size: int) -> range:
        return range(start // POOL.page, (start + size + POOL.page - 1) // POOL.page)

    def fault(self, start: int, size: int) -> tuple[int, ...] | None:
        needed = self._range(start, size)
        missing = [page for page in needed if page not in self._serials]
        if POOL.random.random() < POOL.refuse and missing:
            POOL.counts["refused"] += 1
            return None
        room = POOL.pages - sum(len(pages._serials) for pages in _ALL)
        for pages in _ALL:
            for page in list(pages._serials):
                if room < len(missing) and not pages._pinned[page] and not (pages is self and page in needed):
                    pages._evict(page)
                    room += 1
        if room < len(missing):
            POOL.counts["full"] += 1
            return None
        for page in missing:
            POOL.counts["faults"] += 1
            self._serials[page] = next(_SERIALS)
        self._pinned.update(needed)
        return tuple(self._serials[page] for page in needed)

    def unpin(self, start: int, size: int) -> None:
        for page in self._range(start, size):
            if self._pinned[page] <= 0:
                raise AssertionError("a page was unpinned that nothing pinned")
            self._pinned[page] -= 1
            if not self._pinned[page] and POOL.random.random() < POOL.evict:
                self._evict(page)

    def _evict(self, page: int) -> int:
        del self._serials[page]
        POOL.counts["evicted"] += 1
        start = page * POOL.page
        self._bytes.poison(start, min(POOL.page, len(self._bytes.memory) - start))
        return POOL.page

    def free_memory(self, size: float) -> int:
        freed = 0
        for page in [page for page in self._serials if not self._pinned[page]]:
            if freed < size:
                freed += self._evict(page)
        return freed

    def loaded_size(self) -> int:
        return len(self._serials) * POOL.page

    @property
    def pinned(self) -> int:
        return sum(count > 0 for count in self._pinned.values())

    def prioritize(self, *_) -> None: ...

    deprioritize = set_watermark = set_watermark_limit = prioritize


_ALL: list[Pages] = []
_SERIALS = count(1)
"""A page that is filled anew never has a number again by which a layer took it for its own."""


def pinned_pages() -> int:
    """Pages that something still pins: 0 between two uses, else a cast was not undone."""
    return sum(pages.pinned for pages in _ALL)


class CastBuffer:
    """`VRAMBuffer`: the memory that a stream's temporary weights share, each overwriting the one before."""

    def __init__(self, size: int, device: int):
        self._bytes = _Bytes(1 << 24)

    def size(self) -> int:
        return len(self._bytes.memory)

    def get(self, size: int, offset: int = 0):
        self._bytes.poison(offset, size)
        return self._bytes, offset, size


class HostBuffer:
    """Pinned host memory, which grows and shrinks at its end."""

    def __init__(self, size: int = 0, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True):
        self._bytes, self.size = _Bytes(1 << 24 if max_grow_size else size), size

    def get_raw_address(self) -> int:
        return self._bytes.address

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        if self.size + size > min(len(self._bytes.memory), POOL.pins):
            raise RuntimeError("no host memory is left to pin")
        self.size += size
        return self._bytes.address

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self._bytes.poison(size, self.size - size)
        self.size = size


class _Runtime:
    """What of `torch.cuda.cudart()` is called."""

    def cudaHostRegister(self, *_) -> int:
        return 0

    def cudaHostUnregister(self, *_) -> int:
        return 0


def _to_tensor(allocation, device) -> torch.Tensor:
    memory, offset, size = allocation
    return getattr(memory, "_bytes", memory).tensor(offset, size)


def install() -> None:
    """Put the fakes in the place of `comfy_aimdo`; nothing of `comfy` may be imported yet."""
    if any(name == "comfy" or name.startswith(("comfy.", "comfy_aimdo")) for name in sys.modules):
        raise RuntimeError("install() came after an import of comfy")
    ignore = lambda *arguments, **options: None  # noqa: E731
    parts = {
        "control": {"init": ignore, "init_devices": lambda *_: True, "lib": None, "analyze": ignore},
        "host_buffer": {"HostBuffer": HostBuffer, "read_file_to_device": ignore, "cleanup_file_reader": ignore},
        "model_mmap": {},
        "model_vbar": {
            "ModelVBAR": Pages,
            "vbar_fault": lambda allocation: allocation[0].fault(*allocation[1:]),
            "vbar_unpin": lambda allocation: allocation and allocation[0].unpin(*allocation[1:]),
            "vbar_signature_compare": lambda one, other: one is not None and one == other,
            "vbars_analyze": lambda device=None: 0,
            "vbars_reset_watermark_limits": ignore,
        },
        "torch": {
            "aimdo_to_tensor": _to_tensor,
            "hostbuf_to_tensor": lambda buffer: buffer._bytes.tensor(0, buffer.size),
            "get_torch_allocator": ignore,
        },
        "vram_buffer": {"VRAMBuffer": CastBuffer},
    }
    package = sys.modules["comfy_aimdo"] = types.ModuleType("comfy_aimdo")
    package.__path__ = []
    for name, contents in parts.items():
        module = sys.modules[f"comfy_aimdo.{name}"] = types.ModuleType(f"comfy_aimdo.{name}")
        vars(module).update(contents)
        setattr(package, name, module)
    torch.cuda.cudart = _Runtime
    torch.Tensor.device = property(_device)


_HOST_MEMORY: dict[int, torch.UntypedStorage] = {}
_REAL_DEVICE = torch.Tensor.device


def _device(tensor: torch.Tensor) -> torch.device:
    inner = getattr(tensor, "_qdata", tensor)
    real = _REAL_DEVICE.__get__(inner)
    if real.type != "cpu":
        return real
    return HOST if inner.untyped_storage().data_ptr() in _HOST_MEMORY else CARD


def offload(network: nn.Module) -> None:
    """Let the network's parameters and buffers lie on the host, as after loading a file."""
    for tensor in [*network.parameters(), *network.buffers()]:
        parts = [tensor]
        if hasattr(tensor, "__tensor_flatten__"):
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for part in parts:
            storage = part.untyped_storage()
            if storage.data_ptr():
                _HOST_MEMORY[storage.data_ptr()] = storage


def start(pin: bool = True, scale: int = 1) -> None:
    """Switch ComfyUI to dynamic VRAM on `CARD`, as its `main.py` does on an NVIDIA card.

    Args:
        pin: whether weights are copied to pinned host memory on their way.
        scale: what a module's size is multiplied by where ComfyUI decides whether it is worth paging (above 16 KiB), so
            that the norms and embeddings of a small network are paged as well.
    """
    import comfy.cli_args
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    management = comfy.model_management
    comfy.cli_args.args.disable_pinned_memory = not pin
    management.MAX_PINNED_MEMORY = POOL.pins if pin else -1
    management.is_device_cpu = lambda device: getattr(device, "type", None) == "cpu" and device != CARD
    management.get_torch_device = lambda: CARD
    management.vram_state = management.VRAMState.NORMAL_VRAM
    comfy.memory_management.aimdo_enabled = True
    kind = comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    plain_list = comfy.model_patcher.ModelPatcher._load_list

    def load_list(patcher, *arguments, **options):
        entries = plain_list(patcher, *arguments, **options)
        return [(*sort, size * scale, *module) for *sort, size, n, m, params in entries for module in [(n, m, params)]]

    kind._load_list = load_list


def dynamic(patcher):
    """A plain ModelPatcher's model in a ModelPatcherDynamic on the card, its weights on the host."""
    import comfy.model_management
    import comfy.model_patcher

    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [each for each in loaded if each.model is not patcher]  # a CLIP is loaded as soon as it is made
    offload(patcher.model)
    return comfy.model_patcher.ModelPatcherDynamic(patcher.model, load_device=CARD, offload_device=HOST)


def unpaged(build: Callable) -> Callable:
    """`build` with dynamic VRAM off: layers have weights, which else only a file fills, and patchers are plain."""
    import comfy.memory_management
    import comfy.model_patcher

    def build_unpaged(*arguments, **options):
        memory, patchers = comfy.memory_management, comfy.model_patcher
        before = memory.aimdo_enabled, patchers.CoreModelPatcher
        memory.aimdo_enabled, patchers.CoreModelPatcher = False, patchers.ModelPatcher
        try:
            return build(*arguments, **options)
        finally:
            memory.aimdo_enabled, patchers.CoreModelPatcher = before

    return build_unpaged


def paged(build: Callable) -> Callable:
    """`build` with the MODEL and the CLIP that it returns made `dynamic`."""
    import comfy.model_patcher

    def build_paged(*arguments, **options):
        made = unpaged(build)(*arguments, **options)
        for each in made:
            if isinstance(getattr(each, "patcher", None), comfy.model_patcher.ModelPatcher):
                each.patcher = dynamic(each.patcher)
        return tuple(dynamic(each) if isinstance(each, comfy.model_patcher.ModelPatcher) else each for each in made)

    return build_paged
