"""Embeddings in every form that other programs write, wherever a file of one is asked for."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from anchor_core.adapters.attach import attach_file
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter, to_file_keys

VECTORS = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))


def written(folder) -> dict[str, str]:
    """Files of the same two vectors, to the word that each names; empty for its own name."""
    save_file({"emb_params": VECTORS}, folder / "ours.safetensors")
    save_file({"sks": VECTORS}, folder / "learned_embeds.safetensors")
    torch.save({"sks": VECTORS}, folder / "learned_embeds.bin")
    parameter = torch.nn.Parameter(VECTORS.clone())
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": parameter}, "name": "x"}, folder / "a1111.pt")
    return {
        "ours.safetensors": "ours",
        "learned_embeds.safetensors": "sks",
        "learned_embeds.bin": "sks",
        "a1111.pt": "a1111",
    }


def test_every_form_is_the_same_word(eps_denoiser, tmp_path, model_folders):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        model_folders["epsilon"], local_files_only=True, safety_checker=None
    )
    files = written(tmp_path)
    pipeline.load_textual_inversion(tmp_path / "learned_embeds.bin")
    with torch.no_grad():
        expected = pipeline.encode_prompt("a photo of sks dog", "cpu", 1, False)[0][0]
        for file, word in files.items():
            adapter, _ = attach_file(eps_denoiser, tmp_path / file)
            assert adapter.tokens.token == word
            made = eps_denoiser.encode_prompt(f"a photo of {word} dog", adapted=True)
            torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
            eps_denoiser.detach()


@pytest.mark.parametrize("form", ["learned_embeds.safetensors", "learned_embeds.bin", "a1111.pt"])
def test_every_form_goes_beside_a_lora(eps_denoiser, stir, tmp_path, form):
    stir(eps_denoiser.attach(AdapterConfig(rank=2)))
    save_adapter(tmp_path / "lora.safetensors", to_file_keys(eps_denoiser.adapter, eps_denoiser.file_keys()), {})
    eps_denoiser.detach()
    written(tmp_path)
    adapter, _ = attach_file(eps_denoiser, tmp_path / "lora.safetensors", tmp_path / form)
    assert torch.equal(adapter.tokens.vectors["te"].detach(), VECTORS) and len(adapter.module_names) > 1
    eps_denoiser.detach()
    with pytest.raises(ValueError, match="embedding is .*lora.safetensors, but it takes a file of token vectors"):
        attach_file(eps_denoiser, tmp_path / "lora.safetensors", tmp_path / "lora.safetensors")
    torch.save({"sks": torch.zeros(0, 32)}, tmp_path / "none.bin")
    with pytest.raises(ValueError, match=r"none.bin: this embedding has no vectors, but a prompt has room for 1 to 75"):
        attach_file(eps_denoiser, tmp_path / "none.bin")
