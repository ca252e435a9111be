"""Files of an adapter: through diffusers, attached again, refused, and written whole or not at all."""

from __future__ import annotations

import os

import pytest
import torch

from anchor_core.adapters.attach import attach_file, from_file_keys
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import load_adapter, save_adapter, to_file_keys
from anchor_core.adapters.layers import LAYERS
from anchor_core.adapters.metadata import base_fingerprint
from anchor_core.training.saving import save_trained
from anchor_core.training.settings import TrainSettings
from tests.adapters.networks import predict, snapshot


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("layers", list(LAYERS))
def test_file_gives_the_same_output_through_diffusers(
    denoiser, model_folders, make_step, stir, tmp_path, layers, concept
):
    from diffusers import StableDiffusionPipeline

    adapter = denoiser.attach(AdapterConfig(rank=4, alpha=2, layers=layers))
    stir(adapter, size=0.1)
    save_trained(tmp_path / "lora.safetensors", denoiser, concept, TrainSettings())
    ours = predict(denoiser, make_step)
    with denoiser.adapter_disabled():
        untouched = predict(denoiser, make_step)

    pipeline = StableDiffusionPipeline.from_pretrained(
        model_folders[denoiser.prediction_type], local_files_only=True, safety_checker=None
    )
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    step = make_step(denoiser)
    with torch.no_grad():
        theirs = pipeline.unet(step.noisy, step.timesteps, torch.stack(step.subject_conditions)).sample
    assert (ours - untouched).abs().max() > 1e-3
    assert (ours - theirs).abs().max() < 1e-5


def test_file_attaches_again_with_its_metadata(denoiser, make_step, stir, tmp_path, concept):
    adapter = denoiser.attach(AdapterConfig(rank=3, alpha=1.5, layers="attention_feed_forward"))
    stir(adapter)
    settings = TrainSettings(w=0.25, steps=7, seed=5, learning_rate=2e-3)
    path = tmp_path / "new" / "lora.safetensors"
    save_trained(path, denoiser, concept, settings, steps=4)
    ours, fingerprint = predict(denoiser, make_step), base_fingerprint(denoiser)
    denoiser.detach()
    again, metadata = attach_file(denoiser, path)
    assert torch.equal(predict(denoiser, make_step), ours)
    assert (again.config.rank, again.config.alpha) == (3, 1.5)
    assert {name: metadata[f"anchor.{name}"] for name in ("w", "steps", "seed", "learning_rate", "rank", "alpha")} == {
        "w": "0.25",
        "steps": "4",
        "seed": "5",
        "learning_rate": "0.002",
        "rank": "3",
        "alpha": "1.5",
    }
    assert metadata["anchor.subject_prompt"] == concept.subject_prompt
    assert metadata["anchor.class_prompt"] == concept.class_prompt
    assert metadata["anchor.objective"] == "anchor"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert metadata["anchor.layers"] == "attention_feed_forward"
    assert metadata["anchor.base_model"] == fingerprint and len(fingerprint) == 16
    assert list(path.parent.iterdir()) == [path]


def test_keys_are_kohyas(eps_denoiser, tmp_path):
    adapter = eps_denoiser.attach(AdapterConfig(rank=1, layers=r"down_blocks\.1.*attn1\.to_out\.0$"))
    keys = to_file_keys(adapter, eps_denoiser.file_keys())
    prefix = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert set(keys) == {f"{prefix}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    back = from_file_keys(keys, eps_denoiser.file_keys())
    assert back.keys() == adapter.state_dict().keys()
    del keys[f"{prefix}.alpha"]
    assert from_file_keys(keys, eps_denoiser.file_keys())[f"{adapter.module_names[0]}.alpha"] == 1


@pytest.mark.parametrize("stated", [False, True])
def test_a_file_of_diffusers_own_attaches(eps_denoiser, model_folders, make_step, tmp_path, stated):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(
        model_folders["epsilon"], local_files_only=True, safety_checker=None
    )
    config = LoraConfig(r=4, lora_alpha=8 if stated else 4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    metadata = {"unet_lora_adapter_metadata": config.to_dict()} if stated else {}
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **metadata)
    adapter, _ = attach_file(eps_denoiser, next(tmp_path.glob("*.safetensors")))
    step = make_step(eps_denoiser)
    with torch.no_grad():
        theirs = pipeline.unet(step.noisy, step.timesteps, torch.stack(step.subject_conditions)).sample
    torch.testing.assert_close(predict(eps_denoiser, make_step), theirs)
    assert adapter.config.rank == 4 and adapter.config.alpha == (8 if stated else 4)


def test_file_keys_are_the_same_with_an_adapter(eps_denoiser):
    before = eps_denoiser.file_keys()
    eps_denoiser.attach(AdapterConfig(rank=1, layers="all_linear"))
    assert eps_denoiser.file_keys() == before


def test_a_lora_for_another_model_is_one_line_and_leaves_the_network_alone(
    denoiser, model_folders, make_step, tmp_path, concept
):
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

    other = DiffusersDenoiser.from_pretrained(model_folders["other"])
    other.attach(AdapterConfig(rank=2))
    save_trained(tmp_path / "other.safetensors", other, concept, TrainSettings())
    save_adapter(tmp_path / "text.safetensors", {"lora_te_text_model_0.lora_up.weight": torch.zeros(2, 2)}, {})
    save_adapter(tmp_path / "none.safetensors", {}, {"anchor.w": "0.5"})
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors at all")
    before, untouched = snapshot(denoiser.network), predict(denoiser, make_step)
    for name, message in (
        ("other", "made for another model"),
        ("text", "not a whole LoRA: lora_te_text_model_0 lacks lora_down.weight"),
        ("none", "holds no LoRA"),
        ("broken", "not a readable safetensors file"),
        ("missing", "not a readable safetensors file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            attach_file(denoiser, tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value) and name in str(caught.value)
        assert denoiser.adapter is None
    assert [entry[:3] for entry in snapshot(denoiser.network)] == [entry[:3] for entry in before]
    assert torch.equal(predict(denoiser, make_step), untouched)


def test_a_place_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    tensors = {"a.alpha": torch.tensor(1.0)}
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (tmp_path / "file" / "lora.safetensors", tmp_path / "folder.safetensors"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="cannot be written to") as caught:
            save_adapter(path, tensors, {})
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_adapter(path, {"a.alpha": torch.tensor(1.0)}, {"anchor.w": "0.5"})
    with pytest.raises(TypeError):
        save_adapter(path, {"a.alpha": torch.tensor(2.0)}, {"anchor.w": 0.5})  # metadata holds text only
    tensors, metadata = load_adapter(path)
    assert tensors["a.alpha"] == 1 and metadata == {"anchor.w": "0.5"}
    assert list(tmp_path.iterdir()) == [path]


def test_base_fingerprint_tells_models_apart(model_folders, eps_denoiser):
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

    same = DiffusersDenoiser.from_pretrained(model_folders["epsilon"])
    for one in (eps_denoiser, same):
        one.attach(AdapterConfig(rank=1))
    assert base_fingerprint(same) == base_fingerprint(eps_denoiser)
    with torch.no_grad():
        same.adapter.base_module(same.adapter.module_names[0]).weight[0, 0] += 1e-3
    assert base_fingerprint(same) != base_fingerprint(eps_denoiser)
