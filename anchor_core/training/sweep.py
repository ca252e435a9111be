"""One option at several values: a training each, on the same draws, with the anchors computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.config import AdapterConfig
from ..data.prepare import Material
from ..denoiser import Denoiser
from ..drift import ProbeResult
from .bank import Bank
from .events import Tell
from .methods import check_combination
from .orders import Orders
from .run import Outcome, fit
from .saving import Files
from .settings import TrainSettings

STRENGTH = "strength"
"""Of one adapter, which is trained once and sampled at each."""
SAMPLING_STEPS, COLUMNS = 25, 4


@dataclass(frozen=True)
class Variant:
    """One value of the option: what is trained with it, and the strength that its pictures are made at."""

    label: str
    settings: TrainSettings
    config: AdapterConfig
    strength: float = 1.0


@dataclass(frozen=True)
class Swept:
    """A variant after its training: its pictures (N, 3, H, W) in [0, 1], and the probe of what they were made with."""

    variant: Variant
    outcome: Outcome
    pictures: Tensor
    probe: ProbeResult | None


def variants(text: str, settings: TrainSettings, config: AdapterConfig, prompts: Sequence[Any]) -> list[Variant]:
    """Those of `text`, such as "w=0,.25,.5" or "rank=4,8,16", each checked as a training of its own is.

    Args:
        prompts: pairs of subject and class prompts, as `check_combination` reads them.

    Raises:
        ValueError: for a text of another form, an option that has no number, or a value that it does not take.
    """
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    kinds = {
        each.name: (part, type(each.default))
        for part in (TrainSettings, AdapterConfig)
        for each in fields(part)
        if "help" in each.metadata and type(each.default) in (int, float)
    } | {STRENGTH: (None, float)}
    if name not in kinds:
        raise ValueError(f"sweep is {text!r}, but it takes NAME=VALUE,VALUE with one of {', '.join(kinds)}")
    part, kind = kinds[name]
    try:
        numbers = list(dict.fromkeys(kind(value) for value in values.split(",")))
    except ValueError as error:
        raise ValueError(f"sweep is {text!r}, but {name} takes numbers with commas between, such as 0,.5,1") from error
    if len(numbers) < 2:
        raise ValueError(f"sweep is {text!r}, but it takes two different values at least; give one as --{name}")
    found = []
    for value in numbers:
        own = {name: value}
        label = f"{name}={value:g}"
        if part is None:
            found.append(Variant(label, settings, config, value))
        elif part is TrainSettings:
            found.append(Variant(label, replace(settings, **own), config))
        else:
            found.append(Variant(label, settings, replace(config, **own)))
        check_combination(found[-1].settings, found[-1].config, prompts, 0.0)
    return found


@torch.no_grad()
def _pictures(denoiser: Denoiser, material: Material, noise: Tensor, guidance: float) -> Tensor:
    prompts = [material.concept.subject_prompt, ""]
    subject, negative = denoiser.encode_prompts(prompts, adapted=denoiser.adapter.config.trains_text)
    latents = denoiser.sample([subject] * len(noise), negative, noise, steps=SAMPLING_STEPS, guidance=guidance)
    return denoiser.decode_latents(latents).cpu()


def sweep(
    denoiser: Denoiser,
    material: Material,
    several: Sequence[Variant],
    *,
    bank: Bank,
    folder: Path | None = None,
    orders: Callable[[], Orders] = Orders,
    tell: Callable[[Variant], Tell] = lambda variant: lambda event: None,
    count: int = COLUMNS,
) -> Iterator[Swept]:
    """Train and sample each, one after the other; the adapter of one is detached before the next.

    Each is equal in every bit to its training alone, with `bank` or without. Variants that differ in their strength
    alone are one training. It ends with a training that is cancelled.

    Args:
        folder: of a folder for each training, with its `adapter.safetensors`; None to write none.
        orders: gives those of the next training.
        tell: gives the listener of a variant's training.
        count: pictures of each, from the same noise.
    """
    noise = torch.randn((count, *material.latents.shape[1:]), generator=torch.Generator().manual_seed(0))
    trained: tuple[TrainSettings, AdapterConfig] | None = None
    outcome: Outcome | None = None
    try:
        for variant in several:
            if (variant.settings, variant.config) != trained:
                denoiser.detach()
                trained = variant.settings, variant.config
                denoiser.attach(variant.config, seed=variant.settings.seed)
                files = None if folder is None else Files.beside(_made(folder, variant) / "adapter.safetensors")
                outcome = fit(
                    denoiser, material, variant.settings, files=files, tell=tell(variant), orders=orders(), bank=bank
                )
                if outcome.trained is None:
                    return
            with denoiser.adapter.scaled(variant.strength):
                pictures = _pictures(denoiser, material, noise, variant.settings.guidance)
                probe = None if material.probe is None else material.probe.measure()
            yield Swept(variant, outcome, pictures, probe)
            if outcome.how == "cancelled":
                return
    finally:
        denoiser.detach()


def _made(folder: Path, variant: Variant) -> Path:
    """The folder of a variant; a training that is swept over its strength has one alone."""
    own = folder if variant.label.startswith(STRENGTH) else folder / variant.label
    own.mkdir(parents=True, exist_ok=True)
    return own
