"""`semantic-anchor sample` with guidance rules."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from anchor_core import cli
from anchor_core.adapters.attach import attach_file
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter, to_file_keys
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from anchor_core.branches import SUBJECT, Branch
from anchor_core.data.pictures import as_picture
from anchor_core.guidance import RULES, Personalization, make_rule
from anchor_core.sandbox.model import WEIGHTS
from tests.comfyui.contract import stir

PROMPTS = {"anchor.subject_prompt": "a photo of a sks star", "anchor.class_prompt": "a photo of a star"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters of the embedded model: `late`, with its prompts, `early`, `other`, of other layers, and `text`."""
    denoiser, folder = DiffusersDenoiser.from_pretrained(WEIGHTS), tmp_path_factory.mktemp("adapters")
    cases = {
        "late": ("attention", 0.1, PROMPTS, False),
        "early": ("attention", 0.05, {}, False),
        "other": ("attn2", 0.1, {}, False),
        "text": ("attention", 0.1, {}, True),
    }
    for name, (layers, size, metadata, text_encoder) in cases.items():
        adapter = denoiser.attach(AdapterConfig(rank=4, layers=layers, text_encoder=text_encoder))
        stir(adapter, size)
        save_adapter(folder / f"{name}.safetensors", to_file_keys(adapter, denoiser.file_keys()), metadata)
        denoiser.detach()
    return {name: str(folder / f"{name}.safetensors") for name in cases}


@pytest.fixture
def sample(files, tmp_path):
    """`sample(*options)`: the first picture (H, W, 3) and the report."""

    def run(*options: str):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        shared = ["--model", "sandbox", "--steps", "3", "--out", str(out)]
        options = ["--prompt", "a photo of a sks star", *options] if "--prompt" not in options else options
        assert cli.main(["sample", *shared, "--adapter", files["late"], *options]) == 0
        return np.asarray(Image.open(out / "000.png")).astype(int), json.loads((out / "report.json").read_text())

    return run


def same(one, other) -> bool:
    return np.abs(one - other).max() <= 3


def test_rules_meet_at_their_limits(sample):
    plain, report = sample()
    assert report["rule"] is None and report["early"] is None
    assert same(sample("--rule", "personalization", "--weak", "1")[0], plain)
    weakened, report = sample("--rule", "personalization", "--weak", "0.2")
    assert not same(weakened, plain)
    assert report["rule"] == {"name": "personalization", "start": 0.0, "stop": 1.0, "weak": 0.2}
    unguided, _ = sample("--start", "1")
    assert same(unguided, sample("--guidance", "1")[0]) and not same(unguided, plain)


def test_class_prompts_are_given_or_made_of_the_adapters_own(sample):
    prompts = ["--prompt", "a sks star in the snow", "--prompt", "a red sks star"]
    led, report = sample("--rule", "switching", "--switch", "1", *prompts)
    assert [each["class"] for each in report["pictures"]] == ["a star in the snow", "a red star"]
    assert same(sample("--prompt", "a star in the snow")[0], led)
    given = ["--class", "a star in the snow", "--class", "a star"]
    assert same(sample("--rule", "switching", "--switch", "1", *prompts, *given)[0], led)


def test_the_weak_model_is_an_early_checkpoint(sample, files):
    itself, _ = sample("--rule", "autoguidance", "--early", files["late"])
    assert same(itself, sample("--guidance", "1")[0])
    early, report = sample("--rule", "autoguidance", "--early", files["early"])
    assert not same(early, itself)
    assert report["rule"]["early"] is True and report["early"] == files["early"]


def test_a_trained_text_encoder_reads_the_prompts(files, sample):
    drawn, _ = sample("--adapter", files["text"], "--rule", "personalization", "--weak", "0.3", "--strength", "0.8")
    denoiser = DiffusersDenoiser.from_pretrained(WEIGHTS)
    adapter, _ = attach_file(denoiser, files["text"])
    conditions = {}
    for strength, branch, prompt in ((0.8, SUBJECT, "a photo of a sks star"), (0.24, Branch("null", 0.3), "")):
        with adapter.scaled(strength):
            conditions[branch] = [denoiser.encode_prompt(prompt, adapted=True)]
    noise = torch.randn((1, *denoiser.latent_shape(64, 64)), generator=torch.Generator().manual_seed(0))
    rule = make_rule("personalization", weak=0.3)
    with adapter.scaled(0.8):
        latents = denoiser.sample(
            conditions[SUBJECT], None, noise, steps=3, guidance=5.0, rule=rule, encoded=conditions
        )  # fmt: skip
    assert same(drawn, as_picture(denoiser.decode_latents(latents)[0]).astype(int))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "cfg", "--weak", "0.5"], "--rule: rule 'cfg' has no option 'weak', but it takes start, stop"),
        (["--rule", "personalization", "--weak", "2"], "--weak: weak is 2.0"),
        (["--rule", "mixed", "--early", "FILE"], "--rule: rule 'mixed' has no option 'early'"),
        (["--rule", "personalization", "--class", "a star"], "--class: rule 'personalization' reads no class prompt"),
        (["--rule", "mixed", "--class", "a star", "--class", "a dog"], "--class: given 2 times for 1 prompts"),
        (["--rule", "masked", "--class", "a sks star"], "--class: it is the prompt 'a sks star' itself"),
        (["--rule", "mixed", "--adapter", "early"], "does not name its prompts in its metadata; give the option"),
        (["--rule", "mixed", "--prompt", "a star"], "--prompt: prompt is 'a star', which does not name the subject"),
        (["--rule", "autoguidance", "--early", "early", "--weak", "0.3"], "--weak: with --early the weak model is"),
        (["--rule", "autoguidance", "--early", "other"], "the early checkpoint does not fit the attached adapter"),
        (["--rule", "autoguidance", "--early", "nowhere"], "nowhere is not a readable safetensors file"),
        (["--rule", "autoguidance", "--early", "early", "--adapter", ""], "--early: it is an early checkpoint of"),
        (
            ["--rule", "personalization", "--adapter", ""],
            "--rule: rule is 'personalization', which weakens the adapter",
        ),
        (["--rule", "none"], "argument --rule: invalid choice: 'none'"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(files, tmp_path, capsys, options, message):
    given = {"--adapter": files["late"], "--prompt": "a sks star", "--model": "sandbox", "--out": str(tmp_path / "out")}
    given = {name: value for name, value in given.items() if name not in options}
    arguments = [files.get(each, each) for each in options] + [each for pair in given.items() for each in pair]
    try:
        status = cli.main(["sample", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err.strip()
    assert status == 2 and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_every_option_of_every_rule_is_an_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    text = capsys.readouterr().out
    for rule in RULES.values():
        assert rule.name in text
        assert all(f"--{each.name}" in text for each in fields(rule))
    assert f"personalization {Personalization.weak}" in " ".join(text.split())
