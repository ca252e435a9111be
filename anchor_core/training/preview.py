"""Pictures of the subject prompt while a training goes on, always from the same noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..concept import Concept
from ..denoiser import Condition, Denoiser

STEPS = 12


class Preview:
    """Samples the subject prompt with the adapter as it is.

    Args:
        shape: (C, h, w) of the latents.
        guidance: the scale.
        seed: of the noise.
    """

    def __init__(self, denoiser: Denoiser, concept: Concept, shape: tuple[int, ...], guidance: float, seed: int):
        self.denoiser, self.prompt, self.guidance = denoiser, concept.subject_prompt, guidance
        self._noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))
        self._conditions: list[Condition] | None = None

    def conditions(self) -> list[Condition]:
        """The subject prompt and the empty one, as the text encoder reads them now; once, if it is not trained."""
        if self.denoiser.adapter.config.trains_text:
            with torch.no_grad():
                return self.denoiser.encode_prompts([self.prompt, ""], adapted=True)
        if self._conditions is None:
            self._conditions = self.denoiser.encode_prompts([self.prompt, ""])
        return self._conditions

    def picture(self) -> Tensor:
        """(3, H, W) in [0, 1], on the CPU."""
        subject, negative = self.conditions()
        latents = self.denoiser.sample([subject], negative, self._noise, steps=STEPS, guidance=self.guidance)
        return self.denoiser.decode_latents(latents)[0].detach().cpu()
