"""Mutated LoRA and embedding files, by the hundred: each is read, or refused in one sentence that names the file."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch

from anchor_core.adapters.attach import attach_file
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.embedding_file import read_embedding
from anchor_core.adapters.file import convert_file, load_adapter, save_adapter, to_file_keys
from anchor_core.adapters.kinds import KINDS
from anchor_core.adapters.metadata import recommended_guidance, stated_prompt, told
from tests.adapters.hostile import cases, snapshot

pytestmark = pytest.mark.long

LORAS, EMBEDDINGS, SECONDS = 720, 180, 10


def refused(run, name: str) -> str | None:
    """The sentence with which `run` refuses its file, None if it reads it; AssertionError for any other end."""
    start = time.monotonic()
    try:
        with torch.no_grad():
            run()
        sentence = None
    except ValueError as error:
        sentence = str(error)
        assert name in sentence, sentence
        assert sentence.isprintable() and len(sentence) < 2500, repr(sentence[:3000])
    assert time.monotonic() - start < SECONDS
    return sentence


@pytest.fixture
def sources(eps_denoiser, stir, tmp_path) -> dict[str, bytes]:
    made = {}
    for kind in KINDS:
        layers = "attn" if kind == "oft" else "attention"
        stir(eps_denoiser.attach(AdapterConfig(rank=4, kind=kind, layers=layers)))
        tensors = to_file_keys(eps_denoiser.adapter, eps_denoiser.file_keys())
        eps_denoiser.detach()
        some = {key: tensor for key, tensor in tensors.items() if "mid_block" in key or "down_blocks_1" in key}
        save_adapter(tmp_path / "source.safetensors", some or tensors, {"anchor.subject_prompt": "a photo of sks dog"})
        made[kind] = (tmp_path / "source.safetensors").read_bytes()
    (tmp_path / "source.safetensors").unlink()
    return made


def test_lora_files(eps_denoiser, sources, tmp_path):
    before, counts = eps_denoiser.network.state_dict(), Counter()
    before = {name: tensor.clone() for name, tensor in before.items()}
    for number, (source, mutation, data) in enumerate(cases(sources, LORAS)):
        name = f"case{number}.safetensors"
        path = tmp_path / name
        path.write_bytes(data)
        files = snapshot(tmp_path)

        def attach(path=path):
            _, metadata = attach_file(eps_denoiser, path)
            assert told(metadata).replace("\n", " ").isprintable()
            assert (stated_prompt(metadata, "subject") or "").isprintable()
            x = torch.zeros(1, *eps_denoiser.latent_shape(16, 16))
            eps_denoiser.predict(x, torch.tensor([500]), [eps_denoiser.encode_prompt("a dog", adapted=True)])

        case = f"{number}, {source}, {mutation}"
        try:
            outcome = refused(attach, name)
            eps_denoiser.detach()
            counts["read" if outcome is None else "refused"] += 1
            assert snapshot(tmp_path) == files
            refused(lambda path=path: convert_file(path, tmp_path / "made.safetensors", "comfyui"), name)
            (tmp_path / "made.safetensors").unlink(missing_ok=True)
            assert snapshot(tmp_path) == files
        except BaseException as error:
            raise AssertionError(case) from error
        path.unlink()
    after = eps_denoiser.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    print(f"LoRA files: {sum(counts.values())} cases, {dict(counts)}")


def test_embedding_files(eps_denoiser, tmp_path):
    sources, counts = {}, Counter()
    for name, tensors in (
        ("emb_params", {"emb_params": torch.randn(2, 32)}),
        ("learned_embeds", {"<sks>": torch.randn(32)}),
        ("clip", {"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 48)}),
    ):
        save_adapter(tmp_path / "source.safetensors", tensors, {"anchor.token": "sks"})
        sources[name] = (tmp_path / "source.safetensors").read_bytes()
    torch.save({"string_to_param": {"*": torch.randn(2, 32)}, "name": "x"}, tmp_path / "a1111.pt")
    pickled = (tmp_path / "a1111.pt").read_bytes()
    for number, (source, mutation, data) in enumerate(cases(sources, EMBEDDINGS, seed=1)):
        name = f"case{number}.safetensors"
        if number % 3 == 0:  # a pickle with some bytes changed
            name, data = (
                f"case{number}.pt",
                bytes(
                    byte ^ (number * 31 + place) % 256 if (place * 7919 + number) % 97 == 0 else byte
                    for place, byte in enumerate(pickled)
                ),
            )
        path = tmp_path / name
        path.write_bytes(data)
        files = snapshot(tmp_path)
        try:
            for run in (lambda path=path: attach_file(eps_denoiser, path), lambda path=path: read_embedding(path)):
                counts["read" if refused(run, name) is None else "refused"] += 1
                eps_denoiser.detach()
            assert snapshot(tmp_path) == files
        except BaseException as error:
            raise AssertionError(f"{number}, {source}, {mutation}") from error
        path.unlink()
    print(f"embedding files: {EMBEDDINGS} cases, {dict(counts)}")


def test_the_scale_of_a_file_is_read_or_refused(tmp_path):
    for text in ("nan", "-1", "1e400", "\x1b[2J", "9" * 5000):
        save_adapter(tmp_path / "one.safetensors", {"emb_params": torch.ones(1, 8)}, {"anchor.guidance": text})
        metadata = load_adapter(tmp_path / "one.safetensors")[1]
        with pytest.raises(ValueError, match="anchor.guidance") as caught:
            recommended_guidance(metadata)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500
