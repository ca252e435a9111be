"""One training step of SD1.5 at full size, random weights, on the CPU: its peak memory beside the estimate.

Usage: python -m tests.training.sd15_memory SIDE SETTINGS CONFIG, the last two as JSON. Prints bytes, each with the
model's own: `model`; `estimate`, what `check_memory` compares with the free memory; `peak`, the most that torch had
allocated at once, by its memory profiler; `resident`, the highest resident size during the training over that before
the model was made (Linux). A process of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

from anchor_core.adapters.config import AdapterConfig
from anchor_core.concept import Concept
from anchor_core.data.cache import Cache
from anchor_core.training import memory
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train
from tests.backends import tiny_models

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(what: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since the last reset."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def unet() -> UNet2DConditionModel:
    """SD1.5's own: the defaults of the class, but for the width of the prompts."""
    with torch.device("meta"):
        network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1.0)
    return network


def main() -> None:
    side, settings, config = int(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    pipeline = tiny_models.build("sd1", Path(tempfile.mkdtemp()))
    pipeline.text_encoder = tiny_models._clip(pipeline.tokenizer, width=768)
    before = resident("VmRSS")
    pipeline.unet = unet()
    denoiser = tiny_models.denoiser_of(pipeline)
    model = sum(parameter.nbytes for parameter in denoiser.network.parameters())
    concept, latents = Concept("a photo of a sks dog", "a photo of a dog"), torch.randn(4, 4, side, side)
    adapter = denoiser.attach(AdapterConfig(**config))
    settings = TrainSettings(steps=1, **settings)
    found = memory.growth(denoiser, concept, settings, (4, side, side), Cache(denoiser))
    step = found.peak(settings.micro_batch or settings.batch_size, side * side)
    estimate = model + step + memory.optimizer_bytes(adapter, settings)
    RESET.write_text("5")  # VmHWM starts anew
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(denoiser, adapter, latents, concept, settings)
    high = resident("VmHWM") - before
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = model + max(accumulate(changes))
    print(json.dumps({"model": model, "estimate": int(estimate), "peak": peak, "resident": high}))


main()
