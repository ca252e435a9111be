"""What differs between the architectures: each is one `Family`, found by the class of its network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...denoiser import Condition
from ...embeddings import WHOLE, Part, side_by_side
from ...families import unet_family
from .names import ldm_names
from .noise import Diffusion, Flow, FluxFlow, NoiseProcess
from .text import TextEncoder


class Family:
    """One architecture: how its prompts become conditions, how its network is called, how its files name things.

    Args:
        network: the denoising network.
        encoders: the text encoders in the pipeline's order; None for one that the model goes without.
        downscale: pixels to a latent along an edge, as the autoencoder has it.
    """

    name: str
    """Of `FAMILIES`."""
    pipeline: str
    """diffusers' class of the whole model."""
    network_class: str
    part: str = "transformer"
    """The pipeline's name of the network."""
    text_parts: tuple[str, ...] = ("text_encoder",)
    """The pipeline's names of the text encoders; each has a tokenizer, named alike."""
    optional: tuple[str, ...] = ()
    """Those of them that a model may go without."""
    text_prefixes: dict[str, str]
    """Key of each text encoder that can be adapted, in the pipeline's order, to what its file keys begin with."""
    noise_process: type[NoiseProcess] = Flow
    patch: int = 1
    """Latents to an image token along an edge."""
    usual_size: int = 128
    """The edge of the latents where the network's config leaves it out."""
    distilled: bool = False
    """Whether the network takes a guidance scale as an input, in place of classifier-free guidance."""

    def __init__(self, network: nn.Module, encoders: Sequence[TextEncoder | None], downscale: int):
        self.network = network
        self.encoders = encoders
        self.downscale = downscale

    @property
    def reader(self) -> tuple[TextEncoder, int]:
        """The text encoder that reads most of a prompt, and how many tokens it takes."""
        return self.encoders[0], self.encoders[0].tokenizer.model_max_length

    @classmethod
    def fits(cls, network: nn.Module) -> bool:
        """Whether the network is of this family; of those that fit, the first in `FAMILIES` is it."""
        return type(network).__name__ == cls.network_class

    @classmethod
    def check(cls, network: nn.Module) -> None:
        """ValueError if a network that fits is not supported."""

    @classmethod
    def check_parts(cls, network: nn.Module, encoders: Sequence[nn.Module | None], vae: nn.Module) -> None:
        """ValueError if a text encoder is missing, or the network is of other latents than the autoencoder."""
        for name, encoder in zip(cls.text_parts, encoders):
            if encoder is None and name not in cls.optional:
                raise ValueError(f"the model has no {name}, but a {cls.pipeline} takes {', '.join(cls.text_parts)}")
        takes, gives = cls.channels(network)
        if takes != vae.config.latent_channels or gives != vae.config.latent_channels:
            raise ValueError(
                f"the network takes {takes} and gives {gives} channels, but the autoencoder has "
                f"{vae.config.latent_channels}; inpainting and depth models are not supported"
            )

    @classmethod
    def channels(cls, network: nn.Module) -> tuple[int, int]:
        """Latent channels that the network takes and gives."""
        return network.config.in_channels, network.config.out_channels

    @property
    def architecture(self) -> str:
        """The modelspec name."""
        raise NotImplementedError

    @property
    def sample_size(self) -> int:
        """The edge of the latents that the model was made for, the shorter one of two."""
        told = self.network.config.sample_size or self.usual_size
        return told if isinstance(told, int) else min(told)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.network.transformer_blocks)

    def encode(self, prompt: str) -> Condition:
        """One prompt to one condition."""
        raise NotImplementedError

    def parts(self, condition: Condition) -> list[Part]:
        """Where each text encoder's output lies in a condition's (tokens, width)."""
        return [Part(WHOLE, WHOLE, 0)]

    @property
    def pooled_widths(self) -> tuple[int, ...]:
        """Of the encoders whose outputs a condition's pooled text is."""
        return ()

    def _widths(self, encoders: Sequence[TextEncoder]) -> list[int]:
        return [encoder.model.config.hidden_size for encoder in encoders]

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Sequence[Condition], guidance: float) -> Tensor:
        """The network's output (B, C, h, w); `guidance` is read by distilled networks only."""
        raise NotImplementedError

    def file_keys(self, names: Sequence[str]) -> dict[str, str]:
        """Names of the network's modules to their prefixes in adapter files."""
        return {name: f"transformer.{name}" for name in names}

    def text_file_key(self, key: str, name: str) -> str:
        """The prefix in adapter files of a module of the text encoder `key`."""
        # transformers 5 has no level `text_model` in a CLIPTextModel; files always have it.
        if not name.startswith(("text_model.", "text_projection")):
            name = f"text_model.{name}"
        prefix = self.text_prefixes[key]
        return prefix + (name if prefix.endswith(".") else name.replace(".", "_"))


def stack(conditions: Sequence[tuple[Tensor, ...]], like: Tensor) -> list[Tensor]:
    """Conditions, one a row, to their parts, (B, ...) each, with the device and dtype of `like`."""
    return [torch.stack(parts).to(like) for parts in zip(*conditions)]


class StableDiffusion(Family):
    """SD1.x and SD2.x. A condition is the text encoder's last layer, (tokens, width)."""

    pipeline = "StableDiffusionPipeline"
    network_class = "UNet2DConditionModel"
    part = "unet"
    text_prefixes = {"te": "lora_te_"}
    usual_size = 64
    noise_process = Diffusion

    @classmethod
    def check(cls, network):
        for option in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"):
            if network.config.get(option) is not None:
                raise ValueError(
                    f"the unet has {option}={network.config[option]!r}, but it takes one conditioned on text alone "
                    "(SD1.x, SD2.x), or on text and sizes (SDXL)"
                )

    @property
    def name(self):
        return unet_family(self.network.config.cross_attention_dim)

    @property
    def architecture(self):
        """Told by the width of the text embeddings."""
        return "stable-diffusion-v2" if self.network.config.cross_attention_dim == 1024 else "stable-diffusion-v1"

    @property
    def blocks(self):
        middle = [self.network.mid_block] if self.network.mid_block is not None else []
        return [*self.network.down_blocks, *middle, *self.network.up_blocks]

    def encode(self, prompt):
        return self.encoders[0](prompt)[0][0]

    def predict(self, noisy, timesteps, conditions, guidance):
        embeddings = torch.stack(list(conditions)).to(noisy)
        return self.network(noisy, timesteps, encoder_hidden_states=embeddings, return_dict=False)[0]

    def file_keys(self, names):
        return {name: f"lora_unet_{name.replace('.', '_')}" for name in names}


class StableDiffusionXL(StableDiffusion):
    """SDXL base. A condition is both encoders' penultimate layers, (tokens, width 1 + 2), and the second's pooled text.

    An empty prompt is encoded like any other, and the size conditions say: made at this size, not cropped.
    """

    name = "sdxl"
    pipeline = "StableDiffusionXLPipeline"
    text_parts = ("text_encoder", "text_encoder_2")
    text_prefixes = {"te1": "lora_te1_", "te2": "lora_te2_"}
    architecture = "stable-diffusion-xl-v1-base"
    usual_size = 128

    @classmethod
    def fits(cls, network):
        return super().fits(network) and network.config.addition_embed_type == "text_time"

    @classmethod
    def check(cls, network):
        config = network.config
        sizes = (config.projection_class_embeddings_input_dim or 0) - 6 * (config.addition_time_embed_dim or 0)
        if sizes <= 0 or config.time_cond_proj_dim is not None:
            raise ValueError(
                f"the unet has time_cond_proj_dim={config.time_cond_proj_dim!r} and projection_class_embeddings_input_"
                f"dim={config.projection_class_embeddings_input_dim!r}, but it takes that of SDXL base, conditioned on "
                "text and six sizes"
            )

    def encode(self, prompt):
        first, second = (encoder(prompt, output_hidden_states=True) for encoder in self.encoders)
        embeddings = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return embeddings[0], second.text_embeds[0]

    def parts(self, condition):
        return side_by_side(self._widths(self.encoders), WHOLE)

    @property
    def pooled_widths(self):
        return (self.encoders[1].model.config.projection_dim,)

    def predict(self, noisy, timesteps, conditions, guidance):
        embeddings, pooled = stack(conditions, noisy)
        height, width = (edge * self.downscale for edge in noisy.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).to(noisy).expand(len(noisy), -1)
        return self.network(
            noisy,
            timesteps,
            encoder_hidden_states=embeddings,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
            return_dict=False,
        )[0]

    def file_keys(self, names):
        ldm = ldm_names(self.network)
        return {name: f"lora_unet_{ldm[name].replace('.', '_')}" for name in names}


class StableDiffusion3(Family):
    """SD3 and SD3.5. A condition is (77 + 256 tokens, joint width) and the pooled text of both CLIPs.

    The tokens are both CLIPs' penultimate layers side by side, filled with zeros to the width of T5's last layer, and
    that layer after them: zeros for a model without T5.
    """

    name = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    network_class = "SD3Transformer2DModel"
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3",)
    # LoraLoader and diffusers both read these beside `transformer.` keys; neither pipeline reads `lora_te1_` there.
    text_prefixes = {"te1": "text_encoder.", "te2": "text_encoder_2."}
    architecture = "stable-diffusion-v3-medium"
    t5_tokens = 256

    @property
    def reader(self):
        return super().reader if self.encoders[2] is None else (self.encoders[2], self.t5_tokens)

    @property
    def patch(self):
        return self.network.config.patch_size

    def encode(self, prompt):
        clips = [encoder(prompt, output_hidden_states=True) for encoder in self.encoders[:2]]
        clip = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)[0]
        pooled = torch.cat([output.text_embeds for output in clips], dim=-1)[0]
        width = self.network.config.joint_attention_dim
        t5 = self.encoders[2]
        long = clip.new_zeros(self.t5_tokens, width) if t5 is None else t5(prompt, self.t5_tokens)[0][0]
        return torch.cat([nn.functional.pad(clip, (0, width - clip.shape[-1])), long.to(clip)]), pooled

    def parts(self, condition):
        tokens = len(condition[0]) - self.t5_tokens
        clips = side_by_side(self._widths(self.encoders[:2]), slice(tokens))
        return clips if self.encoders[2] is None else [*clips, Part(slice(tokens, None), WHOLE, 2)]

    @property
    def pooled_widths(self):
        return tuple(encoder.model.config.projection_dim for encoder in self.encoders[:2])

    def predict(self, noisy, timesteps, conditions, guidance):
        embeddings, pooled = stack(conditions, noisy)
        return self.network(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


class Flux(Family):
    """Flux.1. A condition is T5's last layer, (512 tokens, width), and CLIP's pooled text.

    Four latents make one token: (B, C, h, w) is packed to (B, h/2 w/2, 4 C) for the network.
    """

    name = "flux"
    pipeline = "FluxPipeline"
    network_class = "FluxTransformer2DModel"
    text_parts = ("text_encoder", "text_encoder_2")
    text_prefixes = {"te1": "text_encoder."}
    noise_process = FluxFlow
    patch = 2
    sample_size = 128
    t5_tokens = 512

    @classmethod
    def channels(cls, network):
        given = network.config.out_channels or network.config.in_channels
        return network.config.in_channels // cls.patch**2, given // cls.patch**2

    @property
    def distilled(self):
        return bool(self.network.config.guidance_embeds)

    @property
    def reader(self):
        return self.encoders[1], self.t5_tokens

    @property
    def architecture(self):
        return "flux-1-dev" if self.distilled else "flux-1-schnell"

    @property
    def blocks(self):
        return [*self.network.transformer_blocks, *self.network.single_transformer_blocks]

    def encode(self, prompt):
        clip, t5 = self.encoders
        return t5(prompt, self.t5_tokens)[0][0], clip(prompt).pooler_output[0]

    def parts(self, condition):
        return [Part(WHOLE, WHOLE, 1)]

    @property
    def pooled_widths(self):
        return (self.encoders[0].model.config.hidden_size,)

    def predict(self, noisy, timesteps, conditions, guidance):
        embeddings, pooled = stack(conditions, noisy)
        rows, columns = (edge // self.patch for edge in noisy.shape[-2:])
        positions = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
        output = self.network(
            hidden_states=nn.functional.pixel_unshuffle(noisy, self.patch).flatten(2).transpose(1, 2),
            timestep=timesteps / Flow.TIMESTEPS,
            guidance=torch.full((len(noisy),), guidance, device=noisy.device) if self.distilled else None,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            txt_ids=torch.zeros(embeddings.shape[1], 3, device=noisy.device),
            img_ids=positions.to(noisy.device),
            return_dict=False,
        )[0]
        return nn.functional.pixel_shuffle(output.transpose(1, 2).unflatten(2, (rows, columns)), self.patch)


FAMILIES: tuple[type[Family], ...] = (StableDiffusionXL, StableDiffusion, StableDiffusion3, Flux)


def family_of(network: nn.Module) -> type[Family]:
    """The family of a network; ValueError if it is none's, or not supported."""
    family = next((family for family in FAMILIES if family.fits(network)), None)
    if family is None:
        known = ", ".join(dict.fromkeys(family.network_class for family in FAMILIES))
        raise ValueError(f"the network is a {type(network).__name__}, but it takes one of {known}")
    family.check(network)
    return family
