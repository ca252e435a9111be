"""Checks of adapters in a CLIP of ComfyUI's own, for `parity.py`, and a tiny SDXL with its two encoders."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import comfy.sdxl_clip
import comfy_models as models
import contract
import torch
from comfy_models import fingerprint, same

from anchor_core.adapters.file import to_file_keys
from anchor_core.backends.comfyui.denoiser import ComfyDenoiser

CLIP_L = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
CLIP_G = CLIP_L | {"hidden_size": models.WIDTH - 8, "projection_dim": models.POOLED}


def sdxl(embeddings: list[str] | None = None):
    """MODEL, CLIP and VAE of SDXL; `embeddings` are the folders of `embedding:name`."""
    model, _, vae = models.build("sdxl")
    target = comfy.supported_models.supported_models_base.ClipTarget(
        comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel
    )
    options = {"clip_l_model_config": CLIP_L, "clip_g_model_config": CLIP_G, "dtype": torch.float32}
    clip = comfy.sd.CLIP(target, embeddings, model_options=options)
    models.fill(clip.cond_stage_model)
    return model, clip, vae


def check_stock_loader(model, clip, vae) -> None:
    """ComfyUI's own loader gives a CLIP that encodes as `adapted=True` does."""
    with ComfyDenoiser(model, clip, vae) as denoiser, torch.no_grad():
        plain = denoiser.encode_prompt(contract.CONCEPT.class_prompt).cross_attention
        with contract.attached(denoiser, "attention", text_encoder=True, alpha=1.0) as adapter:
            tensors = to_file_keys(adapter, denoiser.file_keys())
            ours = denoiser.encode_prompt(contract.CONCEPT.class_prompt, adapted=True).cross_attention
    _, patched = comfy.sd.load_lora_for_models(model, clip, tensors, 1.0, 1.0)
    ((theirs, _),) = patched.encode_from_tokens_scheduled(patched.tokenize(contract.CONCEPT.class_prompt))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(ours, plain, atol=1e-3)


def check_slope(denoiser, shape) -> None:
    """The gradient of the text encoder's adapter along itself is the slope of the loss, by finite differences."""
    noisy, timesteps = contract.draw(denoiser, shape, 1), contract.times(denoiser, (0.5,))
    with contract.attached(denoiser, "attention", text_encoder=True) as adapter:
        factors = [
            f for n in adapter.module_names if ":" in n for f in adapter.layer(n).parameters() if f.requires_grad
        ]

        def loss() -> torch.Tensor:
            condition = denoiser.encode_prompt(contract.CONCEPT.class_prompt, adapted=True)
            return denoiser.predict(noisy, timesteps, [condition]).double().square().mean()

        gradients = torch.autograd.grad(loss(), factors, materialize_grads=True)
        norm, sides = torch.cat([part.flatten() for part in gradients]).norm(), []
        with torch.no_grad():
            for distance in (3e-2, -6e-2):
                for factor, part in zip(factors, gradients, strict=True):
                    factor += distance * part / norm
                sides.append(loss())
    torch.testing.assert_close(((sides[0] - sides[1]) / 6e-2).float(), norm, rtol=0.03, atol=0)


def outcomes(model, clip, vae) -> dict[str, str]:
    """What is wrong with adapters of text encoders, by check."""
    found, shape = {}, (4, 16, 16)
    comfy.model_management.load_models_gpu([model, clip.patcher])  # a clone with a LoRA was the last one
    before = fingerprint(model), fingerprint(clip.patcher)
    with ComfyDenoiser(model, clip, vae) as denoiser:
        found["adapter"] = contract.outcome(contract.check_text_encoder_adapter, denoiser, shape)
        found["file_keys"] = contract.outcome(contract.check_file_keys, denoiser, shape, text_encoder=True)
        found["detach"] = contract.outcome(contract.check_detach_restores, denoiser, shape, text_encoder=True)
        found["slope"] = contract.outcome(check_slope, denoiser, shape)
    after = fingerprint(model), fingerprint(clip.patcher)
    found["untouched"] = "" if all(map(same, before, after)) else "MODEL or CLIP is another one"
    found["stock_loader"] = contract.outcome(check_stock_loader, model, clip, vae)
    return found
