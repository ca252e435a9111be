"""Each architecture against diffusers' own pipeline, and how models are opened."""

from __future__ import annotations

import pytest
import torch

from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from anchor_core.backends.diffusers.names import ldm_names
from tests.backends import tiny_models

PROMPTS = ["a photo of a sks dog", "a cat in the snow"]
TIMESTEPS = torch.tensor([100.0, 900.0])


def noise() -> torch.Tensor:
    return torch.randn(2, *tiny_models.LATENT, generator=torch.Generator().manual_seed(5))


def sample(denoiser, guidance):
    conditions = [denoiser.encode_prompt(prompt) for prompt in PROMPTS]
    return denoiser.sample(conditions, denoiser.encode_prompt(""), noise(), steps=4, guidance=guidance)


def test_sdxl_is_the_pipelines(tmp_path):
    from diffusers import DDIMScheduler

    pipeline = tiny_models.build("sdxl", tmp_path)
    denoiser = tiny_models.denoiser_of(pipeline)
    with torch.no_grad():
        embeddings, _, pooled, _ = pipeline.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False)
    ours = denoiser.encode_prompt(PROMPTS[0])
    assert torch.equal(ours[0], embeddings[0]) and torch.equal(ours[1], pooled[0])
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    options = {"negative_prompt": ["", ""], "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
    theirs = pipeline(PROMPTS, latents=noise(), height=16, width=16, **options).images
    torch.testing.assert_close(sample(denoiser, 4.0), theirs, rtol=1e-4, atol=1e-4)
    assert denoiser.architecture == "stable-diffusion-xl-v1-base" and set(denoiser.text_encoders) == {"te1", "te2"}


def test_sdxl_is_told_the_size_of_the_latents(tmp_path):
    denoiser = tiny_models.denoiser_of(tiny_models.build("sdxl", tmp_path))
    told = []
    denoiser.network.register_forward_pre_hook(
        lambda _, args, options: told.append(options["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    conditions = [denoiser.encode_prompt(prompt) for prompt in PROMPTS]
    denoiser.predict(noise()[..., :4], TIMESTEPS, conditions)
    assert told[0].tolist() == [[16, 8, 0, 0, 16, 8]] * 2


@pytest.mark.parametrize("t5", [True, False])
def test_sd3_is_the_pipelines(tmp_path, t5):
    pipeline = tiny_models.build("sd3", tmp_path, t5=t5)
    pipeline.save_pretrained(tmp_path / "model")
    denoiser = DiffusersDenoiser.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        embeddings, _, pooled, _ = pipeline.encode_prompt(PROMPTS[0], None, None, do_classifier_free_guidance=False)
    ours = denoiser.encode_prompt(PROMPTS[0])
    assert ours[0].shape == (77 + 256, tiny_models.T5_WIDTH)
    torch.testing.assert_close(ours, (embeddings[0], pooled[0]), rtol=1e-4, atol=1e-5)
    options = {"negative_prompt": ["", ""], "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
    theirs = pipeline(PROMPTS, latents=noise(), height=16, width=16, **options).images
    torch.testing.assert_close(sample(denoiser, 4.0), theirs, rtol=1e-4, atol=1e-4)
    assert denoiser.architecture == "stable-diffusion-v3-medium" and set(denoiser.text_encoders) == {"te1", "te2"}


@pytest.mark.parametrize("distilled", [True, False])
def test_flux_is_the_pipelines(tmp_path, distilled):
    """Guidance: 3.5 as an input of the distilled network, else classifier-free (diffusers: true_cfg_scale)."""
    pipeline = tiny_models.build("flux", tmp_path, guidance_embeds=distilled)
    denoiser = tiny_models.denoiser_of(pipeline)
    with torch.no_grad():
        embeddings, pooled, _ = pipeline.encode_prompt(PROMPTS[0], None)
    ours = denoiser.encode_prompt(PROMPTS[0])
    assert torch.equal(ours[0], embeddings[0]) and torch.equal(ours[1], pooled[0])
    packed = pipeline._pack_latents(noise(), 2, *tiny_models.LATENT)
    options = {"guidance_scale": 3.5} if distilled else {"true_cfg_scale": 2.0, "negative_prompt": ["", ""]}
    theirs = pipeline(
        PROMPTS, latents=packed, height=16, width=16, num_inference_steps=4, output_type="latent", **options
    ).images
    theirs = pipeline._unpack_latents(theirs, 16, 16, denoiser.downscale)
    torch.testing.assert_close(sample(denoiser, 2.0), theirs, rtol=1e-4, atol=1e-4)
    assert denoiser.architecture == ("flux-1-dev" if distilled else "flux-1-schnell")
    assert set(denoiser.text_encoders) == {"te1"} and denoiser.default_resolution == 256
    assert denoiser.latent_shape(16, 20) == (4, 8, 10)
    with pytest.raises(ValueError, match="multiples of 4"):
        denoiser.latent_shape(16, 18)


def test_flux_learns_at_a_guidance_of_one(tmp_path):
    denoiser = tiny_models.denoiser_of(tiny_models.build("flux", tmp_path))
    told = []
    denoiser.network.register_forward_pre_hook(
        lambda _, args, options: told.append(options["guidance"].tolist()), with_kwargs=True
    )
    denoiser.predict(noise(), TIMESTEPS, [denoiser.encode_prompt(prompt) for prompt in PROMPTS])
    sample(denoiser, 1.0)
    assert told == [[1.0, 1.0], *[[3.5, 3.5]] * 4]


def test_zero_terminal_snr_has_no_division_by_zero(tmp_path):
    from diffusers import DDIMScheduler

    pipeline = tiny_models.build("sd2_v", tmp_path)
    denoiser = tiny_models.denoiser_of(pipeline)
    last = torch.tensor([999, 999])
    eps = noise()
    assert denoiser.snr(last).tolist() == [0.0, 0.0] and denoiser.epsilon_scale(last).tolist() == [0.0, 0.0]
    assert torch.equal(denoiser.add_noise(eps.flip(0), eps, last), eps)
    assert torch.equal(denoiser.target(eps.flip(0), eps, last), -eps.flip(0))
    assert torch.isfinite(sample(denoiser, 3.0)).all()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="epsilon")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        tiny_models.denoiser_of(pipeline)


def test_architectures_of_stable_diffusion(tmp_path):
    denoiser = tiny_models.denoiser_of(tiny_models.build("sd2_v", tmp_path))
    assert denoiser.architecture == "stable-diffusion-v1" and denoiser.default_resolution == 16
    denoiser.network.register_to_config(cross_attention_dim=1024)
    assert denoiser.architecture == "stable-diffusion-v2" and set(denoiser.text_encoders) == {"te"}


def test_the_autoencoders_shift_and_scale(tmp_path):
    pipeline = tiny_models.build("sd3", tmp_path)
    denoiser = tiny_models.denoiser_of(pipeline)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels * 2 - 1).latent_dist.mean
        decoded = pipeline.vae.decode(mean).sample
    latents = denoiser.encode_images(pixels)
    torch.testing.assert_close(latents, (mean - 0.0609) * 1.5305)
    torch.testing.assert_close(denoiser.decode_latents(latents), (decoded / 2 + 0.5).clamp(0, 1))


def test_released_text_encoders(tmp_path):
    from anchor_core.adapters.config import AdapterConfig

    denoiser = tiny_models.denoiser_of(tiny_models.build("sdxl", tmp_path))
    conditions = [denoiser.encode_prompt(prompt) for prompt in PROMPTS]
    denoiser.attach(AdapterConfig(rank=2, text_encoder=True))
    with pytest.raises(ValueError, match="text encoders have an adapter"):
        denoiser.release_text_encoders()
    denoiser.detach()
    denoiser.release_text_encoders()
    assert denoiser.text_encoders == {} and denoiser.predict(noise(), TIMESTEPS, conditions).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="^the text encoders were released"):
        denoiser.encode_prompt("a dog")


def test_sdxl_names_are_the_original_ones(tmp_path):
    names = ldm_names(tiny_models.build("sdxl", tmp_path).unet)
    facts = {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
        ),
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "mid_block.attentions.0.transformer_blocks.1.ff.net.2": "middle_block.1.transformer_blocks.1.ff.net.2",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.attentions.2.proj_out": "output_blocks.5.1.proj_out",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_out": "out.2",
    }
    assert {name: names[name] for name in facts} == facts
    assert len(set(names.values())) == len(names)


def test_parts_that_do_not_fit(tmp_path):
    pipeline = tiny_models.build("sdxl", tmp_path)
    parts = dict(tokenizer=pipeline.tokenizer, vae=pipeline.vae, scheduler=pipeline.scheduler)
    with pytest.raises(ValueError, match="has no text_encoder_2"):
        DiffusersDenoiser(pipeline.unet, pipeline.text_encoder, **parts)
    flux = tiny_models.build("flux", tmp_path)
    with pytest.raises(ValueError, match="takes a FlowMatchEulerDiscreteScheduler"):
        DiffusersDenoiser(flux.transformer, flux.text_encoder, text_encoder_2=flux.text_encoder_2, **parts)


@pytest.mark.parametrize(("name", "usual"), [("sd1", 64), ("sdxl", 128)])
def test_a_config_without_a_size_of_latents_means_the_usual_one(tmp_path, name, usual):
    denoiser = tiny_models.denoiser_of(tiny_models.build(name, tmp_path))
    for told, edge in ((None, usual), ([96, 80], 80), (32, 32)):
        denoiser.network.register_to_config(sample_size=told)
        assert denoiser.default_resolution == edge * denoiser.downscale
