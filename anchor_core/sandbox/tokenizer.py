"""The embedded model's tokenizer: CLIP's byte-level BPE with a small vocabulary."""

from __future__ import annotations

import random
from pathlib import Path

from .rare_words import RARE_WORDS, UNUSED_TOKENS


def build(folder: Path, vocabulary_size: int = 1200, captions: int = 20000) -> None:
    """Train the vocabulary on captions and write a CLIPTokenizer folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    from . import world
    from .captions import caption

    rng = random.Random(1)
    corpus = [caption(world.sample_scene(rng), rng, rare=0.0) for _ in range(captions)]
    corpus += [word for word in (*RARE_WORDS, *UNUSED_TOKENS) for _ in range(400)]
    corpus += [
        "what a the an and with of on in at to two from sitting standing very old new house tree city dog cat"
    ] * 50
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    import json

    vocabulary = json.loads((folder / "vocab.json").read_text())
    for byte in sorted(alphabet):  # every byte, inside a word and at its end, so that any text encodes
        for token in (byte, byte + "</w>"):
            vocabulary.setdefault(token, len(vocabulary))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    clip = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    clip.save_pretrained(folder)


def load(folder: Path):
    """The CLIPTokenizer of a folder."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)
