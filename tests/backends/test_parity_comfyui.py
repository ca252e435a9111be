"""The ComfyUI backend against the diffusers backend, on the same weights; skipped where there is no ComfyUI."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfyui import comfy_server

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


@pytest.fixture(scope="session")
def both(tmp_path_factory, weights):
    """Inputs, diffusers' results and ComfyUI's results."""
    from anchor_core.adapters.config import AdapterConfig
    from anchor_core.adapters.file import to_file_keys
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
    from anchor_core.concept import Concept
    from anchor_core.training.settings import TrainSettings
    from anchor_core.training.trainer import train

    draw = torch.Generator().manual_seed(0)
    given = {
        "pixels": torch.rand(2, 3, 64, 64, generator=draw),
        "noise": torch.randn(2, 4, 16, 16, generator=draw),
        "timesteps": torch.tensor([37, 801]),
    }
    denoiser, theirs = DiffusersDenoiser.from_pretrained(weights), {}
    concept = Concept("a photo of a sks star", "a photo of a star")
    given["latents"] = theirs["latents"] = denoiser.encode_images(given["pixels"])
    theirs["decoded"] = denoiser.decode_latents(given["latents"])
    theirs["noisy"] = given["noisy"] = denoiser.add_noise(given["latents"], given["noise"], given["timesteps"])
    theirs["target"] = denoiser.target(given["latents"], given["noise"], given["timesteps"])
    theirs["epsilon_scale"] = denoiser.epsilon_scale(given["timesteps"])
    conditions = [denoiser.encode_prompt(prompt) for prompt in (concept.subject_prompt, concept.class_prompt)]
    with torch.no_grad():
        theirs["prediction"] = denoiser.predict(given["noisy"], given["timesteps"], conditions)
    adapter = denoiser.attach(AdapterConfig(rank=4), 0)
    settings = TrainSettings(steps=10, batch_size=2, seed=3)
    theirs["losses"] = torch.tensor(train(denoiser, adapter, given["latents"], concept, settings).losses)
    theirs |= {f"file.{key}": tensor for key, tensor in to_file_keys(adapter, denoiser.file_keys()).items()}

    script, folder = comfy_server.ROOT / "tests/comfyui/parity.py", tmp_path_factory.mktemp("parity")
    inputs, outputs = folder / "inputs.safetensors", folder / "outputs.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, inputs)
    comfy_server.run_script(script, comfy_server.ROOT, weights, inputs, outputs, folder=folder)
    return given, theirs, load_file(outputs)


@pytest.mark.parametrize("name", ["latents", "decoded", "noisy", "target", "epsilon_scale", "prediction"])
def test_both_backends_compute_the_same(both, name):
    _, theirs, ours = both
    torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


def test_both_backends_have_the_same_first_losses(both):
    _, theirs, ours = both
    torch.testing.assert_close(ours["losses"], theirs["losses"], atol=1e-4, rtol=0)
    assert len(ours["losses"]) == 10


def test_the_same_seed_gives_the_same_adapter_in_both_backends(both):
    """Under the same names; to rounding, which Adam's first steps, of the sign of a gradient, enlarge."""
    _, theirs, ours = both
    names = sorted(name for name in theirs if name.startswith("file."))
    assert names == sorted(name for name in ours if name.startswith("file.")) and len(names) > 30
    one, other = (torch.cat([side[name].flatten().double() for name in names]) for side in (theirs, ours))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99999


def test_adapter_off_is_the_untouched_network(both):
    _, _, ours = both
    assert torch.equal(ours["disabled"], ours["prediction"])
    assert not torch.equal(ours["adapted"], ours["prediction"])


@pytest.mark.parametrize("end", ["finished", "RuntimeError", "InterruptProcessingException"])
def test_the_model_is_untouched_however_a_training_ends(both, end):
    assert both[2][f"untouched.{end}"].item()


def test_a_lora_on_the_model_is_part_of_what_is_trained_on(both):
    _, _, ours = both
    torch.testing.assert_close(ours["patched"], ours["adapted"], atol=1e-5, rtol=0)
    assert torch.equal(ours["again"], ours["prediction"])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_predictions_are_native_for_every_kind_of_model(both, kind):
    torch.testing.assert_close(both[2][f"implied.{kind}"], both[2][f"denoised.{kind}"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [("wrapped", "a function wrapped around it"), ("edm", "samples by ModelSamplingContinuousEDM")],
)
def test_a_model_that_cannot_be_trained_on_is_refused(both, model, message):
    text = bytes(both[2][f"refusal.{model}"].tolist()).decode()
    assert message in text and "\n" not in text


@pytest.mark.parametrize("check", ["adapter", "file_keys", "detach", "slope", "untouched", "stock_loader"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoder_adapters(both, family, check):
    text = bytes(both[2][f"text_encoder.{family}.{check}"].tolist()).decode().strip()
    assert not text, text
