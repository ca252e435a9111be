from __future__ import annotations

import json
import shutil

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser


@pytest.fixture
def pipeline(denoiser, model_folders):
    """The same model as `denoiser`, in diffusers' own hands."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        model_folders[denoiser.prediction_type], local_files_only=True, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_half_precision_weights_are_read_in_the_asked_precision(tmp_path, pipeline, make_step):
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipeline, name).half()
    pipeline.save_pretrained(tmp_path / "half")
    loaded = DiffusersDenoiser.from_pretrained(tmp_path / "half")
    for name, module in (("unet", loaded.network), ("vae", loaded.vae), ("text_encoder", loaded.text_encoder)):
        theirs = getattr(pipeline, name).state_dict()
        for key, value in module.state_dict().items():
            assert not value.is_floating_point() or value.dtype == torch.float32
            assert torch.equal(value, theirs[key].to(value.dtype))
    low = DiffusersDenoiser.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert low.dtype == low.text_encoder.dtype == low.vae.dtype == torch.bfloat16
    low.attach(AdapterConfig(rank=2))
    assert make_step(low).subject.dtype == torch.float32


def noise(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def test_everything_is_frozen_and_in_eval_mode(denoiser):
    for module in (denoiser.network, denoiser.text_encoder, denoiser.vae):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert denoiser.device == torch.device("cpu") and denoiser.dtype == torch.float32


def test_prompt_encoding_is_diffusers(denoiser, pipeline):
    for prompt in ("a photo of a sks dog", ""):
        with torch.no_grad():
            theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        assert torch.equal(denoiser.encode_prompt(prompt), theirs[0])
    with pytest.raises(ValueError, match="^prompt is 3"):
        denoiser.encode_prompt(3)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(eps_denoiser, caplog):
    assert eps_denoiser.encode_prompt("dog " * 200).shape == (77, 32)
    assert "longer than 77 tokens" in caplog.text


def test_each_row_has_its_own_condition_and_timestep(denoiser):
    conditions = [denoiser.encode_prompt(prompt) for prompt in ("a sks dog", "a cat in the snow")]
    timesteps = torch.tensor([100, 900])
    with torch.no_grad():
        together = denoiser.predict(noise(), timesteps, conditions)
        apart = [
            denoiser.predict(noise()[row : row + 1], timesteps[row : row + 1], [conditions[row]]) for row in (0, 1)
        ]
        swapped = denoiser.predict(noise(), timesteps, conditions[::-1])
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, swapped, atol=1e-4)
    with pytest.raises(ValueError, match="2 latents, 2 timesteps and 1 conditions"):
        denoiser.predict(noise(), timesteps, conditions[:1])


def test_noise_process_is_diffusers(denoiser, latents):
    timesteps = denoiser.timesteps(torch.tensor([0.02, 0.5, 0.93]))
    eps = noise(3)
    torch.testing.assert_close(
        denoiser.add_noise(latents, eps, timesteps), denoiser.scheduler.add_noise(latents, eps, timesteps)
    )
    wanted = eps if denoiser.prediction_type == "epsilon" else denoiser.scheduler.get_velocity(latents, eps, timesteps)
    torch.testing.assert_close(denoiser.target(latents, eps, timesteps), wanted)


def test_timesteps_are_shares_of_the_schedule(denoiser):
    levels = torch.tensor([0.0, 0.05, 0.5, 0.9999], dtype=torch.float64)
    assert denoiser.timesteps(levels).tolist() == [0, 50, 500, 999]


def test_snr_is_alpha_over_sigma_squared(denoiser):
    timesteps = torch.tensor([0, 300, 999])
    cumulative = denoiser.scheduler.alphas_cumprod[timesteps].double()
    torch.testing.assert_close(denoiser.snr(timesteps).double(), cumulative / (1 - cumulative), rtol=1e-4, atol=0)


def test_pictures_are_encoded_to_the_mode_and_scaled(denoiser):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    latents = denoiser.encode_images(pixels)
    assert latents.shape == (2, 4, 8, 8) and torch.equal(latents, denoiser.encode_images(pixels))
    with torch.no_grad():
        mean = denoiser.vae.encode(pixels * 2 - 1).latent_dist.mean
        decoded = denoiser.vae.decode(mean).sample
    torch.testing.assert_close(latents, 0.7 * mean)
    torch.testing.assert_close(denoiser.decode_latents(latents), (decoded / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ValueError, match="multiples of 2"):
        denoiser.encode_images(pixels[..., :15])


def test_sampling_is_diffusers_ddim(denoiser, pipeline):
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    prompts = ["a photo of a sks dog", "a cat in the snow"]
    theirs = pipeline(
        prompts, num_inference_steps=5, guidance_scale=4.0, latents=noise(), output_type="latent", eta=0.0
    ).images
    conditions = [denoiser.encode_prompt(prompt) for prompt in prompts]
    empty = denoiser.encode_prompt("")
    ours = denoiser.sample(conditions, empty, noise(), steps=5, guidance=4.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, denoiser.sample(conditions, empty, noise(), steps=5, guidance=4.0))
    assert not ours.requires_grad


def test_sampling_makes_one_batch_a_step_and_half_of_it_without_guidance(eps_denoiser):
    conditions, empty = [eps_denoiser.encode_prompt("a dog")] * 2, eps_denoiser.encode_prompt("")
    rows = []
    eps_denoiser.network.register_forward_hook(lambda _, args, output: rows.append(len(args[0])))
    eps_denoiser.sample(conditions, empty, noise(), steps=3, guidance=4.0)
    eps_denoiser.sample(conditions, empty, noise(), steps=3, guidance=1.0)
    assert rows == [4, 4, 4, 2, 2, 2]


def test_sampling_follows_the_adapter(denoiser, stir):
    condition, empty = [denoiser.encode_prompt("a dog")] * 2, denoiser.encode_prompt("")

    def sample():
        return denoiser.sample(condition, empty, noise(), steps=2, guidance=2.0)

    untouched = sample()
    stir(denoiser.attach(AdapterConfig(rank=2)))
    assert not torch.allclose(sample(), untouched)
    with denoiser.adapter_disabled():
        assert torch.equal(sample(), untouched)
    denoiser.detach()
    assert torch.equal(sample(), untouched)


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": "5"}, {"guidance": float("nan")}])
def test_bad_sampling_options_are_named(eps_denoiser, options):
    (name,) = options
    empty = eps_denoiser.encode_prompt("")
    with pytest.raises(ValueError, match=f"^{name} is"):
        eps_denoiser.sample([empty] * 2, empty, noise(), **{"steps": 2, "guidance": 1.0, **options})


def test_autoencoder_tiny_is_read_as_well(eps_denoiser):
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        )
    other = DiffusersDenoiser(
        eps_denoiser.network, eps_denoiser.text_encoder, eps_denoiser.tokenizer, vae, eps_denoiser.scheduler
    )
    latents = other.encode_images(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert latents.shape == (1, 4, 8, 8)
    assert other.decode_latents(latents).shape == (1, 3, 16, 16)


def one_line_error(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        DiffusersDenoiser.from_pretrained(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_folder_that_is_no_model(tmp_path):
    one_line_error(tmp_path, "takes a diffusers folder")
    one_line_error(tmp_path / "missing", "takes a diffusers folder")
    (tmp_path / "model_index.json").write_text("{")
    one_line_error(tmp_path, "unreadable model_index.json")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    one_line_error(tmp_path, "is a PixArtSigmaPipeline, but it takes one of .*StableDiffusionPipeline")


def test_broken_models(tmp_path, model_folders):
    whole = model_folders["epsilon"]
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        folder = tmp_path / f"no_{name}"
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(name))
        one_line_error(folder, f"has no folder {name}")
    folder = tmp_path / "no_weights"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors"))
    one_line_error(folder, "cannot be loaded")
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    one_line_error(folder, "cannot be loaded")


def test_unsupported_schedules_and_networks(tmp_path, model_folders, eps_denoiser):
    from diffusers import UNet2DConditionModel

    folder = tmp_path / "sample"
    shutil.copytree(model_folders["epsilon"], folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "sample"}))
    one_line_error(folder, "prediction_type 'sample'.*epsilon, v_prediction")

    parts = (eps_denoiser.text_encoder, eps_denoiser.tokenizer, eps_denoiser.vae, eps_denoiser.scheduler)
    small = {
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
    }
    with pytest.raises(ValueError, match="takes 9 and gives 4 channels"):
        DiffusersDenoiser(UNet2DConditionModel(**small, in_channels=9), *parts)
    with pytest.raises(ValueError, match="class_embed_type='timestep'"):
        DiffusersDenoiser(UNet2DConditionModel(**small, class_embed_type="timestep"), *parts)
    with pytest.raises(ValueError, match="is a Linear"):
        DiffusersDenoiser(torch.nn.Linear(1, 1), *parts)
