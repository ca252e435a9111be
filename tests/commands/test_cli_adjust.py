"""Embedding adjustment on the command line: of a file, and of the prompts that are sampled."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from anchor_core import cli
from anchor_core.adapters.config import AdapterConfig
from anchor_core.training.saving import save_trained
from anchor_core.training.settings import TrainSettings

SUBJECT, CLASS = "a photo of a sks dog in the snow", "a photo of a dog in the snow"


def test_adjust_writes_a_file_and_says_what_it_did(model_folders, tmp_path, capsys):
    vectors = torch.randn(2, 32)
    save_file({"emb_params": vectors}, tmp_path / "sks.safetensors", {"name": "sks"})
    call = [
        "adjust",
        str(tmp_path / "sks.safetensors"),
        "--model",
        str(model_folders["epsilon"]),
        "--class-word",
        "dog",
    ]
    assert cli.main([*call, "--alpha", ".3", "--beta", "1.2", "--out", str(tmp_path / "out")]) == 0
    written = tmp_path / "out" / "sks.adjusted.safetensors"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["file"] == written.name and report["beta"] == 1.2 and report["norm_mix"] is None
    first = report["vectors"]["emb_params"][0]
    assert first["cosine_after"] > first["cosine_before"]
    moved = load_file(written)["emb_params"]
    assert moved.norm(dim=-1).tolist() == pytest.approx(
        [row["length_after"] for row in report["vectors"]["emb_params"]]
    )
    assert cli.main([*call, "--norm-mix", "1", "--alpha", "1", "--out", str(tmp_path / "mixed")]) == 0
    anchor = load_file(tmp_path / "mixed" / "sks.adjusted.safetensors")["emb_params"]
    torch.testing.assert_close(moved.norm(dim=-1), 1.2 * anchor.norm(dim=-1))
    capsys.readouterr()
    for options, told in (
        (["--alpha", "2"], "--alpha is 2.0"),
        (["--beta", "nan"], "--beta is nan"),
        (["--class-word", "stuffed"], "--class_word: class_word is 'stuffed', which is 7 tokens"),
        (["--model", str(model_folders["other"]) + "x"], "--model"),
    ):
        assert cli.main([*call, *options, "--out", str(tmp_path / "none")]) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.splitlines()) == 1 and not (tmp_path / "none").exists()


def test_sample_adjusts_prompts_to_those_of_the_adapters_class(
    eps_denoiser, model_folders, concept, stir, tmp_path, capsys
):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2, text_encoder=True))
    stir(adapter)
    file = tmp_path / "adapter.safetensors"
    save_trained(file, eps_denoiser, concept, TrainSettings())
    call = [
        "sample",
        "--model",
        str(model_folders["epsilon"]),
        "--prompt",
        SUBJECT,
        "--steps",
        "2",
        "--adapter",
        str(file),
    ]

    def pixels(name: str, *options: str) -> bytes:
        assert cli.main([*call, *options, "--out", str(tmp_path / name)]) == 0
        return (tmp_path / name / "000.png").read_bytes()

    plain = pixels("plain")
    pictures = {
        plain,
        pixels("index", "--adjust", "index"),
        pixels("token", "--adjust", "token", "--adjust-beta", "1.2"),
    }
    assert len(pictures) == 3
    assert pixels("none", "--adjust", "token", "--adjust-alpha", "0", "--adjust-norm-mix", "0") == plain
    report = json.loads((tmp_path / "token" / "report.json").read_text())
    assert report["adjust"] == {
        "align": "token", "alpha": 0.2, "beta": 1.2, "norm_mix": None, "pooled": False, "anchor": "current"
    }  # fmt: skip
    assert report["pictures"][0]["class"] == CLASS
    capsys.readouterr()
    for options, told in (
        (["--adjust", "index", "--prompt", "a cat"], "does not name the subject"),
        (["--adjust", "index", "--adjust-pooled"], "pooled is on, but this model's prompts have no pooled output"),
        (["--adjust", "index", "--adjust_alpha", "-1"], "--adjust_alpha is -1.0"),
        (["--adjust", "index", "--class", CLASS, "--class", CLASS], "--class: given 2 times for 1 prompts"),
        (["--class", CLASS], "--class: rule 'cfg' reads no class prompt"),
        (["--adjust_beta", "1.5"], "--adjust_beta: it is read with --adjust alone"),
    ):
        assert cli.main([*call, *options, "--out", str(tmp_path / "refused")]) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.splitlines()) == 1 and not (tmp_path / "refused").exists()
