"""The verb `checkup`, and the drift curves in the reports of `train` and `inspect`."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from anchor_core import cli
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter, to_file_keys
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

METADATA = {"ss_tag_frequency": json.dumps({"10_sks dog": {}})}
SMALL = ["--timesteps", "2", "--count", "1", "--steps", "2"]


@pytest.fixture(scope="module")
def lora(model_folders, tmp_path_factory):
    """A file at random weights that tells its words as kohya's do, and one that tells nothing."""
    denoiser, folder = DiffusersDenoiser.from_pretrained(model_folders["epsilon"]), tmp_path_factory.mktemp("lora")
    adapter = denoiser.attach(AdapterConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    tensors = to_file_keys(adapter, denoiser.file_keys())
    for name, metadata in (("told", METADATA), ("silent", {})):
        save_adapter(folder / f"{name}.safetensors", tensors, metadata)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        Image.new("RGB", (16, 16), (90 * i, 40, 200 - 50 * i)).save(folder / f"{i}.png")
    return folder


def test_a_report_is_a_page_a_picture_and_numbers(model_folders, lora, tmp_path, capsys):
    given = ["--model", str(model_folders["epsilon"]), *SMALL, "--out", str(tmp_path / "out")]
    assert cli.main(["checkup", str(lora / "told.safetensors"), *given]) == 0
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {"report.json", "report.html", "report.png"}
    report = json.loads((out / "report.json").read_text())
    assert report["prompts"]["subject"] == "a photo of a sks dog" and report["adapter"] == "told.safetensors"
    told = capsys.readouterr().out
    assert "is a guess from the file's tags" in told and str(out / "report.html") in told
    with Image.open(out / "report.png") as picture:
        assert picture.width > 1000


def test_what_is_missing_is_asked_for_before_anything_is_written(model_folders, lora, tmp_path, capsys):
    given = ["--model", str(model_folders["epsilon"]), *SMALL, "--out", str(tmp_path / "out")]
    for change, message in (
        ([], "error: --class: class_prompt is empty and the file does not tell it"),
        (["--class", "a dog", "--budget", "0"], "error: --budget: budget is 0.0"),
        (["--class", "a dog", "--timesteps", "0"], "error: --timesteps: timesteps is 0"),
        (["--class", "a dog", "--embedding", str(lora / "told.safetensors")], "takes a file of token vectors"),
    ):
        assert cli.main(["checkup", str(lora / "silent.safetensors"), *given, *change]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_model_is_refused(model_folders, lora, tmp_path, capsys):
    given = ["--model", str(model_folders["other"]), *SMALL, "--out", str(tmp_path / "out")]
    assert cli.main(["checkup", str(lora / "told.safetensors"), *given]) == 2
    assert "made for another model" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_reports_of_train_and_inspect_have_the_curves(model_folders, lora, pictures, tmp_path):
    model = ["--model", str(model_folders["epsilon"]), "--references", str(pictures)]
    prompts = ["--subject", "a photo of a sks dog", "--class", "a photo of a dog"]
    out = tmp_path / "trained"
    assert cli.main(["train", *model, *prompts, "--steps", "3", "--rank", "2", "--out", str(out)]) == 0
    history = json.loads((out / "report.json").read_text())["history"]
    assert {name: len(values) for name, values in history["distances"].items()} == {"reconstruction": 3, "drift": 3}
    assert len(history["levels"]) == 10 and history["probes"][0]["paired"] is None
    given = [*model, *prompts, "--adapter", str(lora / "told.safetensors"), "--class_pictures", "1"]
    assert cli.main(["inspect", *given, "--out", str(tmp_path / "measured")]) == 0
    after = json.loads((tmp_path / "measured/report.json").read_text())["after"]
    assert after["independent"] > after["drift"] and len(after["curves"]["paired"]) == 10
