"""Checks of prompts, and of what is trained in the text encoders."""

from __future__ import annotations

import torch
from torch import Tensor

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.config import AdapterConfig
from anchor_core.denoiser import Denoiser

from .steps import CONCEPT, LAYERS, Shape, attached, draw, stir, times


def check_prompts_ignore_the_adapter(denoiser: Denoiser, shape: Shape, layers: str = LAYERS) -> None:
    """A prompt encoded while an adapter is attached is the pretrained encoder's."""
    noisy, timesteps = draw(denoiser, shape, 1), times(denoiser, (0.5,))

    def predict(condition) -> Tensor:
        with torch.no_grad(), denoiser.adapter_disabled():
            return denoiser.predict(noisy, timesteps, [condition])

    before = predict(denoiser.encode_prompt(CONCEPT.class_prompt))
    with attached(denoiser, layers):
        assert torch.equal(predict(denoiser.encode_prompt(CONCEPT.class_prompt)), before), "the adapter alters prompts"


def _owners(adapter: Adapter) -> list[str]:
    """The module of each of `adapter.parameters()`."""
    return [name for name in adapter.module_names for p in adapter.layer(name).parameters() if p.requires_grad]


def check_text_encoder_adapter(denoiser: Denoiser, shape: Shape, layers: str = LAYERS, **options) -> None:
    """`adapted=True` goes through the text encoder's adapter with a graph; a plain prompt is the pretrained one's."""
    pooled = denoiser.encode_pooled([CONCEPT.class_prompt, ""])
    noisy, timesteps = draw(denoiser, shape, 1), times(denoiser, (0.5,))
    with torch.no_grad():
        before = denoiser.predict(noisy, timesteps, [denoiser.encode_prompt(CONCEPT.class_prompt)])
    with attached(denoiser, layers, text_encoder=True, **options) as adapter:
        keys = denoiser.file_keys()
        text = [name for name in adapter.module_names if ":" in name]
        prefixes = {name.partition(":")[0] for name in text}
        assert prefixes == set(denoiser.text_encoders), f"adapted are {prefixes} of {set(denoiser.text_encoders)}"
        assert all("text_model" in keys[name] or "text_projection" in keys[name] for name in text), (
            f"files name the text encoder's modules like {keys[text[0]]}, without text_model"
        )
        plain = [denoiser.encode_prompt(CONCEPT.class_prompt)]
        through = [denoiser.encode_prompt(CONCEPT.class_prompt, adapted=True)]
        with denoiser.adapter_disabled():
            with torch.no_grad():
                assert torch.equal(denoiser.predict(noisy, timesteps, plain), before), (
                    "a plain prompt is not the pretrained encoder's"
                )
            adapted = denoiser.predict(noisy, timesteps, through)
        assert not torch.allclose(adapted, before, atol=1e-5), "the text encoder's adapter has no effect"
        gradients = torch.autograd.grad(adapted.square().mean(), adapter.parameters(), materialize_grads=True)
        assert any(gradient.any() for gradient in gradients), "no gradient reaches the text encoder's adapter"

        again = denoiser.encode_pooled([CONCEPT.class_prompt, ""])
        assert torch.equal(again, pooled) and not again.requires_grad, "the adapter alters the pretrained pooled output"
        lengths = pooled.square().sum(dim=-1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, len(prefixes)), msg="a CLIP's pooled is not of 1")
        moved = denoiser.encode_pooled([CONCEPT.class_prompt, ""], adapted=True)
        assert not torch.allclose(moved, pooled, atol=1e-5), "the adapter has no effect on the pooled output"
        direction = torch.linspace(-1, 1, moved.shape[1], device=moved.device)
        gradients = torch.autograd.grad(moved[0] @ direction, adapter.parameters(), materialize_grads=True)
        reached = {name for name, gradient in zip(_owners(adapter), gradients) if gradient.any()}
        assert {name.partition(":")[0] for name in reached} == prefixes, f"pooled's gradient reaches {sorted(reached)}"


def check_token_vectors(denoiser: Denoiser, shape: Shape, vectors: int = 2) -> None:
    """Trained vectors count where a prompt has the token and is adapted; every other prompt is the pretrained one's."""
    noisy, timesteps = draw(denoiser, shape, 1), times(denoiser, (0.5,))

    def predict(prompt: str, adapted: bool = False) -> Tensor:
        return denoiser.predict(noisy, timesteps, [denoiser.encode_prompt(prompt, adapted)])

    with torch.no_grad():
        before = [predict(prompt) for prompt in (CONCEPT.subject_prompt, CONCEPT.class_prompt)]
    adapter = denoiser.attach(AdapterConfig(kind="none", vectors=vectors), seed=1)
    try:
        starts = list(adapter.tokens.vectors.values())
        assert set(adapter.tokens.vectors) == set(denoiser.text_encoders)
        assert all(len(part) == vectors and torch.equal(part[0], part[-1]) for part in starts)
        if vectors == 1 and denoiser.prediction_type != "flow":  # T5 reads the prompt without the token
            with torch.no_grad():
                torch.testing.assert_close(predict(CONCEPT.subject_prompt, adapted=True), before[0], atol=1e-5, rtol=0)
        stir(adapter)
        with torch.no_grad():
            plain = [predict(prompt) for prompt in (CONCEPT.subject_prompt, CONCEPT.class_prompt)]
            assert all(map(torch.equal, plain, before)), "a plain prompt is not the pretrained encoder's"
            assert torch.equal(predict(CONCEPT.class_prompt, adapted=True), before[1]), "prompts without it change"
        adapted = predict(CONCEPT.subject_prompt, adapted=True)
        assert not torch.allclose(adapted, before[0], atol=1e-5), "the vectors have no effect"
        gradients = torch.autograd.grad(adapted.square().mean(), adapter.parameters())
        assert all(row.any() for gradient in gradients for row in gradient), "a vector gets no gradient"
    finally:
        denoiser.detach()
