"""Vectors for a word of the prompt: their files, in diffusers and here, and prompts that have the word."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from anchor_core.adapters.attach import attach_file
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter
from anchor_core.adapters.formats import convert
from anchor_core.training.saving import save_trained
from anchor_core.training.settings import TrainSettings
from tests.backends import tiny_models
from tests.training.parts import CONCEPT, PARTS, predict


@pytest.mark.parametrize("vectors", [1, 3])
def test_diffusers_reads_the_embedding_file(pipelines, tmp_path, vectors, stir):
    pipeline = pipelines["sd1"]
    denoiser = tiny_models.denoiser_of(pipeline)
    stir(denoiser.attach(AdapterConfig(kind="none", vectors=vectors, token="<dog>", initial="dog")), size=1.0)
    (path,) = save_trained(tmp_path / "adapter.safetensors", denoiser, CONCEPT, TrainSettings())
    prompts = ("a photo of a <dog> in the snow", "<dog>", "a <dog>, a cat and a <dog>")
    with torch.no_grad():
        ours = [denoiser.encode_prompt(prompt, adapted=True) for prompt in prompts]
        same = [denoiser.encode_prompt(prompt.upper(), adapted=True) for prompt in prompts]
    denoiser.detach()
    assert load_file(path)["emb_params"].shape == (vectors, tiny_models.WIDTH)
    assert all(map(torch.equal, ours, same))
    rows = pipeline.text_encoder.get_input_embeddings()
    tokenizer = pipeline.tokenizer
    from copy import deepcopy

    pipeline.text_encoder, pipeline.tokenizer = deepcopy(pipeline.text_encoder), deepcopy(tokenizer)
    try:
        pipeline.load_textual_inversion(str(path), token="<dog>")
        for prompt, condition in zip(prompts, ours, strict=True):
            theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
            torch.testing.assert_close(theirs[0], condition, atol=1e-5, rtol=0)
    finally:
        pipeline.text_encoder, pipeline.tokenizer = denoiser.text_encoder, tokenizer
    assert pipeline.text_encoder.get_input_embeddings() is rows


def test_a_prompt_too_long_for_its_vectors_loses_its_end(pipelines, caplog):
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    denoiser.attach(AdapterConfig(kind="none", vectors=3))
    fits, *cut = (denoiser.encode_prompt("sks " + "dog " * 72 + rest, adapted=True) for rest in ("", "cat", "cat " * 9))
    assert all(torch.equal(each, fits) for each in cut)
    told = [record.message for record in caplog.records if record.name.startswith("anchor_core")]
    assert told == ["a prompt is longer than 77 tokens with its vectors; its end is not used"] * 2


def test_layers_and_vectors_are_two_files_that_belong_together(pipelines, tmp_path, stir):
    denoiser = tiny_models.denoiser_of(pipelines["sdxl"])
    stir(denoiser.attach(AdapterConfig(**PARTS["custom_diffusion"])), size=0.5)
    files = save_trained(tmp_path / "adapter.safetensors", denoiser, CONCEPT, TrainSettings())
    ours = predict(denoiser)
    denoiser.detach()
    assert [file.name for file in files] == ["adapter.safetensors", "embedding.safetensors"]
    assert {name: len(part) for name, part in load_file(files[1]).items()} == {"clip_l": 1, "clip_g": 1}
    adapter, _ = attach_file(denoiser, files[0])
    assert (adapter.config.kind, adapter.config.vectors, adapter.config.token) == ("full", 1, "sks")
    torch.testing.assert_close(predict(denoiser), ours, atol=1e-4, rtol=0)
    denoiser.detach()
    moved = files[1].rename(tmp_path / "sks.safetensors")
    with pytest.raises(ValueError, match="trained together with vectors of 'sks', but no embedding is given"):
        attach_file(denoiser, files[0])
    attach_file(denoiser, files[0], moved)
    torch.testing.assert_close(predict(denoiser), ours, atol=1e-4, rtol=0)
    denoiser.detach()
    with pytest.raises(ValueError, match="^embedding is .*, but it takes a file of token vectors"):
        attach_file(denoiser, moved, moved)
    with pytest.raises(ValueError, match="is an embedding, for prompts and not for layers"):
        convert(load_file(moved), to="kohya")
    with pytest.raises(ValueError, match="another model: it is of clip_g 40, clip_l 32, and this one takes emb_params"):
        attach_file(tiny_models.denoiser_of(pipelines["sd1"]), moved)
    assert denoiser.adapter is None


def test_a_foreign_embedding_is_called_by_its_files_name(pipelines, tmp_path):
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    save_adapter(tmp_path / "cat-toy.safetensors", {"emb_params": torch.randn(tiny_models.WIDTH)}, {})
    adapter, _ = attach_file(denoiser, tmp_path / "cat-toy.safetensors")
    assert (adapter.tokens.token, adapter.tokens.count) == ("cat-toy", 1)
    assert not torch.allclose(predict(denoiser, "a cat-toy"), predict(denoiser, "a dog"), atol=1e-3)
    denoiser.detach()
    save_adapter(tmp_path / "wide.safetensors", {"emb_params": torch.randn(2, tiny_models.WIDTH + 1)}, {})
    with pytest.raises(ValueError, match="another model: it is of emb_params 33, and this one takes emb_params 32"):
        attach_file(denoiser, tmp_path / "wide.safetensors")


def test_an_initial_word_of_several_tokens_and_a_rate_for_prodigy_are_refused(pipelines):
    denoiser = tiny_models.denoiser_of(pipelines["sdxl"])
    for options in ({"initial": "extraordinary"}, {"token": "<dog>"}):
        with pytest.raises(ValueError, match="^initial is .* tokens of this model's text encoder, but it takes a word"):
            denoiser.attach(AdapterConfig(kind="none", vectors=1, **options))
    assert denoiser.adapter is None
    with pytest.raises(ValueError, match="^token_learning_rate is 0.1, but prodigy"):
        TrainSettings(optimizer="prodigy", token_learning_rate=0.1)
