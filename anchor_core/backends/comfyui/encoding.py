"""Pictures to latents and back, and prompts to conditions, by ComfyUI's VAE and CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import torch
from torch import Tensor, nn

from . import families
from .tokens import tokenize


@dataclass(eq=False)
class ComfyCondition:
    """One encoded prompt: ComfyUI's cross-attention tensor (1, tokens, width) and its companions.

    `encoded` keeps what the model makes of them, by latent shape.
    """

    cross_attention: Tensor
    extras: dict[str, Any]
    encoded: dict[tuple[int, ...], dict[str, comfy.conds.CONDRegular]] = field(default_factory=dict, init=False)


class Encoding:
    """What a denoiser does with its VAE and CLIP, for which its own weights are released."""

    @property
    def downscale(self) -> int:
        """Pixels of a picture to one of its latents, along an edge."""
        return self.model.model.latent_format.spacial_downscale_ratio

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture; ValueError if its edges are no multiples of `downscale`."""
        if height % self.downscale or width % self.downscale:
            raise ValueError(f"resolution is {width}x{height}, but it takes multiples of {self.downscale}")
        return self.model.model.latent_format.latent_channels, height // self.downscale, width // self.downscale

    def encoding(self) -> AbstractContextManager[None]:
        return self._weights.away()

    def encode_images(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        if min(height, width) < self.downscale:
            raise ValueError(f"images are {width}x{height}, but this model takes {self.downscale} pixels at least")
        # A video VAE takes a batch for the frames of one video.
        batches = pixels.movedim(1, -1).split(1 if self._video else len(pixels))
        with self._weights.released():
            latents = self._frames(torch.cat([self.vae.encode(batch) for batch in batches]))
            families.check_latents(self.model.model, latents)
            latents = self._pictures(self.model.model.process_latent_in(latents))
        return latents.clone().to(self.device)

    def decode_latents(self, latents: Tensor) -> Tensor:
        with self._weights.released():
            pixels = self.vae.decode(self.model.model.process_latent_out(self._frames(latents.clone())))
            pixels = pixels[:, 0] if pixels.ndim == 5 else pixels
        return pixels.clone().movedim(-1, 1).clamp(0, 1)

    def encode_prompt(self, prompt: str, adapted: bool = False) -> ComfyCondition:
        return self.encode_prompts([prompt], adapted)[0]

    def encode_prompts(self, prompts: Sequence[str], adapted: bool = False) -> list[ComfyCondition]:
        """`encode_prompt` of each; ComfyUI changes from the model to the CLIP and back only once."""
        vectors = self.adapter.tokens if adapted and self.adapter is not None else None
        tokenizers = families.text_tokenizers(self.clip, self.network)
        tokens = [tokenize(self.clip, prompt, vectors, tokenizers) for prompt in prompts]
        held = adapted and self.adapter is not None and self.adapter.config.trains_text
        with nullcontext() if held else self._weights.released():
            schedules = [self.clip.encode_from_tokens_scheduled(each, show_pbar=False) for each in tokens]
        return [self._condition(schedule) for schedule in schedules]

    def encode_pooled(self, prompts: Sequence[str], adapted: bool = False) -> Tensor:
        """Each CLIP's pooled output at length 1, side by side, (N, D); CLIP-G's is projected, as models read it."""
        with families.pooled_outputs(self.clip, self.network) as found:
            self.encode_prompts(prompts, adapted)
        if not found:
            raise ValueError("this model's text encoder is no CLIP, and has no pooled output; connect one with a CLIP")
        return torch.cat([nn.functional.normalize(torch.stack(rows), dim=-1) for rows in found], dim=-1).to(self.device)

    def _condition(self, schedule: list) -> ComfyCondition:
        if len(schedule) != 1:
            raise ValueError(f"the CLIP gives {len(schedule)} encodings of one prompt; give a CLIP without hooks")
        cross_attention, extras = schedule[0]
        self._text_input.check("clip: the prompt", cross_attention, extras)
        copies = {key: value.clone() if torch.is_tensor(value) else value for key, value in extras.items()}
        return ComfyCondition(cross_attention.clone().to(self.device), copies)

    def _frames(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) as the model takes them: with a frame axis where it is one of video."""
        return latents.unsqueeze(2) if self._video and latents.ndim == 4 else latents

    def _pictures(self, latents: Tensor) -> Tensor:
        return latents[:, :, 0] if self._video else latents

    token_limit = None  # ComfyUI reads long prompts in parts
