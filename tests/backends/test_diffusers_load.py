"""Opening models: single-file checkpoints, and what is said of those that cannot be opened."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import save_file

from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from tests.backends import tiny_models
from tests.backends.single_files import single_file

MADE = ("sd1", "sd2_v", "sdxl", "sd3")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nothing may connect, and nothing is in the cache."""

    def refuse(*_):
        raise AssertionError("something is being downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """For each architecture: the whole folder, one of configs and tokenizers alone, and the checkpoint's tensors."""
    result = {}
    for name in MADE:
        folder = tmp_path_factory.mktemp(name)
        pipeline = tiny_models.build(name, folder / "parts")
        pipeline.save_pretrained(folder / "whole")
        shutil.copytree(folder / "whole", folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
        result[name] = (folder / "whole", folder / "config", single_file(name, pipeline))
    return result


@pytest.mark.parametrize("name", MADE)
def test_a_checkpoint_is_the_folders_model(made, tmp_path, name):
    whole, config, tensors = made[name]
    save_file(tensors, tmp_path / "model.safetensors")
    ours = DiffusersDenoiser.from_pretrained(tmp_path / "model.safetensors", config=config)
    theirs = DiffusersDenoiser.from_pretrained(whole)
    noisy = torch.randn(1, *tiny_models.LATENT, generator=torch.Generator().manual_seed(0))

    def outputs(denoiser):
        condition = denoiser.encode_prompt("a photo of a sks dog")
        with torch.no_grad():
            predicted = denoiser.predict(noisy, torch.tensor([400.0]), [condition])
        return predicted, denoiser.decode_latents(noisy), denoiser.encode_images(torch.full((1, 3, 16, 16), 0.3))

    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-4, atol=1e-5)
    assert ours.architecture == theirs.architecture and ours.prediction_type == theirs.prediction_type
    assert ours.dtype == torch.float32


def refused(path, message, config=None):
    with pytest.raises(ValueError, match=message) as caught:
        DiffusersDenoiser.from_pretrained(path, config=config)
    assert "\n" not in str(caught.value)


def test_checkpoints_that_cannot_be_opened(made, tmp_path):
    _, config, tensors = made["sd1"]
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    refused(path, "holds neither tokenizers nor configs.*give config")
    refused(path, "unreadable model_index.json", tmp_path / "nowhere")
    refused(path, "cannot be loaded", made["sdxl"][1])
    shutil.copytree(config, tmp_path / "cut", ignore=shutil.ignore_patterns("tokenizer"))
    refused(path, "config .* has no folder tokenizer", tmp_path / "cut")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    refused(tmp_path / "cut.safetensors", "cannot be loaded", config)
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    refused(tmp_path / "model.ckpt", "takes a diffusers folder.*or a .safetensors checkpoint", config)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model.diffusion_model.out.2.bias", "lacks weights of the network"),
        ("first_stage_model.", "no file named diffusion_pytorch_model"),
        ("cond_stage_model.", "no file named model.safetensors"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "lacks 1 weights of the text_encoder"),
    ],
)
def test_checkpoints_that_are_not_whole(made, tmp_path, lost, message):
    _, config, tensors = made["sd1"]
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(lost)}, tmp_path / "m.safetensors")
    refused(tmp_path / "m.safetensors", message, config)


def test_what_a_checkpoint_lacks_comes_from_the_config_folder(made, tmp_path):
    whole, _, tensors = made["sd3"]
    network = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    save_file(network, tmp_path / "m.safetensors")
    ours = DiffusersDenoiser.from_pretrained(tmp_path / "m.safetensors", config=whole)
    theirs = DiffusersDenoiser.from_pretrained(whole)
    latents = torch.randn(1, *tiny_models.LATENT, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.decode_latents(latents), theirs.decode_latents(latents))
    torch.testing.assert_close(ours.encode_prompt("a dog"), theirs.encode_prompt("a dog"))


def test_folders_that_cannot_be_opened(made, tmp_path):
    whole, config, _ = made["sdxl"]
    refused(whole, "config .* goes with a .safetensors checkpoint only", config)
    refused(config, "cannot be loaded")
    shutil.copytree(whole, tmp_path / "cut", ignore=shutil.ignore_patterns("tokenizer_2"))
    refused(tmp_path / "cut", "has no folder tokenizer_2")
    shutil.copytree(whole, tmp_path / "refiner")
    index = tmp_path / "refiner" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "text_encoder": [None, None]}))
    refused(tmp_path / "refiner", "text_encoder")


def test_precision(made):
    low = DiffusersDenoiser.from_pretrained(made["sdxl"][0], dtype=torch.float16)
    assert low.dtype == low.text_encoder.dtype == torch.float16
    assert low.vae.dtype == torch.float32  # force_upcast: it overflows in half precision
    assert low.encode_images(torch.rand(1, 3, 16, 16)).dtype == torch.float32
