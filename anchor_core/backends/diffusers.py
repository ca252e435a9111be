"""Stable Diffusion 1.x, 2.x, XL and 3, and Flux, in diffusers' hands, behind the `Denoiser` interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, AdapterConfig
from ..checks import check_count, check_number
from ..denoiser import Condition
from .diffusers_families import TextEncoder, family_of
from .diffusers_load import open_pipeline

TRAINING_GUIDANCE = 1.0
SAMPLING_GUIDANCE = 3.5
"""What a network with an embedded guidance scale (Flux.1-dev) is told in `predict` and in `sample`."""


class DiffusersDenoiser:
    """A diffusers network with its text encoders, autoencoder and noise schedule, all frozen and in eval mode.

    `network` is a UNet2DConditionModel, an SD3Transformer2DModel or a FluxTransformer2DModel; the other arguments
    have the names that diffusers' pipelines give them. Timesteps are the integers of the schedule; 1000 sigma for flow.
    """

    def __init__(
        self,
        network: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        vae: nn.Module,
        scheduler: Any,
        *,
        text_encoder_2: nn.Module | None = None,
        tokenizer_2: Any = None,
        text_encoder_3: nn.Module | None = None,
        tokenizer_3: Any = None,
    ):
        family = family_of(network)
        pairs = ((tokenizer, text_encoder), (tokenizer_2, text_encoder_2), (tokenizer_3, text_encoder_3))
        for name, (_, encoder) in zip(family.text_parts, pairs):
            if encoder is None and name not in family.optional:
                raise ValueError(
                    f"the model has no {name}, but a {family.pipeline} takes {', '.join(family.text_parts)}"
                )
        takes, gives = family.channels(network)
        if takes != vae.config.latent_channels or gives != vae.config.latent_channels:
            raise ValueError(
                f"the network takes {takes} and gives {gives} channels, but the autoencoder has "
                f"{vae.config.latent_channels}; inpainting and depth models are not supported"
            )
        self._noise = family.noise_process(scheduler)
        self.prediction_type: str = self._noise.prediction_type
        self.network = network
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.vae = vae
        self.scheduler = scheduler
        self.adapter: Adapter | None = None
        encoders = [None if encoder is None else TextEncoder(tokenizer, encoder) for tokenizer, encoder in pairs]
        self._family = family(network, encoders[: len(family.text_parts)], self.downscale)
        for module in (network, text_encoder, text_encoder_2, text_encoder_3, vae):
            if module is not None:
                module.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: str | Path | None = None,
    ) -> DiffusersDenoiser:
        """Open a folder in diffusers' layout or a `.safetensors` checkpoint; nothing is downloaded.

        Args:
            config: for a checkpoint, a diffusers folder of its architecture with configs and tokenizers; the default
                is what Hugging Face's cache on this machine holds for the architecture.

        Raises:
            ValueError: if `path` is no model of SD1.x, SD2.x, SDXL, SD3 or Flux, or one that is not supported.
        """
        parts = open_pipeline(path, dtype, config).components
        for name, module in parts.items():
            if isinstance(module, nn.Module):
                # SDXL's autoencoder overflows in half precision, and says so.
                upcast = name == "vae" and dtype == torch.float16 and module.config.get("force_upcast")
                wanted = torch.float32 if upcast else dtype
                module.to(device)
                if module.dtype != wanted:
                    module.to(wanted)
        network = parts.get("unet") or parts.get("transformer")
        names = ("text_encoder", "tokenizer", "vae", "scheduler")
        more = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        try:
            return cls(network, *(parts[name] for name in names), **{name: parts.get(name) for name in more})
        except ValueError as error:
            raise ValueError(f"model {path}: {error}") from error

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def architecture(self) -> str:
        """The modelspec name of the architecture."""
        return self._family.architecture

    # Pictures

    @property
    def downscale(self) -> int:
        """Pixels of a picture to one of its latents, along an edge."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_resolution(self) -> int:
        """The edge of the pictures that the model was made for, in pixels."""
        return self._family.sample_size * self.downscale

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture; ValueError if its edges do not make whole latents and tokens."""
        multiple = self.downscale * self._family.patch
        if height % multiple or width % multiple:
            raise ValueError(f"resolution is {width}x{height}, but it takes multiples of {multiple}")
        return self.vae.config.latent_channels, height // self.downscale, width // self.downscale

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W), to scaled latents (B, C, h, w): the posterior's mode, so repeatable."""
        multiple = self.downscale * self._family.patch
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % multiple or pixels.shape[3] % multiple:
            raise ValueError(
                f"pixels is {tuple(pixels.shape)}, but it takes (B, 3, H, W) with H and W multiples of {multiple}"
            )
        encoded = self.vae.encode(pixels.to(self.device, self.vae.dtype) * 2 - 1)
        # AutoencoderTiny has no posterior.
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return ((latents.float() - self._latent_shift) * self.vae.config.scaling_factor).detach()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pictures in [0, 1], (B, 3, H, W)."""
        latents = latents.to(self.device) / self.vae.config.scaling_factor + self._latent_shift
        return (self.vae.decode(latents.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    @property
    def _latent_shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    # Prompts

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders that an adapter may train: `te`, or `te1` and `te2` in the pipeline's order; never T5."""
        return {key: encoder.model for key, encoder in zip(self._family.text_prefixes, self._family.encoders)}

    def release_text_encoders(self) -> None:
        """Let go of the text encoders, once every prompt is encoded; their memory is free when nobody else has them.

        Raises:
            ValueError: if they are being trained.
        """
        if self.adapter is not None and any(":" in name for name in self.adapter.module_names):
            raise ValueError("the text encoders have an adapter; detach it before they are released")
        self.text_encoder = None
        self._family.encoders = ()

    def encode_prompt(self, prompt: str, adapted: bool = False) -> Condition:
        """One prompt to one condition, by the pretrained text encoders; with their adapter and a graph if `adapted`."""
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is {prompt!r}, but it takes a text")
        with self._encoding(adapted):
            return self._family.encode(prompt)

    @contextmanager
    def _encoding(self, adapted: bool) -> Iterator[None]:
        """The text encoders as a prompt is encoded: pretrained, or with their adapter and a graph."""
        if not self._family.encoders:
            raise ValueError("the text encoders were released; encode every prompt before")
        with torch.set_grad_enabled(adapted and torch.is_grad_enabled()), self._switched(adapted):
            yield

    def encode_prompts(self, prompts: Sequence[str], adapted: bool = False) -> list[Condition]:
        return [self.encode_prompt(prompt, adapted) for prompt in prompts]

    def encode_pooled(self, prompts: Sequence[str], adapted: bool = False) -> Tensor:
        """Each CLIP's pooled output at length 1, side by side, (N, D); projected where the model has a projection."""
        with self._encoding(adapted):
            clips = self._family.encoders[: len(self._family.text_prefixes)]
            rows = [[nn.functional.normalize(clip.pooled(prompt), dim=-1) for clip in clips] for prompt in prompts]
        return torch.stack([torch.cat(row) for row in rows])

    @property
    def token_limit(self) -> int:
        """Tokens of a prompt that the text encoder which reads most of it takes."""
        return self._family.reader[1]

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt for that encoder, with those of its start and end."""
        return self._family.reader[0].count(prompt)

    @contextmanager
    def _switched(self, on: bool) -> Iterator[None]:
        """The adapter, if there is one, on or off while it is open."""
        before = self.adapter is not None and self.adapter.enabled
        if before != on and self.adapter is not None:
            self.adapter.enabled = on
        try:
            yield
        finally:
            if before != on and self.adapter is not None:
                self.adapter.enabled = before

    # The noise process

    def timesteps(self, levels: Tensor) -> Tensor:
        """Levels in [0, 1) to timesteps, (B,): int64, or float32 for flow."""
        return self._noise.timesteps(levels)

    def snr(self, timesteps: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2, (B,)."""
        alpha, sigma = self._noise.coefficients(timesteps)
        return (alpha / sigma).square()

    def _columns(self, timesteps: Tensor) -> Iterator[Tensor]:
        """alpha_t and sigma_t, (B, 1, 1, 1) each."""
        return (part.view(-1, 1, 1, 1) for part in self._noise.coefficients(timesteps))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = alpha_t z_0 + sigma_t eps, (B, C, h, w)."""
        alpha, sigma = self._columns(timesteps)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """eps; v = alpha_t eps - sigma_t z_0; or the velocity eps - z_0 of a flow; (B, C, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "flow":
            return noise - latents
        alpha, sigma = self._columns(timesteps)
        return alpha * noise - sigma * latents

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        """1 for epsilon; alpha_t for v, as eps = sigma_t z_t + alpha_t v, and for flow, as eps = z_t + alpha_t u."""
        alpha, _ = self._noise.coefficients(timesteps)
        return torch.ones_like(alpha) if self.prediction_type == "epsilon" else alpha

    # The network

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Native prediction (B, C, h, w), in float32, with the adapter as it is switched.

        A guidance-distilled network is told a guidance of 1, at which it is an ordinary conditional flow.
        """
        return self._predict(noisy, timesteps, conditions, TRAINING_GUIDANCE)

    def _predict(self, noisy: Tensor, timesteps: Tensor, conditions: Sequence[Condition], guidance: float) -> Tensor:
        if not len(noisy) == len(timesteps) == len(conditions):
            raise ValueError(
                f"predict got {len(noisy)} latents, {len(timesteps)} timesteps and {len(conditions)} conditions, "
                "but it takes one of each a row"
            )
        return self._family.predict(noisy.to(self.dtype), timesteps, conditions, guidance).float()

    @torch.no_grad()
    def sample(
        self, conditions: Sequence[Condition], negative: Condition, noise: Tensor, *, steps: int, guidance: float
    ) -> Tensor:
        """From unit noise (B, C, h, w) to latents: deterministic DDIM, or Euler steps of a flow; one batch a step.

        At a guidance of 1 the negative pass is left out, as it would not count. A guidance-distilled network (Flux-dev)
        is told a guidance of 3.5 instead, whatever `guidance` is: it makes no negative pass.
        """
        check_count("steps", steps)
        check_number("guidance", guidance)
        alone = guidance == 1 or self._family.distilled
        rows = len(noise)
        latents = noise.to(self.device, torch.float32)
        wanted = list(conditions) if alone else [*conditions, *([negative] * rows)]
        sampler = self._noise.sampler(steps, latents[0, 0].numel() // self._family.patch**2)
        for timestep in sampler.timesteps:
            times = timestep.to(self.device).expand(len(wanted))
            prediction = self._predict(
                latents if alone else torch.cat([latents, latents]), times, wanted, SAMPLING_GUIDANCE
            )
            if not alone:
                conditional, unconditional = prediction.chunk(2)
                prediction = unconditional + guidance * (conditional - unconditional)
            latents = sampler.step(prediction, timestep, latents).prev_sample
        return latents

    @property
    def blocks(self) -> list[nn.Module]:
        return self._family.blocks

    # The adapter

    def attach(self, config: AdapterConfig, seed: int = 0) -> Adapter:
        """Attach an adapter of zero effect; ValueError if there is one already."""
        networks = {"": self.network, **(self.text_encoders if config.text_encoder else {})}
        self.adapter = Adapter.attach(networks, config, seed, self.file_keys())
        return self.adapter

    def detach(self) -> None:
        """Take the adapter off, if there is one."""
        if self.adapter is not None:
            self.adapter.detach()
            self.adapter = None

    def adapter_disabled(self) -> AbstractContextManager[None]:
        return nullcontext() if self.adapter is None else self.adapter.disabled()

    def file_keys(self) -> dict[str, str]:
        """Module name to its prefix in adapter files, for every linear and convolution module.

        Modules of a text encoder that can be adapted are there too, under `te1:<name>`.
        """
        keys = self._family.file_keys(self._layers("", self.network))
        for key, encoder in self.text_encoders.items():
            names = self._layers(f"{key}:", encoder)
            keys.update({f"{key}:{name}": self._family.text_file_key(key, name) for name in names})
        return keys

    def _layers(self, prefix: str, network: nn.Module) -> list[str]:
        """Names of a network's own linear and convolution modules, in its order, whether adapted or not."""
        adapted = self.adapter.module_names if self.adapter is not None else ()
        own = {name.removeprefix(prefix) for name in adapted if name.startswith(prefix)}
        names, wrapper = [], None
        for name, module in network.named_modules():
            if name in own:
                names.append(name)
                wrapper = f"{name}."
            # The parts of an adapted module are not the network's own.
            elif isinstance(module, (nn.Linear, nn.Conv2d)) and not (wrapper and name.startswith(wrapper)):
                names.append(name)
        return names
