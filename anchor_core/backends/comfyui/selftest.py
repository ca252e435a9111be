"""Whether training is right on this machine: the adapter's gradient, the base model afterwards, what a step costs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import objectives
from ...adapters.config import AdapterConfig
from ...checks import check_count
from ...denoiser import Step
from .denoiser import ComfyDenoiser
from .families import TextInput, find_blocks
from .layers import dequantised, is_mixed
from .weights import Replaced

COSINE, WORST = 0.9995, 0.99
"""Of an adapter's gradient to that in float32: the least of all layers together, and of any layer."""

QUANTISED_COSINE, QUANTISED_WORST = 0.97, 0.9
"""The same where the network rounds what it multiplies with too, in fp8 or int8, as it does when it samples."""

MOVED = 1e-2
"""The most by which a prediction may differ afterwards, of its norm: a card need not compute the same twice."""

LOSS_SCALE = 2.0**16
TOKENS = 77


@dataclass
class Agreement:
    """Of two gradients of one adapter: the cosine of all, each layer's, the norms' ratio, and the share of zeros."""

    cosine: float
    layers: dict[str, float]
    norm: float
    zeros: float

    @classmethod
    def of(cls, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Agreement:
        def cosine(a: Tensor, b: Tensor) -> float:
            if not a.any() and not b.any():  # attention to one token has no gradient
                return 1.0
            return torch.nn.functional.cosine_similarity(a, b, dim=0, eps=0.0).nan_to_num().item()

        layers = {name: cosine(ours[name], theirs[name]) for name in theirs}
        one, other = (torch.cat(list(each.values())) for each in (ours, theirs))
        zeros = ((one == 0) & (other != 0)).double().mean().item()
        return cls(cosine(one, other), layers, (one.norm() / other.norm()).item(), zeros)

    @property
    def worst(self) -> str:
        return min(self.layers, key=self.layers.get)

    def reaches(self, cosine: float, worst: float) -> bool:
        return self.cosine >= cosine and self.layers[self.worst] >= worst

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.6f}, norm {self.norm:.4f}, vanished {self.zeros:.1%}, "
            f"worst layer {self.layers[self.worst]:.5f} ({self.worst})"
        )


@dataclass
class Cost:
    """Seconds and the peak of the card's memory, in bytes, of a step; what of it are ComfyUI's pages."""

    seconds: float
    peak: int
    pages: int

    def __str__(self) -> str:
        return f"{self.seconds:.3f} s, {self.peak / 2**30:.2f} GiB at most beside {self.pages / 2**30:.2f} GiB of pages"


@dataclass
class SelfTest:
    """What `self_test` found; as text, a line each."""

    machine: dict[str, str] = field(default_factory=dict)
    gradients: dict[str, Agreement] = field(default_factory=dict)
    rounds: bool = False
    untouched: bool = False
    moved: float = 0.0
    costs: dict[str, Cost] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """The gradient that training takes, which is the last, and the base model."""
        least = (QUANTISED_COSINE, QUANTISED_WORST) if self.rounds else (COSINE, WORST)
        return list(self.gradients.values())[-1].reaches(*least) and self.untouched and self.moved < MOVED

    def __str__(self) -> str:
        lines = [f"{name}: {text}" for name, text in self.machine.items()]
        lines += [f"gradient, {name}: {each}" for name, each in self.gradients.items()]
        lines.append(
            f"the base model: {'unchanged' if self.untouched else 'CHANGED'}, its prediction by {self.moved:.1e}"
        )
        lines += [f"a step, {name}: {each}" for name, each in self.costs.items()]
        return "\n".join([*lines, "passed" if self.passed else "FAILED"])


def self_test(model, resolution: int = 512, batch_size: int = 1, rank: int = 8, steps: int = 5) -> SelfTest:
    """Train a LoRA on a MODEL for a few steps at random latents and prompts, and measure.

    In between ComfyUI is asked for all of the card's memory, so that the weights have to come again. The gradient's
    reference is the network in float32, over the tensors that were loaded and outside of ComfyUI's own casting.

    Raises:
        ValueError: the model cannot be trained on, or its prompts are not known; one sentence.
    """
    for name, value in (("batch_size", batch_size), ("rank", rank), ("steps", steps)):
        check_count(name, value)
    found, before = SelfTest(), _digest(model)
    with ComfyDenoiser(model, _RandomPrompts(TextInput.of(model.model)), None) as denoiser:
        denoiser.cancellable = True
        found.machine, found.rounds = _machine(denoiser), any(map(_rounds_its_input, denoiser.network.modules()))
        batch = _Batch.draw(denoiser, resolution, batch_size)
        prediction = _prediction(denoiser, batch)
        denoiser.attach(AdapterConfig(rank=rank, layers="attention"))
        _stir(denoiser.adapter)
        scales = {"as it is": 1.0} | ({"loss scaled": LOSS_SCALE} if denoiser.compute_dtype == torch.float16 else {})
        ours = {}
        for name, scale in scales.items():
            make_room(denoiser.device)
            ours[name] = _gradient(denoiser, batch, scale)
        with in_float32(model):
            theirs = _gradient(denoiser, batch)
        found.gradients = {name: Agreement.of(each, theirs) for name, each in ours.items()}
        for name in ("reconstruction", "anchor"):
            found.costs[name] = _cost(denoiser, batch, name, steps)
            make_room(denoiser.device)
        denoiser.detach()
        found.moved = ((_prediction(denoiser, batch) - prediction).norm() / prediction.norm()).item()
    found.untouched = _digest(model) == before
    return found


class _RandomPrompts:
    """Seeded embeddings of the widths that a model takes, in the place of a CLIP."""

    def __init__(self, takes: TextInput):
        if takes.width is None:
            raise ValueError("the width of this model's prompts is not known; take a model of another family")
        self._takes = takes

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str, show_pbar: bool = True) -> list:
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(len(text)))
        return [[draw(1, TOKENS, self._takes.width), {"pooled_output": draw(1, self._takes.pooled or 768)}]]


def _machine(denoiser: ComfyDenoiser) -> dict[str, str]:
    model, device = denoiser.model, denoiser.device
    parameters = list(denoiser.network.parameters())
    stored = {str(getattr(each, "_layout_cls", each.dtype)).removeprefix("torch.") for each in parameters}
    return {
        "device": comfy.model_management.get_torch_device_name(device),
        "torch": torch.__version__,
        "model": f"{type(model.model).__name__}, {sum(each.numel() for each in parameters) / 1e9:.2f}e9 weights in "
        f"{', '.join(sorted(stored))}, computes in {str(denoiser.compute_dtype).removeprefix('torch.')}",
        "dynamic VRAM": "on" if model.is_dynamic() else "off",
    }


def _rounds_its_input(module: nn.Module) -> bool:
    """Whether a layer multiplies quantised weights with a quantised input."""
    return is_mixed(module) and hasattr(module.weight, "_qdata") and not module._full_precision_mm


def make_room(device: torch.device) -> None:
    """Have ComfyUI give up every weight on a device, as for a model that needs all of it."""
    with torch.inference_mode():
        comfy.model_management.free_memory(1e30, device)


@contextmanager
def in_float32(model: comfy.model_patcher.ModelPatcher) -> Iterator[None]:
    """The network in float32 over the very tensors that were loaded, by torch alone.

    ComfyUI's casts, pages and quick ways are left out, and our layers: autograd keeps weights, a block's at once.
    """

    with Replaced() as replaced:
        replaced.set(model.model, "manual_cast_dtype", torch.float32)
        replaced.set(comfy.ops, "cast_bias_weight", _cast_to_float32)
        replaced.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        torch.backends.cudnn.allow_tf32 = False
        for module in model.model.modules():
            if isinstance(module, comfy.ops.CastWeightBiasOp):
                replaced.set(module, "comfy_cast_weights", True)
                replaced.set(module, "comfy_force_cast_weights", True)
            if kind := getattr(type(module), "_asked_again", None):
                replaced.callback(setattr, module, "__class__", type(module))
                module.__class__ = kind
        for block in find_blocks(model.model.diffusion_model):
            replaced.set(block, "forward", partial(checkpoint, block.forward, use_reentrant=False))
        yield


def _cast_to_float32(module: nn.Module, input=None, dtype=None, device=None, bias_dtype=None, offloadable=False, **_):
    """ComfyUI's `cast_bias_weight`, by the plain way."""
    device, made = device if input is None else input.device, []
    for name in ("weight", "bias"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            tensor = dequantised(tensor.to(device), torch.float32)
            patches = [getattr(module, f"{name}_lowvram_function", None), *getattr(module, f"{name}_function", ())]
            for patch in patches:
                tensor = tensor if patch is None else patch(tensor)
        made.append(tensor)
    return (*made, None) if offloadable else tuple(made)


# --- a step ---------------------------------------------------------------------------------------------------------


def _draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class _Batch:
    """Latents, noise, timesteps, subject and class conditions: encoding changes what is loaded, so it is done once."""

    parts: tuple

    @classmethod
    def draw(cls, denoiser: ComfyDenoiser, resolution: int, batch_size: int) -> _Batch:
        levels = (torch.arange(batch_size, dtype=torch.float64) + 0.5) / batch_size
        subject, class_ = ([each] * batch_size for each in denoiser.encode_prompts(["a sks dog", "a dog"]))
        shape = batch_size, *denoiser.latent_shape(resolution, resolution)
        latents, noise = (_draw(shape, seed).to(denoiser.device) for seed in (1, 2))
        return cls((latents, noise, denoiser.timesteps(levels).to(denoiser.device), subject, class_))

    def step(self, denoiser: ComfyDenoiser) -> Step:
        return Step(denoiser, *self.parts)


def _prediction(denoiser: ComfyDenoiser, batch: _Batch) -> Tensor:
    with torch.no_grad():
        return batch.step(denoiser).subject


def _stir(adapter) -> None:
    """Both factors, so that each has a gradient."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.copy_(0.1 * torch.randn(factor.shape, generator=generator) * factor[0].numel() ** -0.5)


def _gradient(denoiser: ComfyDenoiser, batch: _Batch, scale: float = 1.0) -> dict[str, Tensor]:
    """Of the reconstruction's loss, by layer, on the CPU."""
    adapter = denoiser.adapter
    loss = sum(objectives.reconstruction(batch.step(denoiser)).values())
    parts = iter(torch.autograd.grad(scale * loss, adapter.parameters(), materialize_grads=True))
    layers = {name: [p for p in adapter.layer(name).parameters() if p.requires_grad] for name in adapter.module_names}
    return {
        name: torch.cat([next(parts).flatten().double().cpu() / scale for _ in factors])
        for name, factors in layers.items()
    }


def _cost(denoiser: ComfyDenoiser, batch: _Batch, name: str, steps: int) -> Cost:
    """The median of the steps after the first, in which weights are loaded."""
    objective = {"reconstruction": objectives.reconstruction, "anchor": objectives.semantic_anchoring}[name]
    optimizer = torch.optim.AdamW(denoiser.adapter.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(denoiser.device.type, enabled=denoiser.compute_dtype == torch.float16)
    cuda, seconds = denoiser.device.type == "cuda", []
    if cuda:
        torch.cuda.reset_peak_memory_stats(denoiser.device)
    for _ in range(steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = sum(objective(batch.step(denoiser)).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()  # waits for the card
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(denoiser.device) if cuda else 0
    return Cost(sorted(seconds[1:])[steps // 2], peak, denoiser.model.loaded_size())


def _digest(model: comfy.model_patcher.ModelPatcher) -> str:
    """Of every tensor that a MODEL holds, as it is stored."""
    digest = hashlib.blake2b()
    for name, tensor in sorted(model.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
