"""Class pictures by the pretrained network, and references made into a dataset."""

from __future__ import annotations

import pytest
import torch

from anchor_core.data.cache import Cache
from anchor_core.data.pictures import References
from anchor_core.data.prepare import build_dataset, sample_class_latents


def test_class_latents_are_the_pretrained_networks(eps_denoiser, concept, stir):
    from anchor_core.adapters.config import AdapterConfig

    options = {"seed": 4, "steps": 2, "batch_size": 2}
    untouched = sample_class_latents(eps_denoiser, concept, 3, (4, 8, 8), **options)
    assert untouched.shape == (3, 4, 8, 8)
    stir(eps_denoiser.attach(AdapterConfig(rank=2)))
    assert torch.equal(sample_class_latents(eps_denoiser, concept, 3, (4, 8, 8), **options), untouched)
    other = sample_class_latents(eps_denoiser, concept, 3, (4, 8, 8), **{**options, "seed": 5})
    assert not torch.equal(other, untouched)


def test_class_latents_are_made_once_for_a_network_and_a_sampling(eps_denoiser, concept, tmp_path, monkeypatch):
    def made(**changes) -> torch.Tensor:
        options = {"count": 2, "shape": (4, 8, 8), "steps": 3, "guidance": 3.0, **changes}
        return sample_class_latents(eps_denoiser, concept, cache=Cache(eps_denoiser, tmp_path), **options)

    first = made()
    sample = eps_denoiser.sample
    asked = []

    def counted(*given, **how):
        asked.extend([how] if how["steps"] == 3 else [])
        return sample(*given, **how)

    monkeypatch.setattr(eps_denoiser, "sample", counted)
    assert torch.equal(made(), first) and not asked
    assert not torch.equal(made(seed=1), first) and not torch.equal(made(guidance=4.0), first) and len(asked) == 2
    with torch.no_grad():
        next(eps_denoiser.network.parameters()).add_(0.1)
    assert not torch.equal(made(), first) and len(asked) == 3


def test_class_latents_of_another_schedule_are_made_anew(eps_denoiser, concept, tmp_path):
    """The network is the same, and so is what it says, but not the way of a sample through its noise levels."""
    own = eps_denoiser
    scheduler = type(own.scheduler).from_config(own.scheduler.config, beta_end=0.02)
    other = type(own)(own.network, own.text_encoder, own.tokenizer, own.vae, scheduler)
    options = {"count": 1, "shape": (4, 8, 8), "steps": 3}
    first, second = (sample_class_latents(d, concept, cache=Cache(d, tmp_path), **options) for d in (own, other))
    assert not torch.equal(first, second)
    assert torch.equal(second, sample_class_latents(other, concept, **options))


def test_build_dataset(eps_denoiser, concept):
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.rand(3, h, w, generator=generator) for h, w in ((16, 16), (16, 24), (16, 16))]
    masks = [torch.zeros(1, *picture.shape[1:]) for picture in pixels]
    for mask in masks:
        mask[:, :8, :3] = 1
    references = References(pixels, ["a", "b", "c"], masks, ["sks dog", "a sks dog", "sks dog, snow"])
    dataset = build_dataset(eps_denoiser, references, concept, flip=True, shuffle=True, caption_dropout=0.1)
    for example, picture in zip(dataset.examples, pixels):
        own, mirrored = eps_denoiser.encode_images(torch.stack([picture, picture.flip(-1)]))
        torch.testing.assert_close(example.latents, own)
        torch.testing.assert_close(example.flipped, mirrored)
        assert example.mask.shape == (1, *own.shape[1:]) and example.mask[0, 0, :3].tolist() == [1, 0.5, 0]
    assert [example.name for example in dataset.examples] == ["a", "b", "c"]
    assert dataset.examples[2].subject_prompts == ("sks dog, snow", "snow, sks dog")
    assert dataset.examples[2].class_prompts == ("dog, snow", "snow, dog")
    assert dataset.prompts()[-1] == "" and dataset.caption_dropout == 0.1


def test_build_dataset_refuses_before_it_encodes(concept):
    references = References([torch.rand(3, 16, 16)], ["a"], captions=["a dog"])
    with pytest.raises(ValueError, match="^caption of a is 'a dog'"):
        build_dataset(None, references, concept)
    with pytest.raises(ValueError, match="^caption_dropout is 1"):
        build_dataset(None, references, concept, caption_dropout=1)


def test_a_caption_longer_than_the_text_encoder_reads_is_named_before_any_encoding(eps_denoiser, concept, monkeypatch):
    monkeypatch.setattr(eps_denoiser, "encode_images", lambda pixels: pytest.fail("pictures were encoded"))
    captions = ["a photo of a sks dog", "a photo of a sks dog " + "in the snow " * 40]
    references = References([torch.rand(3, 16, 16) for _ in captions], ["1.png", "2.png"], captions=captions)
    with pytest.raises(ValueError, match=r"^caption of 2.png has \d+ tokens, but the text encoder takes 77; shorten"):
        build_dataset(eps_denoiser, references, concept)
