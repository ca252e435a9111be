"""Which module a layer of an adapter file is for: every program's prefixes, as a network and a dotted name."""

from __future__ import annotations

import re

from .names import dotted

T5 = "t5"
"""The component whose layers are known and never adapted here: T5 in SD3 and Flux."""

_PREFIXES = {
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": T5,
    "text_encoder_3.": T5,
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "lora_te3_": T5,
    "lora_te2_": "text_encoder_2",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_unet_": "",
    "lora_transformer_": "",
    "lycoris_": "",
    "diffusion_model.": "",
    "unet.": "",
    "transformer.": "",
}
"""The beginning of a layer's prefix -> the network: the denoiser's by "", a text encoder by diffusers' component."""

_ROOT = re.compile(
    r"(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks|time_embed|time_embedding|add_embedding"
    r"|label_emb|conv_in|conv_out|joint_blocks|double_blocks|single_blocks|transformer_blocks|img_in|txt_in|time_in"
    r"|single_transformer_blocks|vector_in|guidance_in|final_layer|x_embedder|context_embedder|pos_embed|norm_out"
    r"|time_text_embed|proj_out|text_model)(?=[._])"
)
"""What a prefix of no program, as DiffSynth's and old peft scripts', begins with."""
_T5_NAME = re.compile(r"(encoder\.)?(block\.\d+\.layer\.|final_layer_norm$)|shared$")
_CLIP_NAME = re.compile(r"encoder\.layers\.|embeddings\.|final_layer_norm$")


def module_of(prefix: str) -> tuple[str, str] | None:
    """The network of a layer and its module's name there; None if the prefix is no program's."""
    inner = prefix
    for wrapper in ("unet.base_model.model.", "transformer.base_model.model.", "base_model.model."):
        inner = inner.removeprefix(wrapper)
    wrapped, prefix = inner != prefix, inner
    beginning = next(filter(prefix.startswith, _PREFIXES), None)
    if beginning is None and not (wrapped or _ROOT.match(prefix)):
        return None
    component, name = _PREFIXES.get(beginning, ""), prefix.removeprefix(beginning or "")
    if beginning.endswith("_") if beginning else "." not in name:
        name = dotted(name)
    if component == "" and name.startswith("text_model."):  # LyCORIS' own prefix says no network
        component = "text_encoder"
    if component == "":
        return "", name.replace(".processor.to_out", ".to_out.0").replace(".processor.to_", ".to_")
    if component == T5 or _T5_NAME.match(name):
        return T5, name
    # transformers 5 has no level `text_model` in a CLIPTextModel.
    return component, f"text_model.{name}" if _CLIP_NAME.match(name) else name


def identity(prefix: str) -> str | None:
    """The same for every spelling of one module's prefix; None as `module_of`."""
    found = module_of(prefix)
    return None if found is None else f"{found[0]}:{found[1].replace('.', '_')}"
