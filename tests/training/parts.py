"""What is trained besides LoRAs, by the options of an adapter, and a short training of it."""

from __future__ import annotations

import torch

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.config import AdapterConfig
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train
from tests.backends import tiny_models
from tests.comfyui import contract

CONCEPT = contract.CONCEPT
ARCHITECTURES = tuple(tiny_models.BUILDERS)
PARTS = {
    "full": {"kind": "full", "layers": "everything"},
    "svdiff": {"kind": "svdiff", "layers": "all_linear_conv"},
    "oft": {"kind": "oft", "layers": "attention", "rank": 4},
    "textual_inversion": {"kind": "none", "vectors": 2, "initial": "dog"},
    "custom_diffusion": {"kind": "full", "layers": "cross_attention_kv", "vectors": 1, "detach_start": True},
    "lora_with_token": {"kind": "lora", "vectors": 1},
    "text_too": {"kind": "full", "layers": "everything", "text_encoder": True},
}


def run(denoiser, options, checkpoints=None, **settings) -> tuple[Adapter, list[float]]:
    """An adapter after a few steps, and their losses."""
    adapter = denoiser.attach(AdapterConfig(**options), seed=1)
    given = {"objective": "reconstruction", "steps": 4, "batch_size": 2, "learning_rate": 1e-2, **settings}
    latents = contract.draw(denoiser, tiny_models.LATENT, 2, seed=5)
    history = train(denoiser, adapter, latents, CONCEPT, TrainSettings(**given), checkpoints=checkpoints)
    return adapter, history.losses


def predict(denoiser, prompt: str = CONCEPT.subject_prompt) -> torch.Tensor:
    with torch.no_grad():
        conditions = [denoiser.encode_prompt(prompt, adapted=True)] * len(contract.LEVELS)
        return denoiser.predict(contract.draw(denoiser, tiny_models.LATENT), contract.times(denoiser), conditions)
