"""A training's prompts are plain text in both backends: parentheses are letters, and no token has a weight."""

from __future__ import annotations

import json

import pytest
import torch

from anchor_core.concept import Concept, plain_text
from anchor_core.data.captions import read_caption
from tests.comfyui import comfy_server

SCRIPT = comfy_server.ROOT / "tests/comfyui/check_captions.py"
CAPTIONS = (
    "a photo of a sks dog",
    "a (sks dog:1.5), in the snow",
    "((sks)) dog",
    "a sks dog (toy) (",
    r"a sks dog \(toy\)",
    r"a sks dog \\(toy",
    "))((:1.2)",
    "[sks dog:1.2], {sks|dog}, <lora:sks:1>",
)


def test_parentheses_are_the_same_text_escaped_or_not(tmp_path):
    (tmp_path / "1.txt").write_text(r"a sks dog \(toy\), (red:1.2)")
    assert read_caption(tmp_path / "1.png") == "a sks dog (toy), (red:1.2)"
    concept = Concept(r"a photo of a sks dog \(toy\)", "a photo of a dog (toy)")
    assert concept.subject_prompt == "a photo of a sks dog (toy)"
    assert concept.class_of("a sks dog (red:1.2)") == "a dog (red:1.2)"
    named = Concept.from_words(r"sks \(toy\)", "dog")
    assert named.class_of(plain_text(r"a sks \(toy\) dog")) == "a dog"


@pytest.mark.parametrize("caption", CAPTIONS)
def test_diffusers_reads_plain_text(eps_denoiser, caption):
    prompt = plain_text(caption)
    ids = eps_denoiser.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = eps_denoiser.text_encoder(ids).last_hidden_state
    ours = eps_denoiser.encode_prompt(prompt)
    torch.testing.assert_close(ours.reshape(theirs.shape), theirs)


@pytest.mark.skipif(isinstance(comfy_server.find(), str), reason=str(comfy_server.find()))
def test_comfyui_reads_the_same_tokens(tmp_path):
    """The peer is CLIP's own tokenizer in transformers, which diffusers reads prompts by."""
    from transformers import CLIPTokenizer

    prompts = [plain_text(caption) for caption in CAPTIONS]
    output = tmp_path / "tokens.json"
    comfy_server.run_script(SCRIPT, comfy_server.ROOT, output, json.dumps(prompts), folder=tmp_path)
    theirs = CLIPTokenizer.from_pretrained(comfy_server.find()[0] / "comfy/sd1_tokenizer")
    for prompt, read in zip(prompts, json.loads(output.read_text()), strict=True):
        expected = [[token, 1.0] for token in theirs(prompt).input_ids]
        assert len(read) == 3
        for name, tokens in read.items():
            assert tokens == expected, f"{name}: {prompt}"
