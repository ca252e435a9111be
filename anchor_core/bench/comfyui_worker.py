"""One measurement of `comfyui.py`, under ComfyUI's interpreter.

Usage: comfyui_worker.py COMFYUI ROOT WEIGHTS METHOD STEPS SIDE DEVICE
Prints {"seconds": [of each step], "peak": bytes}.
"""

from __future__ import annotations

import json
import sys
import time

comfyui, root, weights, method, steps, side, device = sys.argv[1:]
sys.argv = [sys.argv[0], *(["--cpu"] if device == "cpu" else []), "--disable-dynamic-vram"]
sys.path[:] = [comfyui, *(path for path in sys.path[1:] if path != comfyui), root]  # ComfyUI's `nodes` first

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402

from anchor_core.bench import peak  # noqa: E402
from anchor_core.bench.comfyui import BANKED, CFG, TRAINED  # noqa: E402

DEVICE, STEPS, SIDE = torch.device(device), int(steps), int(side)
RANK, PICTURES, SCALE = 8, 4, 5.0
WORD = 5
"""The token at which the class prompt leaves the subject's, where the rules with a mask look for it."""
# On the CPU the process's own seconds, of all its threads, whatever else the machine does meanwhile.
clock = time.process_time if device == "cpu" else time.perf_counter


class Encoder:
    """Seeded embeddings of SD1.5's shape in the place of a CLIP, which is not what is measured."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str, show_pbar: bool = True) -> list:
        generator = torch.Generator().manual_seed(len(text))
        return [[torch.randn(1, 77, 768, generator=generator), {}]]


def stock(model, latents) -> None:
    from comfy_extras.nodes_train import TrainLoraNode

    given = {
        "model": model, "latents": {"samples": latents}, "positive": Encoder().encode_from_tokens_scheduled("dog"),
        "batch_size": 1, "grad_accumulation_steps": 1, "steps": STEPS + 1, "learning_rate": 1e-4, "rank": RANK,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "bf16", "lora_dtype": "bf16",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    TrainLoraNode.execute(**{name: [value] for name, value in given.items()})


def ours(model, latents) -> None:
    from anchor_core.adapters.config import AdapterConfig
    from anchor_core.backends.comfyui.denoiser import ComfyDenoiser
    from anchor_core.concept import Concept
    from anchor_core.training.bank import Bank
    from anchor_core.training.settings import TrainSettings
    from anchor_core.training.trainer import train

    bar = comfy.utils.ProgressBar(STEPS + 1)
    precision = "bf16" if device == "cpu" else "auto"  # the stock node trains in bf16; on a card, what ComfyUI takes
    w = 0.0 if method == "plain" else 0.5
    settings = TrainSettings(w=w, steps=STEPS + 1, batch_size=1, learning_rate=1e-4, precision=precision)
    with ComfyDenoiser(model, Encoder(), None) as denoiser:
        adapter = denoiser.attach(AdapterConfig(rank=RANK), 0)
        concept = Concept("a photo of a sks dog", "a photo of a dog")
        bank = Bank(denoiser) if method == BANKED else None
        if bank is not None:
            train(denoiser, adapter, latents, concept, settings, bank=bank)
            peak.begin(DEVICE)

        def tell(event) -> None:
            if event.event == "step":
                bar.update(1)

        train(denoiser, adapter, latents, concept, settings, tell=tell, bank=bank)


def trained() -> list[float]:
    """Of each step after the first, by ComfyUI's own progress."""
    moments: list[float] = []
    comfy.utils.set_progress_bar_global_hook(lambda *_, **__: moments.append(clock()))
    model = comfy.sd.load_diffusion_model(weights)
    latents = torch.randn(PICTURES, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    peak.begin(DEVICE)
    if method == "stock":
        stock(model, latents)
    else:
        ours(model, latents)
    return [after - before for before, after in zip(moments, moments[1:])]


def lora(model, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """In every projection of every attention, as the trainer's default."""
    tensors = {}
    for name, layer in model.model.diffusion_model.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            for part, shape in (("up", (layer.out_features, RANK)), ("down", (RANK, layer.in_features))):
                tensors[f"diffusion_model.{name}.lora_{part}.weight"] = 0.01 * torch.randn(shape, generator=draw)
    return tensors


def guided() -> list[float]:
    """Of each denoising step after the first."""
    import comfy.samplers

    from anchor_core.backends.comfyui.guidance import guide_model, make_guider
    from anchor_core.branches import CLASS
    from anchor_core.guidance import make_rule

    draw = torch.Generator().manual_seed(0)
    # On the CPU without casts, which would cost all alike and more than the step.
    model = comfy.sd.load_diffusion_model(weights, {"dtype": torch.float32} if device == "cpu" else {})
    tensors = lora(model, draw)
    positive, negative = ([[torch.randn(1, 77, 768, generator=draw), {}]] for _ in range(2))
    class_ = [[positive[0][0].clone(), {}]]
    class_[0][0][:, WORD:] = torch.randn(1, 77 - WORD, 768, generator=draw)
    noise = torch.randn(1, 4, SIDE, SIDE, generator=draw)
    if method == CFG:
        model, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    else:
        rule = make_rule(method)
        options = {"class_conditioning": class_} if CLASS in rule.branches else {}
        model = guide_model(model, tensors, rule, **options)
    spent: list[float] = []

    def sample(denoise, x, sigmas, extra_args, callback, disable):
        for sigma in sigmas[:-1]:
            begin = clock()
            denoise(x, sigma * x.new_ones(len(x)), **extra_args)
            if x.is_cuda:
                torch.cuda.synchronize()
            spent.append(clock() - begin)
        return x

    peak.begin(DEVICE)
    sigmas = torch.linspace(10, 0, STEPS + 2)
    guider = make_guider(model, positive, negative, SCALE)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(sample), sigmas, disable_pbar=True)
    return spent[1:]


with torch.inference_mode():  # as ComfyUI runs every prompt
    found = trained() if method in TRAINED else guided()
print(json.dumps({"seconds": [round(value, 4) for value in found], "peak": peak.taken(DEVICE)}))
