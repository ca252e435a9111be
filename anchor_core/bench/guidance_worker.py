"""The measurement of `guidance.py`, under ComfyUI's interpreter.

Usage: guidance_worker.py COMFYUI ROOT WEIGHTS ROUNDS STEPS SIDE DEVICE; prints {method: [[seconds of a step] a round]}.
"""

from __future__ import annotations

import json
import sys
import time

comfyui, root, weights, rounds, steps, side, device = sys.argv[1:]
sys.argv = [sys.argv[0], *(["--cpu"] if device == "cpu" else []), "--disable-dynamic-vram"]
sys.path[:] = [comfyui, *(path for path in sys.path[1:] if path != comfyui), root]  # ComfyUI's `nodes` first

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402

from anchor_core.backends.comfyui.guidance import guide_model, make_guider  # noqa: E402
from anchor_core.branches import CLASS  # noqa: E402
from anchor_core.guidance import RULES, make_rule  # noqa: E402

RANK, SCALE = 8, 5.0
WORD = 5
"""The token at which the class prompt leaves the subject's, where the rules with a mask look for it."""


def lora(model, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """In every projection of every attention, as the trainer's default."""
    tensors = {}
    for name, layer in model.model.diffusion_model.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            for part, shape in (("up", (layer.out_features, RANK)), ("down", (RANK, layer.in_features))):
                tensors[f"diffusion_model.{name}.lora_{part}.weight"] = 0.01 * torch.randn(shape, generator=draw)
    return tensors


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():  # as ComfyUI runs every prompt
        # On the CPU without casts, which would cost both alike and more than the step.
        options = {"dtype": torch.float32} if device == "cpu" else {}
        model = comfy.sd.load_diffusion_model(weights, options)
        tensors = lora(model, draw)
        positive, negative = ([[torch.randn(1, 77, 768, generator=draw), {}]] for _ in range(2))
        class_ = [[positive[0][0].clone(), {}]]
        class_[0][0][:, WORD:] = torch.randn(1, 77 - WORD, 768, generator=draw)
        noise = torch.randn(1, 4, int(side), int(side), generator=draw)
        stock, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
        methods = {"stock": stock, "stock again": stock}
        for name in RULES:
            rule = make_rule(name)
            options = {"class_conditioning": class_} if CLASS in rule.branches else {}
            methods[name] = guide_model(model, tensors, rule, **options)
        timed: dict[str, list[list[float]]] = {method: [] for method in methods}
        for _ in range(int(rounds)):
            for method, guided in methods.items():
                timed[method].append(seconds(make_guider(guided, positive, negative, SCALE), noise))
                print(f"{method}: {timed[method][-1]}", file=sys.stderr)
    print(json.dumps(timed))


# On the CPU the process's own seconds, of all its threads, whatever else the machine does meanwhile.
clock = time.process_time if device == "cpu" else time.perf_counter


def seconds(guider, noise) -> list[float]:
    """Of each step after the first."""
    spent: list[float] = []

    def sample(denoise, x, sigmas, extra_args, callback, disable):
        for sigma in sigmas[:-1]:
            begin = clock()
            denoise(x, sigma * x.new_ones(len(x)), **extra_args)
            if x.is_cuda:
                torch.cuda.synchronize()
            spent.append(round(clock() - begin, 4))
        return x

    sigmas = torch.linspace(10, 0, int(steps) + 2)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(sample), sigmas, disable_pbar=True)
    return spent[1:]


main()
