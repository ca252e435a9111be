"""Fixtures of several rooms: tiny models of the real classes at random weights, in folders, and the shipped one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

# Before torch loads, and for the processes that tests start: the suite's own processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
import torch

LATENT = (4, 8, 8)
WORDS = ("a", "photo", "of", "sks", "dog", "cat", "in", "the", "snow")


def build_tokenizer(folder: Path):
    """A CLIPTokenizer that knows every letter, and a few whole words."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            if merge not in merges:
                merges.append(merge)
            parts[:2] = ["".join(merge)]
            if parts[0] not in vocabulary:
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token="<|endoftext|>"
    )


def build_pipeline(folder: Path, prediction_type: str, seed: int = 0, width: int = 32):
    """A tiny StableDiffusionPipeline; pictures of 16 x 16 become latents of 8 x 8."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer(folder / "words")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
            scaling_factor=0.7,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        # A random text encoder hardly tells prompts apart; wide embeddings make it do so.
        torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    """A diffusers folder of the tiny model for each prediction type, and `other`, a wider one."""
    folders = {}
    for name, prediction_type, width in (
        ("epsilon", "epsilon", 32),
        ("v_prediction", "v_prediction", 32),
        ("other", "epsilon", 48),
    ):
        folders[name] = tmp_path_factory.mktemp(name) / "model"
        build_pipeline(tmp_path_factory.mktemp("parts"), prediction_type, width=width).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory) -> Path:
    """Folders `clip`, `dino` and `dinov2` of the real classes at a tiny size, in transformers' layout."""
    from tests.evaluation.tiny_encoders import save_encoders

    return save_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """The shipped model; where the repository holds none, one of its kind at random weights."""
    from anchor_core.sandbox import model, tokenizer

    if (model.WEIGHTS / "model_index.json").is_file():
        return model.WEIGHTS
    folder = tmp_path_factory.mktemp("weights")
    tokenizer.build(folder / "words", captions=300)
    words = tokenizer.load(folder / "words")
    model.save(model.build(words), words, folder / "model")
    return folder / "model"


@pytest.fixture(params=["epsilon", "v_prediction"])
def denoiser(request, model_folders):
    """The tiny model, freshly loaded, in both prediction types."""
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

    return DiffusersDenoiser.from_pretrained(model_folders[request.param])


@pytest.fixture
def eps_denoiser(model_folders):
    """The tiny model, freshly loaded, predicting epsilon."""
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

    return DiffusersDenoiser.from_pretrained(model_folders["epsilon"])


@pytest.fixture
def concept():
    from anchor_core.concept import Concept

    return Concept("a photo of a sks dog", "a photo of a dog")


@pytest.fixture
def latents() -> torch.Tensor:
    """Three reference latents, (3, 4, 8, 8)."""
    return torch.randn((3, *LATENT), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def make_step(concept, latents):
    """`make_step(denoiser, prior=False)`: a training step on fixed noise and timesteps."""
    from anchor_core.denoiser import PriorBatch, Step, Texts

    def make(denoiser, prior: bool = False):
        generator = torch.Generator().manual_seed(11)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.tensor([20, 400, 900])
        batch = PriorBatch(latents.flip(0), noise.flip(1), timesteps.flip(0)) if prior else None
        subject = [denoiser.encode_prompt(concept.subject_prompt)] * 3
        class_ = [denoiser.encode_prompt(concept.class_prompt)] * 3
        texts = Texts([concept.class_prompt] * 3, denoiser.encode_prompts, concept.subject_prompt)
        return Step(denoiser, latents, noise, timesteps, subject, class_, batch, texts=texts)

    return make


@pytest.fixture
def stir():
    """`stir(adapter)`: give every adapter parameter a seeded value, so that the adapter has an effect."""

    def fill(adapter, seed: int = 3, size: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))

    return fill
