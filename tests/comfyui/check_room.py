"""Run under ComfyUI's interpreter: a plain model on a card that is too small for it and a training step together.

Usage: check_room.py COMFYUI PACK OUTPUT. OUTPUT becomes a JSON object: family to what is wrong, or "". The card is the
stand-in's (`paged_vram.py`), of a size, without dynamic VRAM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FAMILIES = ("sdxl", "flux")

if __name__ == "__main__":
    comfyui, pack, output = sys.argv[1:]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[:0] = [comfyui, pack, str(Path(__file__).parent)]  # in this order: ComfyUI has `nodes` and `tests` too

    import paged_vram

    paged_vram.install()

    import comfy.options

    comfy.options.enable_args_parsing()

    import comfy.model_management as management
    import comfy_models as models
    import contract
    import torch
    from comfy_training import picture
    from torch import Tensor

    from anchor_core.adapters.config import AdapterConfig
    from anchor_core.backends.comfyui import weights
    from anchor_core.backends.comfyui.denoiser import ComfyDenoiser
    from anchor_core.data.dataset import Dataset
    from anchor_core.training.events import StepMade
    from anchor_core.training.memory import check_memory
    from anchor_core.training.settings import TrainSettings
    from anchor_core.training.trainer import train

CARD = {"size": 1 << 40}
MODELS: list = []
ASKED: list[int] = []
COPIED: list[str] = []
"""The bytes that were asked for, and the layers whose weights were copied for an adapter that reads them."""


def free_memory(device=None, torch_free_too: bool = False):
    """What the card has beside the weights that are on it; attention, which asks for both, finds enough."""
    if torch_free_too:
        return 1 << 40, 1 << 40
    return CARD["size"] - sum(model.loaded_size() for model in MODELS)


def training(parts, shape, room: int, kind: str = "lora") -> tuple[Tensor, list[Tensor], int]:
    """Losses, factors and the bytes of weights that are on the card, with a picture in the middle."""
    model, CARD["size"] = parts[0], 1 << 40
    with ComfyDenoiser(*parts) as denoiser:
        adapter = denoiser.attach(AdapterConfig(kind=kind, rank=2), 0)
        latents = contract.draw(denoiser, shape, 2)
        dataset = Dataset.of_latents(latents, contract.CONCEPT)
        settings = TrainSettings(steps=3, batch_size=2, learning_rate=1e-2, memory="refuse")
        CARD["size"] = model.model_size() + room
        assert check_memory(settings, denoiser, dataset, contract.CONCEPT) == settings
        loaded, condition = model.loaded_size(), denoiser.encode_prompt("a photo of a dog")

        def preview(event) -> None:
            if isinstance(event, StepMade) and event.step == 1:
                latents = denoiser.sample(
                    [condition], condition, contract.draw(denoiser, shape, 1), steps=1, guidance=2.0
                )
                denoiser.decode_latents(latents)
                assert free_memory() >= ASKED[-1], "ComfyUI took the room back for weights"

        history = train(denoiser, adapter, dataset, contract.CONCEPT, settings, tell=preview)
        return torch.tensor(history.losses), [each.detach().clone() for each in adapter.parameters()], loaded


def check(name: str) -> None:
    """Weights are offloaded for a step, which is the same step; what no offloading makes fit is refused."""
    parts, shape = models.build(name), models.latent_shape(name)
    model, clip, _ = parts
    MODELS[:], CARD["size"] = [model], 1 << 40
    first = picture(model, clip, shape)
    for kind in ("lora", "dora"):
        ASKED.clear()
        COPIED.clear()
        *whole, loaded = training(parts, shape, 1 << 40, kind)
        assert loaded == model.model_size() and not COPIED
        room = ASKED[-1]
        *part, loaded = training(parts, shape, room - model.model_size() // 2, kind)
        assert 0 < loaded < model.model_size() * 0.6, f"{loaded} of {model.model_size()} bytes are on the card"
        assert bool(COPIED) == (kind == "dora"), "DoRA reads a weight that is not on the card"
        for ours, theirs in zip([part[0], *part[1]], [whole[0], *whole[1]], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        try:
            training(parts, shape, room - model.model_size() * 2, kind)
            raise AssertionError("a step that fits nowhere is not refused")
        except ValueError as error:
            assert "memory is 'refuse', but a step takes about" in str(error), error
    CARD["size"] = 1 << 40
    assert torch.equal(picture(model, clip, shape), first)


def main() -> None:
    paged_vram.start()
    management.get_free_memory, management.minimum_inference_memory = free_memory, lambda: 0
    management.extra_reserved_memory, management.MIN_WEIGHT_MEMORY_RATIO = (lambda: 0), 0.0
    models.build = paged_vram.unpaged(models.build)
    own, copied = ComfyDenoiser.make_room, weights.holding
    ComfyDenoiser.make_room = lambda denoiser, needed: ASKED.append(needed) or own(denoiser, needed)
    weights.holding = lambda layer, *arguments: COPIED.append(type(layer).__name__) or copied(layer, *arguments)
    # Of a tensor that both sides have alike, its device does not tell that it was offloaded.
    weights.holds_its_weight = lambda layer, device: not layer.comfy_cast_weights
    with torch.inference_mode():  # as ComfyUI runs every prompt
        results = {name: contract.outcome(check, name) for name in FAMILIES}
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
