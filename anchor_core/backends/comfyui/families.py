"""What ComfyUI's models of each family are called, predict and consist of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_sampling
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from comfy.sd1_clip import SDTokenizer
from torch import Tensor, nn

from ...adapters.config import AdapterConfig
from ...adapters.layers import selected_modules
from ...families import unet_family

ARCHITECTURES = {
    comfy.model_base.SDXL: "stable-diffusion-xl-v1-base",
    comfy.model_base.SD3: "stable-diffusion-v3-medium",
    comfy.model_base.Flux: "flux-1-dev",
}

FAMILY_NAMES = {
    comfy.model_base.SDXL: "sdxl",
    comfy.model_base.SD3: "sd3",
    comfy.model_base.Chroma: "chroma",
    comfy.model_base.Flux2: "flux2",
    comfy.model_base.Flux: "flux",
    comfy.model_base.Lumina2: "lumina2",
    comfy.model_base.WAN21: "wan",
    comfy.model_base.QwenImage: "qwen_image",
}
"""Of `families.FAMILIES`, the derived classes first; UNets of one CLIP are told by its width."""

BLOCKS = {
    "Anima": "blocks",
    "AsymmDiTJoint": "blocks",
    "BooguTransformer2DModel": "noise_refiner context_refiner double_stream_layers single_stream_layers",
    "CameraWanModel": "blocks",
    "CausalWanModel": "blocks",
    "Chroma": "double_blocks single_blocks",
    "ChromaRadiance": "double_blocks single_blocks",
    "ErnieImageModel": "layers",
    "Flux": "double_blocks single_blocks",
    "HiDreamImageTransformer2DModel": "double_stream_blocks single_stream_blocks",
    "HunYuanDiT": "blocks",
    "HunyuanVideo": "double_blocks single_blocks",
    "Ideogram4Transformer2DModel": "layers",
    "JoyImageTransformer3DModel": "double_blocks",
    "Kandinsky5": "text_transformer_blocks visual_transformer_blocks",
    "LensTransformer2DModel": "transformer_blocks",
    "MMDiT": "double_layers single_layers",
    "MageFlowTransformer2DModel": "transformer_blocks",
    "MiniTrainDIT": "blocks",
    "NextDiT": "noise_refiner context_refiner layers",
    "NextDiTPixelSpace": "noise_refiner context_refiner layers",
    "OmniGen2Transformer2DModel": "noise_refiner context_refiner layers",
    "OpenAISignatureMMDITWrapper": "joint_blocks",
    "PixArtMS": "blocks",
    "QwenImageTransformer2DModel": "transformer_blocks",
    "SingleStreamDiT": "blocks",
    "VaceWanModel": "blocks vace_blocks",
    "WanModel": "blocks",
}
"""The module lists that a transformer's blocks are in, by its class: only of networks whose checkpointed gradients are
tested. Classes are named, so that one which another ComfyUI lacks is no error."""

WRITES_IN_PLACE = ("LTXVModel", "PixDiT_T2I")
"""Networks whose blocks overwrite what the gradient needs, and their inputs, so that they cannot be computed again."""

TEXT_LAYERS = {
    OpenAISignatureMMDITWrapper: "context_embedder",
    Flux: "txt_in",
    Chroma: "txt_in",
    NextDiT: "cap_embedder.1",
    WanModel: "text_embedding.0",
    QwenImageTransformer2DModel: "txt_in",
}
"""What a transformer's prompts go through first."""


OTHER_PURPOSES = {
    "makes video and sound in one latent": {"LTXAV", "MiniMaxH3"},
    "makes video of a picture, and takes no prompt": {"SVD_img2vid"},
    "turns a picture's object round, and takes no prompt": {"Stable_Zero123"},
    "makes video that follows a recording of sound": {"WAN22_S2V", "WAN21_HuMo", "WAN22_WanDancer"},
    "makes video that follows the movements of another one": {"WAN22_Animate", "WAN_Animate2", "WAN21_SCAIL"},
    "makes shapes in 3D": {"Hunyuan3Dv2", "Hunyuan3Dv2_1", "TripoSplat", "Trellis2"},
    "looks at pictures, and makes none": {"SAM3", "RT_DETR_v4", "DepthAnything3"},
    "tells the depth or the normals of a picture, in one step": {"Lotus"},
    "finds an object in a video, in one step": {"WAN21_FlowRVS"},
    "refines or enlarges a picture that it is given": {
        "SD_X4Upscaler", "HunyuanImage21Refiner", "HunyuanVideo15_SR_Distilled", "SeedVR2", "PiD",
    },
}  # fmt: skip
"""What models are for that cannot learn a subject from pictures with prompts, by their class or one it derives from."""


def prediction_type(sampling: nn.Module) -> str:
    """`epsilon`, `v_prediction` or `flow`, told by the very methods that turn the network's output into z_0.

    Raises:
        ValueError: it is none of them.
    """
    kinds = comfy.model_sampling

    def does(base: type, *methods: str) -> bool:
        return all(getattr(type(sampling), method, None) is getattr(base, method) for method in methods)

    if does(kinds.ModelSamplingDiscrete, "sigma", "timestep") and does(kinds.EPS, "calculate_input"):
        if sampling.sigma_data == 1 and does(kinds.EPS, "calculate_denoised"):
            return "epsilon"
        if sampling.sigma_data == 1 and does(kinds.V_PREDICTION, "calculate_denoised"):
            return "v_prediction"
    packed = isinstance(sampling, kinds.ModelSamplingAV) or getattr(sampling, "noise_scale", 1.0) != 1
    if does(kinds.CONST, "calculate_input", "calculate_denoised") and sampling.sigma_max <= 1 and not packed:
        return "flow"
    if does(kinds.COSMOS_RFLOW, "calculate_input", "calculate_denoised"):
        return "flow"
    known = "epsilon and v on 1000 steps, and rectified flow of unit noise"
    names = "/".join(base.__name__ for base in type(sampling).__bases__)
    raise ValueError(f"this model samples by {names}, but training knows {known}; connect another model")


def architecture(model: comfy.model_base.BaseModel) -> str:
    """The modelspec name of the architecture; ComfyUI's name of the model, in lower case, where it has none."""
    if isinstance(model.diffusion_model, UNetModel) and type(model) not in ARCHITECTURES:
        return f"stable-diffusion-v{2 if model.model_config.unet_config.get('context_dim') == 1024 else 1}"
    return ARCHITECTURES.get(type(model), type(model).__name__.lower())


def family(model: comfy.model_base.BaseModel) -> str:
    """Of `families.FAMILIES`; empty for a model of none of them."""
    if isinstance(model.model_config, comfy.supported_models.ZImage):
        return "z_image"
    found = next((name for kind, name in FAMILY_NAMES.items() if isinstance(model, kind)), "")
    if not found and isinstance(model.diffusion_model, UNetModel) and type(model) is comfy.model_base.BaseModel:
        return unet_family(model.model_config.unet_config.get("context_dim"))
    return found


def find_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer; of a UNet, its residual and its transformer blocks; empty if they are not known."""
    if isinstance(network, UNetModel):
        return [module for module in network.modules() if isinstance(module, (ResBlock, BasicTransformerBlock))]
    return [block for name in BLOCKS.get(type(network).__name__, "").split() for block in getattr(network, name)]


def file_keys(model: comfy.model_base.BaseModel) -> dict[str, str]:
    """Names of the network's modules, which has no adapter, to key prefixes that the stock LoraLoader reads.

    SD1.x and SD2.x: `lora_unet_<diffusers name>`, which diffusers reads as well; SDXL: `lora_unet_<original name>`;
    other networks: `diffusion_model.<name>`.
    """
    config = model.model_config.unet_config
    names = comfy.utils.unet_to_diffusers(config)
    if not names:
        return {name: f"diffusion_model.{name}" for name, _ in model.diffusion_model.named_modules() if name}
    suffix = ".weight"
    pairs = {name[: -len(suffix)]: key[: -len(suffix)] for key, name in names.items() if key.endswith(suffix)}
    original = config.get("adm_in_channels") is not None
    return {name: f"lora_unet_{(name if original else key).replace('.', '_')}" for name, key in pairs.items()}


def text_encoders(clip, network: nn.Module) -> dict[str, nn.Module]:
    """A CLIP's CLIP models by their prefix in files: `te` for SD1 and SD2; `te1`, `te2` for others; never a T5."""
    return {
        prefix: getattr(clip.cond_stage_model, name).transformer for prefix, name in _clip_names(clip, network).items()
    }


def text_tokenizers(clip, network: nn.Module) -> dict[str, tuple[str, SDTokenizer]]:
    """As `text_encoders`: what each one's tokens are called among those of a prompt, and its tokenizer."""
    names = _clip_names(clip, network)
    return {prefix: (name.removeprefix("clip_"), getattr(clip.tokenizer, name)) for prefix, name in names.items()}


def _clip_names(clip, network: nn.Module) -> dict[str, str]:
    held = getattr(clip, "cond_stage_model", None)
    found = [name for name in ("clip_l", "clip_h", "clip_g") if getattr(held, name, None) is not None]
    # The stock LoraLoader calls a single one `te`, but takes Flux's for `te1` as well, as it is called elsewhere.
    if len(found) == 1 and (isinstance(network, UNetModel) or "clip_g" in found):
        return {"te": found[0]}
    return {f"te{number}": name for number, name in enumerate(found, 1)}


@contextmanager
def pooled_outputs(clip, network: nn.Module) -> Iterator[list[list[Tensor]]]:
    """For each CLIP model, the pooled output (D,) of each prompt that is encoded meanwhile: CLIP-G's projected."""
    found: list[list[Tensor]] = []
    projected = getattr(getattr(getattr(clip, "cond_stage_model", None), "clip_g", None), "transformer", None)
    with ExitStack() as stack:
        for encoder in text_encoders(clip, network).values():
            rows: list[Tensor] = []

            def keep(module: nn.Module, inputs: tuple, output: tuple, rows=rows) -> None:
                *_, with_projection, without = output
                # Of a long prompt's parts the first, as ComfyUI does.
                rows.append((with_projection if module is projected else without)[0])

            stack.callback(encoder.register_forward_hook(keep).remove)
            found.append(rows)
        yield found


def text_keys(encoders: dict[str, nn.Module]) -> dict[str, str]:
    """As `file_keys`, of text encoders without adapters: `te1:<name>` to `lora_te1_<name>`."""
    return {
        f"{prefix}:{name}": f"lora_{prefix}_{name.replace('.', '_')}"
        for prefix, encoder in encoders.items()
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
    }


@dataclass(frozen=True)
class TextInput:
    """The widths that a network takes of a prompt's embeddings and of its pooled output.

    None where it is not known, or none is needed: Flux takes what there is of a pooled output.
    """

    width: int | None = None
    pooled: int | None = None

    @classmethod
    def of(cls, model: comfy.model_base.BaseModel) -> TextInput:
        """Of a model whose network has no adapter."""
        network, config = model.diffusion_model, model.model_config.unet_config
        width = config.get("context_dim") if isinstance(network, UNetModel) else None
        if type(network) in TEXT_LAYERS:
            width = getattr(network.get_submodule(TEXT_LAYERS[type(network)]), "in_features", None)
        if isinstance(model, comfy.model_base.SDXL):
            return cls(width, config["adm_in_channels"] - 6 * 256)  # beside sizes and crops
        return cls(width, config.get("adm_in_channels") if isinstance(model, comfy.model_base.SD3) else None)

    def check(self, name: str, embeddings: Tensor | None, extras: Mapping[str, Any]) -> None:
        """ValueError, naming `name`, if an encoding is not finite or not for this network."""
        read = self.pooled is not None and "unclip_conditioning" not in extras
        pooled = extras.get("pooled_output") if read else None
        if pooled is None and read:
            raise ValueError(f"{name} has no pooled output, but this model takes one; encode it with its own CLIP")
        for part, tensor, takes in ("embeddings", embeddings, self.width), ("a pooled output", pooled, self.pooled):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has {part} with NaN or infinite values; encode the prompt again")
            if tensor is not None and takes is not None and tensor.shape[-1] != takes:
                raise ValueError(
                    f"{name} has {part} of width {tensor.shape[-1]}, but this model takes {takes}; "
                    "encode it with its own CLIP"
                )


def check_makes_pictures(model: comfy.model_base.BaseModel) -> None:
    """ValueError, saying what the model is for, if that is not pictures by a prompt."""
    classes = {kind.__name__ for kind in type(model).__mro__}
    purpose = next((purpose for purpose, kinds in OTHER_PURPOSES.items() if classes & kinds), "")
    if model.model_config.unet_config.get("audio_model"):
        purpose = "makes sound"
    if not purpose and model.latent_format.latent_dimensions not in (2, 3):
        purpose = "has latents that are no pictures"
    if purpose:
        name = type(model).__name__
        raise ValueError(f"this model ({name}) {purpose}; connect one that makes pictures by a prompt")


def takes_frames(model: comfy.model_base.BaseModel) -> bool:
    """Whether latents are (B, C, frames, h, w)."""
    return model.latent_format.latent_dimensions == 3


def check_latents(model: comfy.model_base.BaseModel, latents: Tensor) -> None:
    """ValueError if what a VAE gives, (B, C, h, w) or (B, C, frames, h, w), is not for this model."""
    channels, frames = model.latent_format.latent_channels, takes_frames(model)
    if latents.ndim != 4 + frames or latents.shape[1] != channels:
        raise ValueError(
            f"vae gives latents of {tuple(latents.shape)}, but this model takes {channels} channels"
            f"{' and frames' if frames else ''}; connect the model's own VAE"
        )


def is_guided(model: comfy.model_base.BaseModel) -> bool:
    """Whether the network has an embedded guidance scale, as Flux.1-dev has."""
    return bool(model.model_config.unet_config.get("guidance_embed"))


def check_size(config: AdapterConfig, network: nn.Module) -> None:
    """ValueError if `config` fine-tunes most of the network, which does not fit beside what ComfyUI keeps in memory."""
    if config.kind != "full" or config.ranks:  # a file's layers are not trained
        return
    modules = [network.get_submodule(name) for name in selected_modules(network, config.layers, norms=True)]
    share = sum(map(_size, modules)) / _size(network)
    if share > 0.5:
        raise ValueError(
            f"kind is 'full', which with layers {config.layers!r} trains {share:.0%} of the network: a float32 copy, "
            "its gradient and two averages do not fit beside what ComfyUI holds; take layers cross_attention_kv, or "
            "run `semantic-anchor train --kind full`"
        )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
