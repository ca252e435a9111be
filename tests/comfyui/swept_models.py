"""A tiny model for every class of `comfy.supported_models.models`, and for the kinds of files that a class may be.

A class that is no entry here is built without a network: what it is must be reason enough to refuse it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import torch
from comfy_models import CHROMA, FLUX, HEADS, LUMINA2, POOLED, QWEN, SD3, SDXL, SIZE, UNET, WAN, WIDTH, Clip, Vae, fill
from torch import Tensor

Told = Callable[[], dict[str, Tensor]]
Encoding = Callable[[Tensor], tuple[Tensor, dict[str, Any]]]
"""What a prompt's embeddings (1, tokens, WIDTH) become, and what the family's text encoder gives beside them."""


@dataclass(frozen=True)
class Swept:
    network: dict[str, Any] = field(default_factory=lambda: {"disable_unet_model_creation": True})
    told_by: Told = dict
    encoding: Encoding = lambda embeddings: (embeddings, {})
    tokens: int | None = None
    """Of every prompt, where the text encoder pads them to one length."""
    size: int = SIZE
    """Of the latents, along an edge."""
    layers: str = "all_linear"
    """As `AdapterConfig.layers`: a layer narrower than the rank takes no LoRA."""


def masked(embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The last token is padding."""
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
    mask[:, -1] = 0
    return embeddings, {"attention_mask": mask}


def unmasked(embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """No token is padding, and the mask says so."""
    return embeddings, {"attention_mask": torch.ones(embeddings.shape[:2], dtype=torch.long)}


def layered(layers: int) -> Encoding:
    return lambda embeddings: (embeddings.repeat(1, 1, layers), {})


def _hunyuan_dit(embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
    mask = torch.ones(embeddings.shape[:2])
    return embeddings, {"attention_mask": mask, "conditioning_mt5xl": -embeddings, "attention_mask_mt5xl": mask}


def _hidream(embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return embeddings, {"conditioning_llama3": torch.stack([-embeddings, 2 * embeddings], 1)}


def _anima(embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
    ids = (embeddings[0, :, 0].abs() * 1000).long()
    return embeddings.repeat(1, 1, 43)[..., :1024], {"t5xxl_ids": ids, "t5xxl_weights": torch.ones(len(ids))}


def _ids(embeddings: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return embeddings, {"text_input_ids": (embeddings[..., 0].abs() * 1000).long()}


def _seconds(*names: str) -> Told:
    """Of Stable Audio's files: what its embedders of durations load."""

    def told() -> dict[str, Tensor]:
        import comfy.ldm.audio.embedders as embedders

        state = embedders.NumberConditioner(768, min_val=0, max_val=512).state_dict()
        return {f"conditioner.conditioners.{name}.{key}": value for name in names for key, value in state.items()}

    return told


def _view() -> dict[str, Tensor]:
    return {"cc_projection.weight": torch.zeros(768, 772), "cc_projection.bias": torch.zeros(768)}


SD2 = UNET | HEADS | {"use_linear_in_transformer": True}
ADM = {"num_classes": "sequential"}
NO_MIDDLE = SDXL | {"transformer_depth_middle": -1}
WAN_I2V = WAN | {"model_type": "i2v"}
HUNYUAN_VIDEO = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED,
    "context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1,
    "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True,
    "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    "meanflow_sum": False,
}  # fmt: skip
HUNYUAN_IMAGE = HUNYUAN_VIDEO | {"vec_in_dim": None, "guidance_embed": False}
HUNYUAN_15 = HUNYUAN_VIDEO | {
    "vec_in_dim": None, "guidance_embed": False, "vision_in_dim": 16, "use_cond_type_embedding": True,
    "meanflow_sum": True, "patch_size": [1, 1, 1], "in_channels": 65, "out_channels": 32, "byt5": False,
}  # fmt: skip
COSMOS_2 = {
    "image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True,
    "crossattn_emb_channels": WIDTH, "pos_emb_cls": "rope3d", "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 8,
    "num_blocks": 2, "num_heads": 2, "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0, "rope_enable_fps_modulation": False,
}  # fmt: skip
COGVIDEO = {
    "image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16,
    "out_channels": 16, "time_embed_dim": 32, "text_embed_dim": WIDTH, "num_layers": 2, "sample_width": 8,
    "sample_height": 8, "sample_frames": 1, "use_rotary_positional_embeddings": True,
}  # fmt: skip
PIXART = {
    "image_model": "pixart_alpha", "num_heads": 2, "patch_size": 2, "hidden_size": 48, "in_channels": 4, "depth": 2,
    "model_max_length": 12, "input_size": 8, "pe_interpolation": 1, "micro_condition": True,
    "caption_channels": WIDTH,
}  # fmt: skip
HUNYUAN_DIT = {
    "image_model": "hydit", "depth": 4, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2.0,
    "text_states_dim": WIDTH, "text_states_dim_t5": WIDTH, "text_len": 12, "text_len_t5": 12,
}  # fmt: skip
CASCADE_C = {
    "stable_cascade_stage": "c", "c_cond": 32, "c_hidden": [32, 32], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
    "c_clip_text": WIDTH, "c_clip_text_pooled": POOLED,
}  # fmt: skip
CASCADE_B = {
    "stable_cascade_stage": "b", "c_hidden": [16, 16, 32, 32], "nhead": [-1, -1, 2, 2], "c_cond": 32,
    "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]], "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]], "c_clip": POOLED,
}  # fmt: skip
FLUX_2 = FLUX | {
    "image_model": "flux2", "axes_dim": [4, 4, 4, 4], "mlp_ratio": 3.0, "theta": 2000, "in_channels": 128,
    "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
    "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3], "patch_size": 1, "vec_in_dim": None,
}  # fmt: skip
RADIANCE = CHROMA | {
    "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 4, "nerf_hidden_size": 8,
    "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": False,
}  # fmt: skip
Z_IMAGE = LUMINA2 | {
    "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 8, "dim": 256, "n_heads": 8,
    "n_kv_heads": 8, "axes_dims": [8, 12, 12], "ffn_dim_multiplier": 0.5,
}  # fmt: skip
MOCHI = {
    "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 48,
    "hidden_size_y": 32, "mlp_ratio_x": 256.0, "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12,
    "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
    "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0,
    "use_t5": True, "t5_feat_dim": WIDTH, "t5_token_length": 12, "rope_theta": 10000.0,
}  # fmt: skip
"""Its network asserts that a ratio of its width is 12,288."""
OMNIGEN_2 = {
    "image_model": "omnigen2", "axes_dim_rope": [4, 6, 6], "axes_lens": [64, 64, 64], "hidden_size": 32,
    "in_channels": 16, "multiple_of": 16, "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 2,
    "num_refiner_layers": 1, "patch_size": 2, "text_feat_dim": WIDTH, "timestep_scale": 1000.0,
}  # fmt: skip
BOOGU = {key: value for key, value in OMNIGEN_2.items() if key != "text_feat_dim"} | {
    "image_model": "boogu", "num_double_stream_layers": 1, "instruction_feat_dim": WIDTH,
}  # fmt: skip
KANDINSKY = {
    "image_model": "kandinsky5", "in_text_dim": WIDTH, "in_text_dim2": POOLED, "time_dim": 32, "model_dim": 32,
    "ff_dim": 64, "visual_embed_dim": 132, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
}  # fmt: skip

BUILT: dict[str, dict[str, Swept]] = {
    "SD15": {
        "": Swept(UNET, tokens=12),
        "inpainting": Swept(UNET | {"in_channels": 9}, tokens=12),
    },
    "SD15_instructpix2pix": {"": Swept(UNET | {"in_channels": 8}, tokens=12)},
    "SD20": {
        "": Swept(SD2, tokens=12),
        "inpainting": Swept(SD2 | {"in_channels": 9}, tokens=12),
    },
    "SD21UnclipL": {"": Swept(SD2 | ADM | {"adm_in_channels": 1536}, tokens=12)},
    "SD21UnclipH": {"": Swept(SD2 | ADM | {"adm_in_channels": 2048}, tokens=12)},
    "SDXLRefiner": {"": Swept(SDXL | {"adm_in_channels": POOLED + 5 * 256}, tokens=12)},
    "SDXL": {
        "": Swept(SDXL, tokens=12),
        "inpainting": Swept(SDXL | {"in_channels": 9}, tokens=12),
        "EDM, as Playground 2.5": Swept(
            SDXL, lambda: {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, tokens=12
        ),
        "v by EDM, as CosXL": Swept(SDXL, lambda: {"edm_vpred.sigma_max": torch.tensor(120.0)}, tokens=12),
    },
    "SDXL_instructpix2pix": {"": Swept(SDXL | {"in_channels": 8}, tokens=12)},
    "SSD1B": {"": Swept(NO_MIDDLE, tokens=12)},
    "Segmind_Vega": {"": Swept(NO_MIDDLE, tokens=12)},
    "KOALA_700M": {"": Swept(NO_MIDDLE, tokens=12)},
    "KOALA_1B": {"": Swept(SDXL, tokens=12)},
    "Stable_Cascade_C": {"": Swept(CASCADE_C, tokens=12)},
    "Stable_Cascade_B": {"": Swept(CASCADE_B, tokens=12)},
    "SD3": {"": Swept(SD3)},
    "AuraFlow": {
        "": Swept(
            {"cond_seq_dim": WIDTH, "dim": 32, "n_layers": 3, "n_double_layers": 1, "n_heads": 2, "max_seq": 64,
             "global_conddim": 32},
            tokens=12,
        )
    },
    "PixArtAlpha": {"": Swept(PIXART, size=40)},
    "PixArtSigma": {"": Swept(PIXART | {"image_model": "pixart_sigma", "micro_condition": False}, size=40)},
    "HunyuanDiT": {"": Swept(HUNYUAN_DIT, encoding=_hunyuan_dit, tokens=12)},
    "HunyuanDiT1": {
        "": Swept(
            HUNYUAN_DIT | {"image_model": "hydit1", "size_cond": True, "use_style_cond": True, "hidden_size": 64},
            encoding=_hunyuan_dit,
            tokens=12,
        )
    },
    "Flux": {
        "": Swept(FLUX),
        "control, as Depth and Canny": Swept(FLUX | {"in_channels": 32}),
    },
    "FluxInpaint": {"": Swept(FLUX | {"in_channels": 96})},
    "FluxSchnell": {"": Swept(FLUX | {"guidance_embed": False})},
    "LongCatImage": {"": Swept(FLUX | {"guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]})},
    "Flux2": {"": Swept(FLUX_2)},
    "Chroma": {"": Swept(CHROMA)},
    "ChromaRadiance": {"": Swept(RADIANCE)},
    "Lens": {
        "": Swept(
            {"image_model": "lens", "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
             "enc_hidden_dim": WIDTH, "axes_dims_rope": (4, 6, 6), "selected_layer_index": (0, 1)},
            encoding=layered(2),
        )
    },
    "LTXV": {
        "": Swept(
            {"image_model": "ltxv", "num_layers": 2, "cross_attention_dim": 32, "attention_head_dim": 16,
             "num_attention_heads": 2, "caption_channels": WIDTH},
            encoding=masked,
            tokens=12,
        )
    },
    "HunyuanVideo": {"": Swept(HUNYUAN_VIDEO)},
    "HunyuanVideoI2V": {"": Swept(HUNYUAN_VIDEO | {"in_channels": 33})},
    "HunyuanVideoSkyreelsI2V": {"": Swept(HUNYUAN_VIDEO | {"in_channels": 32})},
    "HunyuanVideo15": {"": Swept(HUNYUAN_15)},
    "HunyuanImage21": {
        "": Swept(HUNYUAN_IMAGE | {"in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [8, 8]})
    },
    "CosmosT2IPredict2": {"": Swept(COSMOS_2)},
    "CosmosI2VPredict2": {"": Swept(COSMOS_2 | {"in_channels": 17})},
    "Anima": {
        "": Swept(COSMOS_2 | {"image_model": "anima", "crossattn_emb_channels": 1024}, encoding=_anima)
    },
    "Lumina2": {
        "": Swept(LUMINA2, encoding=masked),
        "with pooled CLIP, as NewBie": Swept(LUMINA2 | {"clip_text_dim": POOLED}, encoding=masked),
    },
    "ZImage": {"": Swept(Z_IMAGE)},
    "ZImagePixelSpace": {
        "": Swept(
            Z_IMAGE | {"image_model": "zimage_pixel", "in_channels": 3, "patch_size": 4, "decoder_in_channels": 48,
                       "decoder_hidden_size": 16, "decoder_num_res_blocks": 1, "decoder_max_freqs": 2},
        )
    },
    "PixelDiTT2I": {
        "": Swept(
            {"image_model": "pixeldit_t2i", "num_groups": 2, "hidden_size": 32, "pixel_hidden_size": 4,
             "pixel_attn_hidden_size": 32, "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 1,
             "patch_size": 4, "txt_embed_dim": WIDTH, "txt_max_length": 16},
            tokens=12,
            layers=r"blocks\.",
        )
    },
    "WAN21_T2V": {"": Swept(WAN)},
    "WAN22_T2V": {"": Swept(WAN | {"in_dim": 48, "out_dim": 48})},
    "WAN21_CausalAR_T2V": {"": Swept(WAN)},
    "WAN21_I2V": {"": Swept(WAN_I2V | {"in_dim": 36})},
    "WAN21_FunControl2V": {"": Swept(WAN_I2V | {"in_dim": 48})},
    "WAN21_Vace": {"": Swept(WAN | {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96})},
    "WAN21_Camera": {"": Swept(WAN | {"model_type": "camera", "in_dim": 32})},
    "WAN22_Camera": {"": Swept(WAN | {"model_type": "camera_2.2", "in_dim": 36})},
    "HiDream": {
        "": Swept(
            {"image_model": "hidream", "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6],
             "caption_channels": [WIDTH, WIDTH], "max_resolution": [16, 16], "in_channels": 16,
             "llama_layers": [0, 1], "num_attention_heads": 2, "num_routed_experts": 4, "num_activated_experts": 2,
             "num_layers": 1, "num_single_layers": 1, "out_channels": 16, "patch_size": 2, "text_emb_dim": POOLED},
            encoding=_hidream,
            tokens=12,
        )
    },
    "HiDreamO1": {
        "": Swept(
            {"image_model": "hidream_o1",
             "text_config_overrides": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                                       "num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 128},
             "vision_config_overrides": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}},
            encoding=_ids,
            size=64,
        )
    },
    "Omnigen2": {"": Swept(OMNIGEN_2, encoding=unmasked)},
    "Boogu": {"": Swept(BOOGU, encoding=unmasked)},
    "MageFlow": {
        "": Swept(
            {"image_model": "mage_flow", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
             "joint_attention_dim": WIDTH, "axes_dims_rope": [4, 6, 6]},
        )
    },
    "QwenImage": {
        "": Swept(QWEN),
        "edit, as 2511": Swept(QWEN | {"default_ref_method": "index_timestep_zero"}),
        "layered": Swept(QWEN | {"use_additional_t_cond": True, "default_ref_method": "negative_index"}),
    },
    "JoyImage": {
        "": Swept(
            {"image_model": "joyimage", "hidden_size": 32, "num_attention_heads": 2, "text_dim": WIDTH,
             "mlp_width_ratio": 2.0, "num_layers": 2, "rope_dim_list": [4, 6, 6]},
        )
    },
    "Ideogram4": {
        "": Swept(
            {"image_model": "ideogram4", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
             "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": WIDTH, "mrope_section": (4, 2, 2)},
            encoding=masked,
        )
    },
    "Krea2": {
        "": Swept(
            {"image_model": "krea2", "features": 32, "tdim": 16, "txtdim": WIDTH, "heads": 2, "kvheads": 1,
             "multiplier": 2, "layers": 2, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2},
            encoding=layered(2),
            layers=r"^(?!txtfusion\.projector)",
        )
    },
    "Kandinsky5": {"": Swept(KANDINSKY)},
    "Kandinsky5Image": {"": Swept(KANDINSKY | {"visual_embed_dim": 64, "rope_scale_factor": (1.0, 1.0, 1.0)})},
    "ErnieImage": {
        "": Swept(
            {"image_model": "ernie", "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2,
             "ffn_hidden_size": 64, "text_in_dim": WIDTH, "rope_axes_dim": (4, 6, 6)},
        )
    },
    "GenmoMochi": {"": Swept(MOCHI, tokens=12, encoding=masked)},
    "CogVideoX_T2V": {"": Swept(COGVIDEO, tokens=12)},
    "CogVideoX_I2V": {"": Swept(COGVIDEO | {"in_channels": 32}, tokens=12)},
    "CogVideoX_Inpaint": {"": Swept(COGVIDEO | {"in_channels": 48}, tokens=12)},
    "Stable_Zero123": {"": Swept(UNET | {"in_channels": 8}, told_by=_view)},
    "StableAudio": {"": Swept(told_by=_seconds("seconds_start", "seconds_total"))},
    "StableAudio3": {
        "": Swept(
            {"disable_unet_model_creation": True, "timestep_features_type": "learned"},
            told_by=_seconds("seconds_total"),
        )
    },
}  # fmt: skip
"""Class to kind of file (empty: the usual one) to how it is built."""


def kinds() -> list[tuple[str, str]]:
    """Every class that this ComfyUI knows, by its own list, with each kind of file."""
    return [(each.__name__, kind) for each in supported.models for kind in BUILT.get(each.__name__, {"": Swept()})]


def build(name: str, kind: str = "", dtype: torch.dtype = torch.float32):
    """MODEL, CLIP, VAE, the shape of latents, and which layers train."""
    swept = BUILT.get(name, {"": Swept()})[kind]
    known = getattr(supported, name)
    config = known(known.unet_config | swept.network)
    config.unet_config |= {key: value for key, value in swept.network.items() if key in config.unet_config}
    config.set_inference_dtype(dtype, None)
    model = config.get_model(swept.told_by(), device=torch.device("cpu"))
    if hasattr(model, "diffusion_model"):
        fill(model.diffusion_model)
    device = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())
    form = model.latent_format
    shape = (form.latent_channels, swept.size, swept.size)
    return patcher, Encoder(swept), Vae(form.latent_channels, form.latent_dimensions == 3), shape, swept.layers


class Encoder(Clip):
    """Embeddings drawn by the prompt, and what the family's own text encoder gives beside them."""

    def __init__(self, swept: Swept):
        self.swept = swept

    def encode_from_tokens_scheduled(self, prompt: str, show_pbar: bool = True) -> list:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        tokens = self.swept.tokens or 4 + len(prompt.split())
        embeddings, extras = self.swept.encoding(torch.randn((1, tokens, WIDTH), generator=generator))
        return [[embeddings, {"pooled_output": torch.randn((1, POOLED), generator=generator)} | extras]]
