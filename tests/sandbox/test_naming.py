"""Rare words that name looks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from anchor_core.sandbox import model, naming, tokenizer
from anchor_core.sandbox.pretrain import build_text_tower
from anchor_core.sandbox.rare_words import UNUSED_TOKENS
from anchor_core.sandbox.subjects import SUBJECTS, random_look


@pytest.fixture(scope="module")
def words():
    return tokenizer.load(model.WEIGHTS / "tokenizer")


def test_features_tell_looks_apart():
    rng = random.Random(0)
    looks = {random_look(rng) for _ in range(50)} | {subject.paint for subject in SUBJECTS.values()}
    coded = {tuple(naming.features(look).tolist()) for look in looks}
    assert len(coded) == len(looks)
    assert not naming.features(None).any()


def test_half_of_the_pictures_have_a_named_look_and_some_a_word_that_names_none():
    pictures, captions, looks = naming.draw(200, 2, seed=0)
    assert pictures.shape == (200, 64, 64, 3) and looks.shape == (200, len(naming.features(None)))
    rare = torch.tensor([all(set(text.split()) & set(naming.WORDS) for text in texts) for texts in captions])
    none = torch.tensor([not any(set(text.split()) & set(naming.WORDS) for text in texts) for texts in captions])
    assert "next" not in naming.WORDS  # "next to a red ball"
    assert torch.equal(rare, ~none)  # every phrasing of a picture, or none
    named = looks.any(1)
    assert not (named & none).any()
    assert 0.4 < named.float().mean() < 0.6 and 0.03 < (rare & ~named).float().mean() < 0.2


@torch.no_grad()
def test_a_row_s_rare_word_is_read_as_its_look_and_no_other_word_is(words):
    text, names = build_text_tower(words, 0), naming.Names(model.TEXT["hidden_size"])
    ids = words(
        [f"a photo of a {naming.WORDS[3]} star", "a photo of a star"], padding="max_length", return_tensors="pt"
    )
    looks = torch.stack([naming.features(SUBJECTS["pip"].paint), naming.features(SUBJECTS["momo"].paint)])
    table = text.get_input_embeddings()
    before = table(ids.input_ids)
    names.say(looks, np.random.default_rng(0))
    with names.spoken(text, words):
        inside = table(ids.input_ids)
    (place,) = naming.ids_of(words, naming.WORDS[3:4])
    changed = (inside != before).any(-1)
    assert torch.equal(changed, ids.input_ids == place)
    torch.testing.assert_close(inside[changed], names.batch[:1])
    assert torch.equal(table(ids.input_ids), before)


@torch.no_grad()
def test_rare_words_end_as_names_and_unused_tokens_name_nothing(words):
    text, names = build_text_tower(words, 0), naming.Names(model.TEXT["hidden_size"])
    names.write(text, words, seed=0)
    table = text.get_input_embeddings().weight
    neutral = names(naming.features(None))
    for token in naming.ids_of(words, UNUSED_TOKENS):
        assert torch.equal(table[token], neutral)
    rows = table[naming.ids_of(words, naming.WORDS)]
    assert len({tuple(row.tolist()) for row in rows}) == len(naming.WORDS)
    assert ((rows - neutral).norm(dim=1) > 0).all()
