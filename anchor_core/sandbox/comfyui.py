"""The embedded model as ComfyUI's MODEL, CLIP and VAE, built from its diffusers folder.

Every size is read from the folder's own config files, so that another model of SD1.x's classes loads as well.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.utils
import torch
from torch import Tensor

MODEL_TYPES = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
}
BETA_SCHEDULES = {"scaled_linear": "linear", "squaredcos_cap_v2": "cosine"}
"""diffusers' name to ComfyUI's; ComfyUI's `linear` is linear in the square root of beta."""


def load(
    folder: Path, embeddings: list[str] | None = None
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE in float32 from a diffusers folder of SD1.x's classes.

    Args:
        embeddings: folders in which the CLIP looks for `embedding:name`.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a setting that ComfyUI's classes of SD1.x do not have.
    """
    folder = Path(folder)
    unet, vae, text, scheduler = (
        _config(folder, part, name)
        for part, name in (
            ("unet", "config.json"),
            ("vae", "config.json"),
            ("text_encoder", "config.json"),
            ("scheduler", "scheduler_config.json"),
        )
    )
    model = _load_model(folder, unet, vae, scheduler)
    clip = _load_clip(folder, text, embeddings)
    return model, clip, _load_vae(folder, vae)


def _config(folder: Path, part: str, name: str) -> dict[str, Any]:
    path = folder / part / name
    if not path.is_file():
        raise FileNotFoundError(f"no {part}/{name} in {folder}; give a model folder as diffusers saves it")
    return json.loads(path.read_text())


def _weights(folder: Path, part: str, stem: str) -> dict[str, Tensor]:
    path = folder / part / f"{stem}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no {part}/{stem}.safetensors in {folder}; save the model with safetensors")
    return {key: value.float() for key, value in comfy.utils.load_torch_file(str(path), safe_load=True).items()}


def _renamed(weights: dict[str, Tensor], names: dict[str, str], part: str) -> dict[str, Tensor]:
    unknown = [key for key in weights if key not in names]
    if unknown:
        raise ValueError(f"the {part} has {len(unknown)} tensors that ComfyUI does not know, such as {unknown[0]!r}")
    return {names[key]: value for key, value in weights.items()}


# --- MODEL --------------------------------------------------------------------------------------------------------


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """diffusers' UNet2DConditionModel config as the arguments of ComfyUI's UNetModel."""
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    if not isinstance(heads, int):
        raise ValueError(f"the UNet has a list of attention heads, {heads}, but SD1.x takes one number")
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    down = [int("CrossAttn" in kind) for kind in config["down_block_types"]]
    up = [int("CrossAttn" in kind) for kind in reversed(config["up_block_types"])]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": [layers] * len(channels),
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in up for _ in range(layers + 1)],
        "context_dim": config["cross_attention_dim"],
        "num_heads": heads,
        "num_head_channels": -1,
        "adm_in_channels": None,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "use_checkpoint": False,
        "legacy": False,
        "dtype": torch.float32,
    }


class _LatentFormat(comfy.latent_formats.LatentFormat):
    """`process_in` and `process_out` scale by the autoencoder's own factor."""

    def __init__(self, vae: dict[str, Any], rgb: dict[str, Any] | None):
        self.scale_factor = vae["scaling_factor"]
        self.latent_channels = vae["latent_channels"]
        self.spacial_downscale_ratio = 2 ** (len(vae["encoder_block_out_channels"]) - 1)
        if rgb is not None:
            self.latent_rgb_factors = rgb["factors"]
            self.latent_rgb_factors_bias = rgb["bias"]


class _ModelConfig(comfy.supported_models_base.BASE):
    unet_extra_config: dict[str, Any] = {}
    memory_usage_factor = 1.0

    def __init__(self, unet: dict[str, Any], sampling: dict[str, Any], model_type, latent_format):
        super().__init__(unet)
        self.sampling_settings = sampling
        self.latent_format = latent_format
        self._model_type = model_type

    def model_type(self, state_dict, prefix=""):
        return self._model_type


def _sampling_settings(config: dict[str, Any]) -> dict[str, Any]:
    schedule = config["beta_schedule"]
    if schedule not in BETA_SCHEDULES:
        raise ValueError(f"the beta_schedule is {schedule!r}, but ComfyUI takes {', '.join(BETA_SCHEDULES)}")
    return {
        "beta_schedule": BETA_SCHEDULES[schedule],
        "linear_start": config["beta_start"],
        "linear_end": config["beta_end"],
        "timesteps": config["num_train_timesteps"],
        "zsnr": config.get("rescale_betas_zero_snr", False),
    }


def _load_model(folder: Path, unet, vae, scheduler) -> comfy.model_patcher.ModelPatcher:
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in MODEL_TYPES:
        raise ValueError(f"the prediction_type is {prediction!r}, but this loader takes {', '.join(MODEL_TYPES)}")
    rgb_file = folder / "vae" / "latent_rgb.json"
    rgb = json.loads(rgb_file.read_text()) if rgb_file.is_file() else None
    config = _ModelConfig(
        unet_config(unet), _sampling_settings(scheduler), MODEL_TYPES[prediction], _LatentFormat(vae, rgb)
    )
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    weights = _renamed(_weights(folder, "unet", "diffusion_pytorch_model"), names, "UNet")
    model = config.get_model(weights, device=torch.device("cpu"))
    model.diffusion_model.load_state_dict(weights)
    _set_groups(model.diffusion_model, unet["norm_num_groups"])
    # A plain ModelPatcher also where ComfyUI pages weights in and out: the model is small and is to be trained on.
    patcher = comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.cached_patcher_init = (_load_again, (folder,))
    return patcher


def _load_again(folder: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """What ComfyUI calls for a copy of its own, as its training node does; the patcher is plain either way."""
    return load(folder)[0]


def _set_groups(network: torch.nn.Module, groups: int) -> None:
    """ComfyUI builds every group norm with 32 groups; at a small width that would be one group a channel."""
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = groups


# --- VAE ----------------------------------------------------------------------------------------------------------


def _load_vae(folder: Path, config: dict[str, Any]) -> comfy.sd.VAE:
    """A diffusers AutoencoderTiny as the TAESD that ComfyUI knows, with an encoder and a decoder of its own sizes."""
    if config.get("_class_name") != "AutoencoderTiny":
        raise ValueError(f"the autoencoder is a {config.get('_class_name')}, but this loader takes an AutoencoderTiny")
    channels = config["latent_channels"]
    stock = comfy.taesd.taesd.TAESD(latent_channels=channels)
    vae = comfy.sd.VAE(sd=stock.state_dict(), dtype=torch.float32)
    weights = _weights(folder, "vae", "diffusion_pytorch_model")
    network = vae.first_stage_model
    for name, layers in (("encoder", _encoder_layers(config)), ("decoder", _decoder_layers(config))):
        part = torch.nn.Sequential(*layers)
        prefix = f"{name}.layers."
        part.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        # ComfyUI's decoder holds the clamp, diffusers' applies it in `forward`.
        part = torch.nn.Sequential(comfy.taesd.taesd.Clamp(), *part) if name == "decoder" else part
        setattr(network, f"taesd_{name}", part.eval().to(vae.vae_dtype))
    vae.patcher.size = 0  # counted for the stock sizes; ComfyUI counts again when it is zero
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(config["encoder_block_out_channels"]) - 1)
    return vae


def _encoder_layers(config: dict[str, Any]) -> list[torch.nn.Module]:
    conv, block = comfy.taesd.taesd.conv, comfy.taesd.taesd.Block
    layers = []
    for level, (width, blocks) in enumerate(zip(config["encoder_block_out_channels"], config["num_encoder_blocks"])):
        layers.append(conv(width, width, stride=2, bias=False) if level else conv(config["in_channels"], width))
        layers += [block(width, width) for _ in range(blocks)]
    return [*layers, conv(width, config["latent_channels"])]


def _decoder_layers(config: dict[str, Any]) -> list[torch.nn.Module]:
    conv, block = comfy.taesd.taesd.conv, comfy.taesd.taesd.Block
    widths = config["decoder_block_out_channels"]
    layers = [conv(config["latent_channels"], widths[0]), torch.nn.ReLU()]
    for level, (width, blocks) in enumerate(zip(widths, config["num_decoder_blocks"])):
        layers += [block(width, width) for _ in range(blocks)]
        if level < len(widths) - 1:
            layers += [torch.nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
    return [*layers, conv(widths[-1], config["out_channels"])]


# --- CLIP ---------------------------------------------------------------------------------------------------------


class _TextModel(comfy.clip_model.CLIPTextModel):
    """CLIPTextModel with the vocabulary of its config: ComfyUI's own always has CLIP's 49408 tokens."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        self.text_model.embeddings = comfy.clip_model.CLIPEmbeddings(
            config["hidden_size"],
            vocab_size=config["vocab_size"],
            num_positions=config["max_position_embeddings"],
            dtype=dtype,
            device=device,
            operations=operations,
        )


def _load_clip(folder: Path, config: dict[str, Any], embeddings: list[str] | None) -> comfy.sd.CLIP:
    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}
    length = config["max_position_embeddings"]
    encoder = partial(
        comfy.sd1_clip.SDClipModel,
        max_length=length,
        textmodel_json_config=config,
        special_tokens=special,
        model_class=_TextModel,
        return_projected_pooled=False,
    )
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(folder / "tokenizer"),
        max_length=length,
        embedding_size=config["hidden_size"],
        pad_token=special["pad"],
    )
    weights = {
        key if key.startswith("text_model.") else f"text_model.{key}": value
        for key, value in _weights(folder, "text_encoder", "model").items()
        if not key.endswith("position_ids")
    }
    weights["text_projection.weight"] = torch.eye(config["hidden_size"])  # SD1.x has none and reads none
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder),
    )
    clip = comfy.sd.CLIP(target, embeddings, model_options={"dtype": torch.float32}, disable_dynamic=True)
    missing, unexpected = clip.cond_stage_model.clip_l.transformer.load_state_dict(weights, strict=False)
    if missing or unexpected:
        wrong = ", ".join([*missing, *unexpected][:3])
        raise ValueError(f"the text encoder does not fit its config: missing or unknown are {wrong}")
    return clip
