"""Stable Diffusion 1.x and 2.x in a diffusers folder, behind the `Denoiser` interface."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, AdapterConfig
from ..checks import check_count, check_number

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction")


class DiffusersDenoiser:
    """A diffusers UNet with its text encoder, autoencoder and noise schedule, all frozen and in eval mode.

    z_t = alpha_t z_0 + sigma_t eps, alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]);
    timesteps are the integers of the schedule.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, tokenizer: Any, vae: nn.Module, scheduler: Any):
        _check_supported(unet, vae, scheduler)
        self.network = unet
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.vae = vae
        self.scheduler = scheduler
        self.prediction_type: str = scheduler.config.prediction_type
        self.adapter: Adapter | None = None
        for module in (unet, text_encoder, vae):
            module.eval().requires_grad_(False)
        self._alphas_cumprod = scheduler.alphas_cumprod.double()  # (T,)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> DiffusersDenoiser:
        """Load a folder in diffusers' layout; nothing is downloaded.

        Raises:
            ValueError: if `path` is no folder of a Stable Diffusion pipeline, or one that is not supported.
        """
        from safetensors import SafetensorError

        path = Path(path)
        _check_index(path)
        try:
            with _quiet_loading():
                from diffusers import StableDiffusionPipeline

                pipeline = StableDiffusionPipeline.from_pretrained(
                    str(path),
                    local_files_only=True,
                    safety_checker=None,
                    feature_extractor=None,
                    image_encoder=None,
                    requires_safety_checker=False,
                )
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"model {path} cannot be loaded ({reason}); give a whole diffusers folder") from error
        for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
            module.to(device)
            if module.dtype != dtype:
                module.to(dtype)
        try:
            return cls(pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, pipeline.vae, pipeline.scheduler)
        except ValueError as error:
            raise ValueError(f"model {path}: {error}") from error

    @property
    def device(self) -> torch.device:
        return self.network.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.conv_in.weight.dtype

    @property
    def architecture(self) -> str:
        """The modelspec name of the architecture, told by the width of the text embeddings."""
        return "stable-diffusion-v2" if self.network.config.cross_attention_dim == 1024 else "stable-diffusion-v1"

    # Pictures and prompts

    @property
    def downscale(self) -> int:
        """Pixels of a picture to one of its latents, along an edge."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_resolution(self) -> int:
        """The edge of the pictures that the model was made for, in pixels."""
        return self.network.config.sample_size * self.downscale

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture; ValueError if its edges are no multiples of `downscale`."""
        if height % self.downscale or width % self.downscale:
            raise ValueError(f"resolution is {width}x{height}, but it takes multiples of {self.downscale}")
        return self.network.config.in_channels, height // self.downscale, width // self.downscale

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W), to scaled latents (B, C, h, w): the posterior's mode, so repeatable."""
        factor = self.downscale
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % factor or pixels.shape[3] % factor:
            raise ValueError(
                f"pixels is {tuple(pixels.shape)}, but it takes (B, 3, H, W) with H and W multiples of {factor}"
            )
        encoded = self.vae.encode(pixels.to(self.device, self.dtype) * 2 - 1)
        # AutoencoderTiny has no posterior.
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return ((latents.float() - self._latent_shift) * self.vae.config.scaling_factor).detach()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pictures in [0, 1], (B, 3, H, W)."""
        latents = latents.to(self.device) / self.vae.config.scaling_factor + self._latent_shift
        return (self.vae.decode(latents.to(self.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    @property
    def _latent_shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def encode_prompt(self, prompt: str, adapted: bool = False) -> Tensor:
        """One prompt to its (tokens, width) embedding, padded to the text encoder's length."""
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is {prompt!r}, but it takes a text")
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if len(self.tokenizer(prompt).input_ids) > length:
            logger.warning("the prompt %r is longer than %d tokens; its end is not used", prompt, length)
        return self.text_encoder(tokens.input_ids.to(self.device))[0][0]

    # The noise process

    def timesteps(self, levels: Tensor) -> Tensor:
        """Levels in [0, 1) to timesteps, (B,), int64."""
        return (levels.double() * len(self._alphas_cumprod)).long()

    def snr(self, timesteps: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2, (B,)."""
        alpha, sigma = self._alpha_sigma(timesteps)
        return (alpha / sigma).square()

    def _alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        cumulative = self._alphas_cumprod[timesteps.long().cpu()]
        return cumulative.sqrt().float().to(timesteps.device), (1 - cumulative).sqrt().float().to(timesteps.device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = alpha_t z_0 + sigma_t eps, (B, C, h, w)."""
        alpha, sigma = self._alpha_sigma(timesteps)
        return alpha.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """eps, or v = alpha_t eps - sigma_t z_0, (B, C, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = self._alpha_sigma(timesteps)
        return alpha.view(-1, 1, 1, 1) * noise - sigma.view(-1, 1, 1, 1) * latents

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        """1 for epsilon; alpha_t for v, as eps = sigma_t z_t + alpha_t v."""
        alpha, _ = self._alpha_sigma(timesteps)
        return torch.ones_like(alpha) if self.prediction_type == "epsilon" else alpha

    # The network

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Native prediction (B, C, h, w), in float32, with the adapter as it is switched."""
        if not len(noisy) == len(timesteps) == len(conditions):
            raise ValueError(
                f"predict got {len(noisy)} latents, {len(timesteps)} timesteps and {len(conditions)} conditions, "
                "but it takes one of each a row"
            )
        prediction = self.network(
            noisy.to(self.dtype), timesteps, encoder_hidden_states=torch.stack(list(conditions)), return_dict=False
        )[0]
        return prediction.float()

    @torch.no_grad()
    def sample(
        self, conditions: Sequence[Tensor], negative: Tensor, noise: Tensor, *, steps: int, guidance: float
    ) -> Tensor:
        """Deterministic DDIM with trailing timesteps from unit noise, (B, C, h, w); both passes in one batch.

        At a guidance of 1 the negative pass is left out, as it would not count.
        """
        from diffusers import DDIMScheduler

        check_count("steps", steps)
        check_number("guidance", guidance)
        rows = len(noise)
        # Latents are no pictures, so clipping them to [-1, 1], DDIMScheduler's own default, would be wrong.
        scheduler = DDIMScheduler.from_config(
            self.scheduler.config, timestep_spacing="trailing", clip_sample=False, thresholding=False
        )
        scheduler.set_timesteps(steps)
        latents = noise.to(self.device, torch.float32)
        both = [*conditions, *([negative] * rows)]
        for timestep in scheduler.timesteps.tolist():
            if guidance == 1:
                prediction = self.predict(latents, self._repeat(timestep, rows), conditions)
            else:
                twice = self.predict(torch.cat([latents, latents]), self._repeat(timestep, 2 * rows), both)
                conditional, unconditional = twice.chunk(2)
                prediction = unconditional + guidance * (conditional - unconditional)
            latents = scheduler.step(prediction, timestep, latents, eta=0.0).prev_sample
        return latents

    def _repeat(self, timestep: int, rows: int) -> Tensor:
        return torch.full((rows,), timestep, dtype=torch.int64, device=self.device)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.network.down_blocks, self.network.mid_block, *self.network.up_blocks]

    # The adapter

    def attach(self, config: AdapterConfig, seed: int = 0) -> Adapter:
        """Attach an adapter of zero effect; ValueError if there is one already."""
        self.adapter = Adapter.attach(self.network, config, seed, keys=self.file_keys())
        return self.adapter

    def detach(self) -> None:
        """Take the adapter off, if there is one."""
        if self.adapter is not None:
            self.adapter.detach()
            self.adapter = None

    def adapter_disabled(self) -> AbstractContextManager[None]:
        return nullcontext() if self.adapter is None else self.adapter.disabled()

    def file_keys(self) -> dict[str, str]:
        """Module name to its prefix in adapter files, for every linear and convolution module."""
        names = [name for name, module in self.network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        if self.adapter is not None:
            # An adapted module is a wrapper now, and its parts are not the network's own.
            own = set(self.adapter.module_names)
            names = [name for name in names if not any(name.startswith(f"{module}.") for module in own)] + sorted(own)
        return {name: f"lora_unet_{name.replace('.', '_')}" for name in names}


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without progress bars, which take longer to draw than a small model to load, and without warnings.

    diffusers warns of every autoencoder but AutoencoderKL; what cannot be used raises.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with ExitStack() as restored:
        for part in (diffusers_logging, transformers_logging):
            restored.callback(part.set_verbosity, part.get_verbosity())
            part.set_verbosity_error()
            if part.is_progress_bar_enabled():
                restored.callback(part.enable_progress_bar)
                part.disable_progress_bar()
        yield


def _check_index(path: Path) -> None:
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(f"model is {str(path)!r}, but it takes a diffusers folder, which holds a model_index.json")
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model {path} has an unreadable model_index.json; give a diffusers folder") from error
    if name != "StableDiffusionPipeline":
        raise ValueError(f"model {path} is a {name}, but it takes a StableDiffusionPipeline (SD1.x or SD2.x)")
    for part in ("unet", "text_encoder", "tokenizer", "vae", "scheduler"):
        # Without this, a missing tokenizer would be an empty one.
        if not (path / part).is_dir():
            raise ValueError(f"model {path} has no folder {part}; give a whole diffusers folder")


def _check_supported(unet: nn.Module, vae: nn.Module, scheduler: Any) -> None:
    if type(unet).__name__ != "UNet2DConditionModel":
        raise ValueError(f"the unet is a {type(unet).__name__}, but it takes a UNet2DConditionModel")
    for option in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if unet.config.get(option) is not None:
            raise ValueError(
                f"the unet has {option}={unet.config[option]!r}, but it takes one conditioned on text alone (SD1.x)"
            )
    if unet.config.in_channels != vae.config.latent_channels or unet.config.out_channels != vae.config.latent_channels:
        raise ValueError(
            f"the unet takes {unet.config.in_channels} and gives {unet.config.out_channels} channels, but the "
            f"autoencoder has {vae.config.latent_channels}; inpainting and depth models are not supported"
        )
    kind = scheduler.config.get("prediction_type")
    if not hasattr(scheduler, "alphas_cumprod") or kind not in PREDICTION_TYPES:
        raise ValueError(
            f"the scheduler is a {type(scheduler).__name__} with prediction_type {kind!r}, "
            f"but it takes a discrete diffusion schedule with one of {', '.join(PREDICTION_TYPES)}"
        )
