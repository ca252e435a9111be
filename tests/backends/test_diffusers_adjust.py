"""Embedding adjustment on diffusers' real text encoders: of prompts, and of a file's vectors."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.embedding_file import adjust_embedding
from anchor_core.backends.diffusers.adjust import encode_adjusted, word_rows
from anchor_core.embeddings import WHOLE, Adjustment, rotate_and_rescale
from tests.backends import tiny_models
from tests.backends.tiny_models import T5_WIDTH, WIDTH, WIDTH_2


@pytest.fixture(scope="module", params=["sd1", "sdxl", "sd3", "flux"])
def named_denoiser(request, tmp_path_factory):
    return request.param, tiny_models.denoiser_of(tiny_models.build(request.param, tmp_path_factory.mktemp("words")))


SUBJECT, CLASS = "a photo of a sks dog in the snow", "a photo of a dog in the snow"


def embeddings(condition) -> torch.Tensor:
    return condition if isinstance(condition, torch.Tensor) else condition[0]


def test_prompts_are_adjusted_encoder_by_encoder(named_denoiser):
    name, denoiser = named_denoiser
    with torch.no_grad():
        subject, class_ = denoiser.encode_prompts([SUBJECT, CLASS])
    adjusted = encode_adjusted(denoiser, SUBJECT, CLASS, Adjustment(0.3, 1.5))
    own, other, moved = map(embeddings, (subject, class_, adjusted))
    blocks = {
        "sd1": [(WHOLE, slice(0, WIDTH))],
        "sdxl": [(WHOLE, slice(0, WIDTH)), (WHOLE, slice(WIDTH, WIDTH + WIDTH_2))],
        "sd3": [(slice(77), slice(0, WIDTH)), (slice(77), slice(WIDTH, WIDTH + WIDTH_2)), (slice(77, None), WHOLE)],
        "flux": [(WHOLE, slice(0, T5_WIDTH))],
    }[name]
    for block in blocks:
        torch.testing.assert_close(moved[block], rotate_and_rescale(own[block], other[block], 0.3, 1.5))
    if name == "sd3":
        assert not moved[:77, WIDTH + WIDTH_2 :].any()
    if not isinstance(subject, torch.Tensor):
        assert torch.equal(adjusted[1], subject[1])
        with_pooled = encode_adjusted(denoiser, SUBJECT, CLASS, Adjustment(0.3, 1.5), pooled=True)
        assert with_pooled[1].shape == subject[1].shape and not torch.allclose(with_pooled[1], subject[1])
    noisy = torch.randn(1, *tiny_models.LATENT)
    with torch.no_grad():
        assert torch.isfinite(denoiser.predict(noisy, denoiser.timesteps(torch.tensor([0.5])), [adjusted])).all()


def test_by_token_words_after_the_token_keep_their_own(named_denoiser):
    """At alpha 1 and norm_mix 1 every position is what it is compared with."""
    name, denoiser = named_denoiser
    with torch.no_grad():
        class_ = embeddings(denoiser.encode_prompt(CLASS))
    by_token, by_index = (
        embeddings(encode_adjusted(denoiser, SUBJECT, CLASS, Adjustment(1.0, norm_mix=1.0), align=align))
        for align in ("token", "index")
    )
    torch.testing.assert_close(by_index, class_, rtol=1e-4, atol=1e-4)
    if name == "flux":  # T5 splits words otherwise, and has no start
        assert not torch.allclose(by_token, by_index, atol=1e-3)
        return
    columns = slice(0, WIDTH)  # start, "a photo of a", then sks and dog by dog, and "in the snow" a place further
    torch.testing.assert_close(by_token[:6, columns], class_[:6, columns], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_token[6:77, columns], class_[5:76, columns], rtol=1e-4, atol=1e-4)


def test_the_class_prompt_is_encoded_by_the_current_or_the_pretrained_encoder(eps_denoiser, stir):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2, text_encoder=True))
    stir(adapter)
    with torch.no_grad():
        expected = {
            "current": eps_denoiser.encode_prompt(CLASS, adapted=True),
            "pretrained": eps_denoiser.encode_prompt(CLASS),
        }
    assert not torch.allclose(*expected.values(), atol=1e-3)
    for anchor, class_ in expected.items():
        moved = encode_adjusted(eps_denoiser, SUBJECT, CLASS, Adjustment(1.0, norm_mix=1.0), anchor=anchor)
        assert not moved.requires_grad
        torch.testing.assert_close(moved, class_, rtol=1e-4, atol=1e-4)
    for options, told in (({"anchor": "other"}, "anchor is 'other'"), ({"align": "shift"}, "align is 'shift'")):
        with pytest.raises(ValueError, match=told):
            encode_adjusted(eps_denoiser, SUBJECT, CLASS, Adjustment(), **options)


def test_the_anchor_is_the_row_of_the_word_that_the_tokenizer_emits(named_denoiser):
    """Not that of the piece which begins other words."""
    _, denoiser = named_denoiser
    rows = word_rows(denoiser, "dog")
    tokenizer, encoder = denoiser.tokenizer, denoiser.text_encoder
    index = tokenizer.convert_tokens_to_ids("dog</w>")
    assert index == tokenizer("dog").input_ids[1]
    assert torch.equal(rows["clip_l"], encoder.get_input_embeddings().weight[index : index + 1])


@pytest.mark.parametrize("count", [1, 3])
def test_each_vector_of_a_file_is_adjusted_to_the_same_word(named_denoiser, count):
    _, denoiser = named_denoiser
    rows = word_rows(denoiser, "dog")
    vectors = {name: torch.randn(count, row.shape[-1]) for name, row in rows.items() if name != "t5xxl"}
    moved = adjust_embedding(vectors, "dog", rows, Adjustment(0.2, 1.5))
    assert moved.keys() == vectors.keys()
    for name, each in moved.items():
        torch.testing.assert_close(each, rotate_and_rescale(vectors[name], rows[name].expand(count, -1)))


def test_another_models_file_and_a_class_of_several_tokens_are_refused(named_denoiser):
    _, denoiser = named_denoiser
    rows = word_rows(denoiser, "dog")
    for vectors in ({"emb_params": torch.randn(1, 7)}, {"clip_l": torch.randn(1, WIDTH_2)}):
        with pytest.raises(
            ValueError, match="made for another model: its .* this model's text encoders are clip_l of 32"
        ):
            adjust_embedding(vectors, "dog", rows, Adjustment())
    with pytest.raises(ValueError, match="^class_word is 'stuffed dog', which is 8 tokens of clip_l"):
        adjust_embedding(
            {"emb_params": torch.randn(1, WIDTH)}, "stuffed dog", word_rows(denoiser, "stuffed dog"), Adjustment()
        )
