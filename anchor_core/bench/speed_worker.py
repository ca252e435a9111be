"""One measurement of `speed.py` in diffusers' hands.

Usage: speed_worker.py SPEC (JSON of a `speed.Spec` and a method); prints {"seconds": [a step each], "peak": bytes}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

SPEC = json.loads(sys.argv[1])
sys.path.insert(0, SPEC["root"])

import torch  # noqa: E402

from anchor_core.adapters.config import AdapterConfig  # noqa: E402
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser  # noqa: E402
from anchor_core.bench import peak  # noqa: E402
from anchor_core.concept import Concept  # noqa: E402
from anchor_core.data.cache import Cache  # noqa: E402
from anchor_core.data.dataset import Dataset  # noqa: E402
from anchor_core.data.prepare import Material  # noqa: E402
from anchor_core.denoiser import Step  # noqa: E402
from anchor_core.drift import DriftProbe  # noqa: E402
from anchor_core.training.bank import Bank  # noqa: E402
from anchor_core.training.run import fit  # noqa: E402
from anchor_core.training.settings import TrainSettings  # noqa: E402

CONCEPT = Concept("a photo of a sks dog", "a photo of a dog")
BANKED = "anchored, bank"
"""Filled by a run before the first round."""
SWEPT = (0.0, 0.25, 0.5, 0.75, 1.0)
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"objective": "reconstruction"},
    "prior preservation": {"objective": "prior_preservation"},
    "anchored": {"objective": "anchor"},
    BANKED: {"objective": "anchor"},
    "anchored, class kept": {"objective": "anchor", "class_weight": 1.0},
}
DEVICE = torch.device(SPEC["device"])
# On the CPU the process's own seconds, of all its threads, whatever else the machine does meanwhile.
clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock()


def denoiser() -> DiffusersDenoiser:
    """The embedded model, or SD1.5's network at random weights behind the embedded model's tokenizer."""
    from anchor_core.sandbox.model import WEIGHTS

    dtype = getattr(torch, SPEC["dtype"])
    small = DiffusersDenoiser.from_pretrained(WEIGHTS, DEVICE, dtype)
    if SPEC["model"] == "sandbox":
        return small
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    network = UNet2DConditionModel(cross_attention_dim=768)  # every other default is SD1.5's
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=768, num_hidden_layers=1))
    torch.set_default_dtype(torch.float32)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return DiffusersDenoiser(network.to(DEVICE), text.to(DEVICE), small.tokenizer, small.vae, scheduler)


def settings(**options: Any) -> TrainSettings:
    given = {"steps": SPEC["steps"] + 1, "batch_size": SPEC["batch"], "learning_rate": 1e-4, "memory": "off"}
    return TrainSettings(**{**given, **options})


def trained(model: DiffusersDenoiser, rank: int, bank: Bank | None = None, **options: Any) -> list[float]:
    """The moments at which its steps were made, the first one that of its start."""
    latents = pictures()
    material = Material(CONCEPT, Dataset.of_latents(latents, CONCEPT), latents, latents.flip(0), None, Cache(model))
    model.attach(AdapterConfig(rank=rank), seed=0)
    moments = [now()]
    try:
        fit(
            model, material, settings(**options), bank=bank,
            tell=lambda event: moments.append(now()) if event.event == "step" else None,
        )  # fmt: skip
    finally:
        model.detach()
    return moments


def pictures() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(SPEC["pictures"], 4, SPEC["side"], SPEC["side"], generator=draw).to(DEVICE)


def differences(moments: list[float]) -> list[float]:
    return [after - before for before, after in zip(moments, moments[1:])]


def ours(method: str) -> list[float]:
    bank = Bank(opened, Path(SPEC["out"]) / "bank", 4e9) if method == BANKED else None
    return differences(trained(opened, SPEC["rank"], bank, **METHODS[method]))[1:]


def sweep() -> list[float]:
    """All steps of five trainings, and of a plain one before them: the seconds of both."""
    trained(opened, SPEC["rank"], objective="reconstruction")  # what the first passes of a process cost is left out
    began = now()
    trained(opened, SPEC["rank"], objective="reconstruction")
    plain, bank = now() - began, Bank(opened, limit=4e9)
    began = now()
    for w in SWEPT:
        trained(opened, SPEC["rank"], bank, w=w)
    return [now() - began, plain]


def parts() -> list[float]:
    """What an anchored step consists of, bare: two forward passes, one backward, and the optimizer."""
    adapter, latents, draw = opened.attach(AdapterConfig(rank=SPEC["rank"]), seed=0), pictures(), torch.Generator()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    subject, class_ = (opened.encode_prompts([prompt])[0] for prompt in ("a photo of a sks dog", "a photo of a dog"))
    seconds = []
    for _ in range(SPEC["steps"] + 1):
        rows = latents[torch.randint(len(latents), (SPEC["batch"],), generator=draw)]
        noise = torch.randn(rows.shape, generator=draw).to(DEVICE)
        times = opened.timesteps(torch.rand(len(rows), generator=draw)).to(DEVICE)
        step = Step(opened, rows, noise, times, [subject] * len(rows), [class_] * len(rows))
        noisy, target = step.noisy, step.target
        began = now()
        with torch.no_grad(), adapter.disabled():
            anchor = opened.predict(noisy, times, step.class_conditions)
        prediction = opened.predict(noisy, times, step.subject_conditions)
        ((prediction - target).square().mean() + 0.5 * (prediction - anchor).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now() - began)
    return seconds[1:]


def dreambooth_lora() -> list[float]:
    """The loop of diffusers' DreamBooth-LoRA example by the same public calls, from encoded pictures and prompts.

    The example encodes its pictures at each step; here they are encoded before, as ours are.
    """
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig

    unet, latents = opened.network, pictures()
    embedding = opened.encode_prompts(["a photo of a sks dog"])[0]
    schedule = DDPMScheduler.from_config(opened.scheduler.config)
    unet.requires_grad_(False)
    names = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=SPEC["rank"], lora_alpha=SPEC["rank"], target_modules=names))
    parameters = [each for each in unet.parameters() if each.requires_grad]
    for each in parameters:
        each.data = each.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
    accelerator = Accelerator(cpu=DEVICE.type == "cpu")
    courses = get_scheduler("constant", optimizer=optimizer)
    unet, optimizer, courses = accelerator.prepare(unet, optimizer, courses)
    unet.train()
    seconds = []
    for _ in range(SPEC["steps"] + 1):
        began = now()
        with accelerator.accumulate(unet):
            rows = latents[torch.randint(len(latents), (SPEC["batch"],))].to(embedding.dtype)
            noise = torch.randn_like(rows)
            times = torch.randint(0, schedule.config.num_train_timesteps, (len(rows),), device=DEVICE).long()
            noisy = schedule.add_noise(rows, noise, times)
            hidden = embedding.expand(len(rows), -1, -1)
            prediction = unet(noisy, times, hidden, return_dict=False)[0]
            velocity = schedule.config.prediction_type == "v_prediction"
            target = schedule.get_velocity(rows, noise, times) if velocity else noise
            loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            courses.step()
            optimizer.zero_grad()
        loss.detach().item()  # for its progress bar
        seconds.append(now() - began)
    return seconds[1:]


def first_step() -> list[float]:
    """From Run to the first step, on a loaded model with cached latents: the check of memory and the probe too."""
    latents = pictures()
    cache = Cache(opened)
    cache.conditions([CONCEPT.subject_prompt, CONCEPT.class_prompt])
    moments = []
    began = now()
    opened.attach(AdapterConfig(rank=SPEC["rank"]), seed=0)
    probe = DriftProbe(opened, latents, CONCEPT, timesteps=5, noises=2)
    material = Material(CONCEPT, Dataset.of_latents(latents, CONCEPT), latents, None, probe, cache)
    fit(opened, material, settings(steps=1, memory="fit"), tell=lambda event: _note(event, moments))
    return [moments[0] - began]


def references() -> list[float]:
    """Encoding 200 pictures as a training does, and the bare autoencoder on each: the seconds of both."""
    edge, draw = SPEC["side"] * opened.downscale, torch.Generator().manual_seed(0)
    pixels = list(torch.rand(200, 3, edge, edge, generator=draw))
    opened.encode_images(pixels[0].unsqueeze(0))
    began = now()
    Cache(opened).latents(pixels)
    prepared = now() - began
    began = now()
    for each in pixels:
        opened.encode_images(each.unsqueeze(0))
    return [prepared, now() - began]


def _note(event, moments: list[float]) -> None:
    if event.event == "step":
        moments.append(now())


opened = denoiser()
peak.begin(DEVICE)
method = SPEC["method"]
others = {
    "parts": parts,
    "diffusers": dreambooth_lora,
    "sweep": sweep,
    "references": references,
    "first step": first_step,
}
found = others[method]() if method in others else ours(method)
print(json.dumps({"seconds": [round(value, 5) for value in found], "peak": peak.taken(DEVICE)}))
