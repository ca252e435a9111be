"""One measurement of `stock.py`, under ComfyUI's interpreter.

Usage: stock_worker.py COMFYUI ROOT WEIGHTS METHOD STEPS SIDE DEVICE; prints {"seconds": [a step each], "peak": bytes}.
"""

from __future__ import annotations

import json
import resource
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

RANK, PICTURES = 8, 4
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
        "batch_size": 1, "grad_accumulation_steps": 1, "steps": int(steps), "learning_rate": 1e-4, "rank": RANK,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "bf16", "lora_dtype": "bf16",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    TrainLoraNode.execute(**{name: [value] for name, value in given.items()})


def ours(model, latents, w: float) -> None:
    from anchor_core.adapters.config import AdapterConfig
    from anchor_core.backends.comfyui.denoiser import ComfyDenoiser
    from anchor_core.concept import Concept
    from anchor_core.training.settings import TrainSettings
    from anchor_core.training.trainer import train

    bar = comfy.utils.ProgressBar(int(steps))
    precision = "bf16" if device == "cpu" else "auto"  # the stock node trains in bf16; on a card, what ComfyUI takes
    settings = TrainSettings(w=w, steps=int(steps), batch_size=1, learning_rate=1e-4, precision=precision)
    with ComfyDenoiser(model, Encoder(), None) as denoiser:
        adapter = denoiser.attach(AdapterConfig(rank=RANK), 0)
        concept = Concept("a photo of a sks dog", "a photo of a dog")
        train(denoiser, adapter, latents, concept, settings, tell=lambda event: bar.update(event.event == "step"))


def main() -> None:
    moments: list[float] = []
    comfy.utils.set_progress_bar_global_hook(lambda *_, **__: moments.append(clock()))
    with torch.inference_mode():  # as ComfyUI runs every prompt
        model = comfy.sd.load_diffusion_model(weights)
        latents = torch.randn(PICTURES, 4, int(side), int(side), generator=torch.Generator().manual_seed(0))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if method == "stock":
            stock(model, latents)
        else:
            ours(model, latents, 0.5 if method == "anchored" else 0.0)
    seconds = [after - before for before, after in zip(moments, moments[1:])]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF)[2]
    print(json.dumps({"seconds": [round(value, 3) for value in seconds], "peak": peak}))


main()
