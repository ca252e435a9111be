"""Run under ComfyUI's interpreter: adapter gradients in 16 bits, and families, for `test_precision_comfyui.py`.

Usage: check_precision.py COMFYUI PACK FOLDER. `FOLDER/results.json` becomes, by case, whether the loss was scaled,
and the cosine to the gradient of the same weights computed in fp32: of the whole, and of the layer that is worst.
Under `families`, what the backend calls each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

comfyui, pack, folder = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [comfyui, pack]  # in this order: both have a `nodes`

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy_models as models  # noqa: E402
import contract  # noqa: E402
import torch  # noqa: E402

from anchor_core.adapters.config import AdapterConfig  # noqa: E402
from anchor_core.backends.comfyui.denoiser import ComfyDenoiser  # noqa: E402
from anchor_core.training import trainer  # noqa: E402
from anchor_core.training.settings import TrainSettings  # noqa: E402

SIDE = 16
SCALED: list[bool] = []


def make_scaler(*arguments, made=trainer.make_scaler):
    scaler = made(*arguments)
    SCALED.append(scaler.is_enabled())
    return scaler


trainer.make_scaler = make_scaler


def gradients(family: str, stored: torch.dtype, computing: torch.dtype, **settings) -> dict[str, torch.Tensor]:
    """By layer, the adapter's gradient as the optimizer of a training sees it."""
    channels, found = models.latent_shape(family)[0], {}
    latents = pictures(channels)
    with ComfyDenoiser(*models.build(family, stored, computing)) as denoiser:
        assert denoiser.compute_dtype == computing
        adapter = denoiser.attach(AdapterConfig(rank=4), 0)

        def keep(_) -> None:
            for name in adapter.module_names:
                own = (p.grad for p in adapter.layer(name).parameters() if p.requires_grad)
                found[name] = torch.cat([gradient.double().flatten() for gradient in own])

        options = TrainSettings(steps=1, batch_size=1, grad_clip=0.0, **settings)
        trainer.train(denoiser, adapter, latents, contract.CONCEPT, options, tell=keep)
    return found


def pictures(channels: int) -> torch.Tensor:
    """Latents as smooth as those of pictures, (1, channels, SIDE, SIDE)."""
    small = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bicubic")


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.cosine_similarity(one, other, dim=0).item()


def compared(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> list[float]:
    whole = cosine(torch.cat([*found.values()]), torch.cat([*exact.values()]))
    return [whole, min(cosine(found[name], exact[name]) for name in exact)]


def main() -> None:
    results = {}
    fp16, bf16, fp32, fp8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
    for family, stored, computing, precision in (
        ("sd1", fp16, fp16, "auto"),
        ("sd1", fp16, fp16, "fp32"),  # what saved workflows say
        ("sdxl", fp8, fp16, "auto"),
        ("flux", bf16, bf16, "auto"),
    ):
        exact = gradients(family, stored, fp32)
        found = gradients(family, stored, computing, precision=precision)
        results[f"{family} {stored} {precision}".replace("torch.", "")] = [SCALED[-1], *compared(found, exact)]
    results["families"] = {name: ComfyDenoiser(*models.build(name)).family for name in models.FAMILIES}
    (Path(folder) / "results.json").write_text(json.dumps(results))


main()
