"""Stable Diffusion 1.x, 2.x, XL and 3, and Flux, in diffusers' hands, behind the `Denoiser` interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.adapter import Adapter
from ...adapters.config import AdapterConfig
from ...adapters.tokens import start_vectors
from ...branches import NULL, SUBJECT, Branch
from ...checks import check_count, check_number
from ...denoiser import Condition
from ...devices import free_bytes
from ...guidance import Rule
from . import autoencoder
from .families import family_of
from .guidance import RuleSteps
from .load import open_pipeline, place
from .names import own_layers
from .text import TextEncoder

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
        family.check_parts(network, [encoder for _, encoder in pairs], vae)
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
        pipeline = open_pipeline(path, dtype, config)
        place(pipeline, device, dtype)
        try:
            return cls.from_pipeline(pipeline)
        except ValueError as error:
            raise ValueError(f"model {path}: {error}") from error

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> DiffusersDenoiser:
        """Over the parts of a pipeline, which are shared, and frozen: what is attached here is in the pipeline too.

        Raises:
            ValueError: if it is no pipeline of SD1.x, SD2.x, SDXL, SD3 or Flux, or one that is not supported.
        """
        parts = pipeline.components
        network = parts.get("unet") or parts.get("transformer")
        names = ("text_encoder", "tokenizer", "vae", "scheduler")
        more = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        return cls(network, *(parts.get(name) for name in names), **{name: parts.get(name) for name in more})

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    compute_dtype = dtype
    can_checkpoint = True

    def make_room(self, needed: int) -> int:
        return free_bytes(self.device)

    @property
    def family(self) -> str:
        return self._family.name

    @property
    def architecture(self) -> str:
        """The modelspec name of the architecture."""
        return self._family.architecture

    @property
    def downscale(self) -> int:
        """Pixels of a picture to one of its latents, along an edge."""
        return autoencoder.downscale(self.vae)

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

    def encoding(self) -> AbstractContextManager[None]:
        return nullcontext()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W), to scaled latents (B, C, h, w): the posterior's mode, so repeatable."""
        multiple = self.downscale * self._family.patch
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % multiple or pixels.shape[3] % multiple:
            raise ValueError(
                f"pixels is {tuple(pixels.shape)}, but it takes (B, 3, H, W) with H and W multiples of {multiple}"
            )
        return autoencoder.encode(self.vae, pixels.to(self.device))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pictures in [0, 1], (B, 3, H, W)."""
        return autoencoder.decode(self.vae, latents.to(self.device))

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
        if self.adapter is not None and self.adapter.config.trains_text:
            raise ValueError("the text encoders have an adapter; detach it before they are released")
        self.text_encoder = None
        self._family.encoders = ()

    def encode_prompt(self, prompt: str, adapted: bool = False) -> Condition:
        """One prompt to one condition, by the pretrained text encoders; with their adapter and a graph if `adapted`.

        The adapter's token vectors then stand where the prompt has its token.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is {prompt!r}, but it takes a text")
        with self._encoding(adapted):
            return self._family.encode(prompt)

    @contextmanager
    def _encoding(self, adapted: bool) -> Iterator[None]:
        """The text encoders as pretrained and without a graph; or with their adapter and its token vectors."""
        if not self._family.encoders:
            raise ValueError("the text encoders were released; encode every prompt before")
        tokens = self.adapter.tokens if adapted and self.adapter is not None else None
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(adapted and torch.is_grad_enabled()))
            stack.enter_context(self._switched(adapted))
            for encoder, prefix in zip_longest(self._family.encoders, self._family.text_prefixes):
                if encoder is not None:
                    stack.enter_context(encoder.reading(tokens, prefix))
            yield

    def encode_prompts(self, prompts: Sequence[str], adapted: bool = False) -> list[Condition]:
        return [self.encode_prompt(prompt, adapted) for prompt in prompts]

    def encode_pooled(self, prompts: Sequence[str], adapted: bool = False) -> Tensor:
        """Each CLIP's pooled output at length 1, side by side, (N, D); projected where the model has a projection."""
        with self._encoding(adapted):
            clips = self._family.encoders[: len(self._family.text_prefixes)]
            rows = [[nn.functional.normalize(clip.pooled(prompt), dim=-1) for clip in clips] for prompt in prompts]
        return torch.stack([torch.cat(row) for row in rows])

    @torch.no_grad()
    def encode_branches(
        self,
        rule: Rule | None,
        subject: str,
        class_: str | None = None,
        negative: str = "",
        encode_subject: Callable[[], Condition] | None = None,
    ) -> dict[Branch, list[Condition]]:
        """One condition in a list for each branch of a rule, by text encoders with as much of the adapter as it has.

        `SUBJECT` and `NULL` are always there. They are what `sample` takes, for one row.

        Args:
            encode_subject: in place of this denoiser's own encoding of the subject prompt, such as an adjusted one.
        """
        texts = {"subject": subject, "class": class_, "null": negative}
        encoded = {}
        for branch in (SUBJECT, NULL, *(rule.branches if rule is not None else ())):
            with nullcontext() if self.adapter is None else self.adapter.scaled(branch.strength, branch.early):
                if branch.prompt == "subject" and encode_subject is not None:
                    encoded[branch] = [encode_subject()]
                else:
                    encoded[branch] = [self.encode_prompt(texts[branch.prompt], adapted=True)]
        return encoded

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
        return self._noise.snr(timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = alpha_t z_0 + sigma_t eps, (B, C, h, w)."""
        return self._noise.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to predict, (B, C, h, w): see `NoiseProcess.target`."""
        return self._noise.target(latents, noise, timesteps)

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        """What turns a difference of predictions to one of epsilon, (B,)."""
        return self._noise.epsilon_scale(timesteps)

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
        self,
        conditions: Sequence[Condition],
        negative: Condition,
        noise: Tensor,
        *,
        steps: int,
        guidance: float,
        rule: Rule | None = None,
        class_: Sequence[Condition] | None = None,
        encoded: Mapping[Branch, Sequence[Condition]] | None = None,
    ) -> Tensor:
        """From unit noise (B, C, h, w) to latents: deterministic DDIM, or Euler steps of a flow; one batch a step.

        At a guidance of 1 the negative pass is left out, as it would not count. A guidance-distilled network (Flux-dev)
        is told a guidance of 3.5 instead, whatever `guidance` is: it makes no negative pass, and takes no rule.

        Args:
            conditions: of the subject prompts, one a row.
            rule: of guidance, in place of classifier-free guidance.
            class_: for rules that read them, the conditions of the class prompts, one a row.
            encoded: conditions of single branches, one a row, where they differ from those of their prompts: with a
                text encoder whose adapter the branch weakens (`encode_branches`).

        Raises:
            ValueError: for a rule that this model cannot follow; see `RuleSteps`.
        """
        check_count("steps", steps)
        check_number("guidance", guidance)
        rule_steps, encoded = RuleSteps(rule, self.network, self.adapter, class_ is not None), encoded or {}
        # A guidance-distilled network's one prediction is the conditional one.
        guidance = 1.0 if self._family.distilled else guidance
        latents = noise.to(self.device, torch.float32)
        prompts = {"subject": conditions, "class": class_, "null": [negative] * len(noise)}
        sampler = self._noise.sampler(steps, latents[0, 0].numel() // self._family.patch**2)

        for i, timestep in enumerate(sampler.timesteps):
            with rule_steps.step(i, len(sampler.timesteps), guidance, latents) as step:
                wanted = [each for branch in step.branches for each in encoded.get(branch, prompts[branch.prompt])]
                times = timestep.to(self.device).expand(len(wanted))
                rows = latents.repeat(len(step.branches), 1, 1, 1)
                output = self._predict(rows, times, wanted, SAMPLING_GUIDANCE)
            latents = sampler.step(step.guided(output), timestep, latents).prev_sample
        return latents

    @property
    def blocks(self) -> list[nn.Module]:
        return self._family.blocks

    # The adapter

    def attach(self, config: AdapterConfig, seed: int = 0, vectors: Mapping[str, Tensor] | None = None) -> Adapter:
        """Attach an adapter of zero effect, but for token vectors whose start is another word.

        Args:
            vectors: what the token vectors start from instead of `config.initial`, (count, width) by text encoder.

        Raises:
            ValueError: if there is one already, or `config` asks for what this model cannot have.
        """
        if config.trains_text and not self._family.encoders:
            raise ValueError("text_encoder or vectors is set, but the text encoders were released; attach before that")
        networks = {"": self.network, **(self.text_encoders if config.text_encoder else {})}
        if config.vectors and vectors is None:
            word = config.initial or config.token
            pairs = zip(self._family.text_prefixes, self._family.encoders)
            read = {key: (e.tokenizer(word, add_special_tokens=False).input_ids, e.model) for key, e in pairs}
            vectors = start_vectors(word, config.vectors, read)
        self.adapter = Adapter.attach(networks, config, seed, self.file_keys(), vectors)
        return self.adapter

    def detach(self) -> None:
        """Take the adapter off, if there is one."""
        if self.adapter is not None:
            self.adapter.detach()
            self.adapter = None

    def weight_of(self, layer: nn.Module) -> Tensor:
        return layer.weight

    def adapter_disabled(self) -> AbstractContextManager[None]:
        return nullcontext() if self.adapter is None else self.adapter.disabled()

    def file_keys(self) -> dict[str, str]:
        """Module name to its prefix in adapter files, for every linear, convolution and norm module.

        Modules of a text encoder that can be adapted are there too, under `te1:<name>`.
        """
        adapted = self.adapter.module_names if self.adapter is not None else ()
        keys = self._family.file_keys(own_layers(self.network, adapted))
        for key, encoder in self.text_encoders.items():
            names = own_layers(encoder, adapted, f"{key}:")
            keys.update({f"{key}:{name}": self._family.text_file_key(key, name) for name in names})
        return keys
