"""Every objective with every trained part, in any backend; nothing but torch and anchor_core is imported."""

from __future__ import annotations

from functools import wraps

import torch

from anchor_core import objectives
from anchor_core.adapters.config import AdapterConfig
from anchor_core.concept import Concept
from anchor_core.denoiser import Denoiser
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

CONCEPT = Concept("a photo of a sks star", "a photo of a star")
SHAPE = (4, 16, 16)
PARTS = {
    "full with text": {"kind": "full", "layers": "attention", "text_encoder": True},
    "svdiff": {"kind": "svdiff", "layers": "attention"},
    "oft": {"kind": "oft", "layers": "attention", "rank": 4},
    "textual inversion": {"kind": "none", "vectors": 2, "initial": "star"},
    "custom diffusion": {"kind": "full", "layers": "cross_attention_kv", "vectors": 1, "detach_start": True},
    "lora with text": {"rank": 4, "text_encoder": True},
}
CASES = {
    **{name: {"objective": name} for name in objectives.OBJECTIVES},
    "class kept": {"objective": "anchor", "class_weight": 0.7},
}


def trained(denoiser: Denoiser, part: str, **settings) -> dict[str, list[float]] | str:
    """The terms of two steps, or why there are none."""
    draws = torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(5)).to(denoiser.device)
    given = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "seed": 6, **settings}
    adapter = denoiser.attach(AdapterConfig(**PARTS[part]), seed=1)
    try:
        return train(denoiser, adapter, draws[:2], CONCEPT, TrainSettings(**given), class_latents=draws[2:]).terms
    except ValueError as error:
        return str(error)
    finally:
        denoiser.detach()


def outcomes(denoiser: Denoiser) -> dict[str, dict[str, list[float]] | str]:
    """`trained` by part and case."""
    return {f"{part}, {name}": trained(denoiser, part, **told) for part in PARTS for name, told in CASES.items()}


def check_anchor_is_the_pretrained_models(denoiser: Denoiser) -> None:
    """While the text side is trained, the anchor's class prompt stays that of the pretrained text encoder."""
    class_ = denoiser.encode_prompt(CONCEPT.class_prompt)
    anchor, seen = objectives.semantic_anchoring, []

    @wraps(anchor)
    def watched(step, **options):
        seen.append((step.noisy, step.timesteps, step.anchor, step.current_anchor))
        return anchor(step, **options)

    objectives.OBJECTIVES["anchor"] = watched
    try:
        for part in ("full with text", "custom diffusion", "lora with text"):
            told = trained(denoiser, part, objective="anchor", learning_rate=5e-2)
            assert isinstance(told, dict), told
            noisy, timesteps, said, current = seen[-1]
            with torch.no_grad():
                expected = denoiser.predict(noisy, timesteps, [class_] * len(noisy))
            torch.testing.assert_close(said, expected, atol=1e-5, rtol=0, msg=f"{part}: not the pretrained anchor")
            assert not torch.allclose(current, expected, atol=1e-3), f"{part}: the training changed nothing"
    finally:
        objectives.OBJECTIVES["anchor"] = anchor
