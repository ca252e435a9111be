"""A batch that is computed in parts is the same batch."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.data.dataset import Dataset, Example
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("anchor", {"min_snr": 5.0}),
        ("anchor", {"accumulation": 3}),
        ("anchor", {"class_weight": 0.7}),
        ("prior_preservation", {}),
        ("class_diffusion", {}),
        ("sude", {}),
    ],
)
def test_parts_of_a_batch_give_the_gradient_of_the_whole(eps_denoiser, latents, concept, objective, options):
    config = AdapterConfig(rank=2, text_encoder=objective == "class_diffusion" or "class_weight" in options)
    prompts = (concept.subject_prompt,), (concept.class_prompt,)
    masks = torch.rand(len(latents), 1, *latents.shape[2:], generator=torch.Generator().manual_seed(0))
    examples = [Example(row, *prompts, mask=mask) for row, mask in zip(latents, masks)]
    found = {}
    for micro_batch in (0, 1, 3):  # 3 of 4: parts of different sizes
        adapter = eps_denoiser.attach(config)
        gradients: list[torch.Tensor] = []

        def keep(_, adapter=adapter, gradients=gradients) -> None:
            gradients.extend(parameter.grad.clone() for parameter in adapter.parameters())

        settings = TrainSettings(
            objective=objective, steps=1, batch_size=4, micro_batch=micro_batch, grad_clip=0.0, **options
        )
        history = train(
            eps_denoiser, adapter, Dataset(examples), concept, settings, class_latents=latents.flip(0), tell=keep
        )
        eps_denoiser.detach()
        found[micro_batch] = gradients, history
    for micro_batch in (1, 3):
        assert found[micro_batch][1].losses == pytest.approx(found[0][1].losses, rel=1e-5)
        assert found[micro_batch][1].terms.keys() == found[0][1].terms.keys()
        for part, whole in zip(found[micro_batch][0], found[0][0]):
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-7)
