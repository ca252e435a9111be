"""The contract of every denoiser, over diffusers' own classes of each architecture."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.file import save_adapter, to_file_keys
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from tests.backends import tiny_models
from tests.comfyui import contract

ARCHITECTURES = tuple(tiny_models.BUILDERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in ARCHITECTURES:
        made[name] = tmp_path_factory.mktemp(name) / "model"
        tiny_models.build(name, tmp_path_factory.mktemp("parts")).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module", params=ARCHITECTURES)
def opened(request, folders):
    """One denoiser for all checks: each leaves it as it found it, as the last one asserts."""
    return request.param, DiffusersDenoiser.from_pretrained(folders[request.param])


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(opened, check):
    check(opened[1], tiny_models.LATENT)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_contract_in_half_precision(folders, name):
    denoiser = DiffusersDenoiser.from_pretrained(folders[name], dtype=torch.bfloat16)
    assert denoiser.dtype == denoiser.vae.dtype == torch.bfloat16
    for check in (contract.check_adapter_off_is_untouched, contract.check_detach_restores, contract.check_sampling):
        check(denoiser, tiny_models.LATENT)


def test_text_encoder_adapter(opened):
    contract.check_text_encoder_adapter(opened[1], tiny_models.LATENT)
    contract.check_file_keys(opened[1], tiny_models.LATENT, text_encoder=True)
    contract.check_detach_restores(opened[1], tiny_models.LATENT, text_encoder=True)


@pytest.mark.parametrize("text_encoder", [False, True], ids=["network", "text"])
def test_the_pipeline_reads_the_saved_adapter(opened, folders, tmp_path, text_encoder):
    from diffusers import DiffusionPipeline

    name, denoiser = opened
    noisy, timesteps = contract.draw(denoiser, tiny_models.LATENT), contract.times(denoiser)

    def predict(denoiser, adapted: bool = False):
        conditions = [denoiser.encode_prompt(contract.CONCEPT.subject_prompt, adapted=adapted)] * len(noisy)
        with torch.no_grad():
            return denoiser.predict(noisy, timesteps, conditions)

    with contract.attached(denoiser, "attention_feed_forward", alpha=3.0, text_encoder=text_encoder) as adapter:
        ours = predict(denoiser, text_encoder)
        with denoiser.adapter_disabled():
            without = predict(denoiser)
        without_text = predict(denoiser) if text_encoder else without
        save_adapter(tmp_path / "lora.safetensors", to_file_keys(adapter, denoiser.file_keys()), {})
    pipeline = DiffusionPipeline.from_pretrained(folders[name], local_files_only=True)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    theirs = predict(tiny_models.denoiser_of(pipeline))
    assert min((ours - without).abs().max(), (ours - without_text).abs().max()) > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
