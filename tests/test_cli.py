"""The command line as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from anchor_core import cli
from anchor_core.adapter_file import load_adapter

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["--subject", "a photo of a sks star", "--class", "a photo of a star"]
QUICK = ["--model", "sandbox", "--steps", "3", "--batch_size", "2", "--rank", "2"]


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pip")
    assert cli.main(["sandbox", "subject", "pip", "--out", str(folder)]) == 0
    return str(folder)


def refused(capsys, arguments: list[str]) -> str:
    """The one line on stderr of a call that must be refused with exit status 2."""
    try:
        status = cli.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err.strip()
    assert status == 2, error
    assert len(error.splitlines()) == 1, error
    return error


def test_subjects_are_listed_a_name_a_line(capsys):
    assert cli.main(["sandbox", "subjects"]) == 0
    assert len(capsys.readouterr().out.split()) == 12


def test_a_subject_is_written_with_its_report(references):
    about = json.loads((Path(references) / "report.json").read_text())
    assert about["class"] == "star" and len(about["prompts"]) == 25
    assert all(Image.open(Path(references) / name).size == (64, 64) for name in about["references"])


def test_train_sample_inspect_one_after_the_other(references, tmp_path, capsys):
    trained, drawn, seen = tmp_path / "trained", tmp_path / "drawn", tmp_path / "seen"
    assert cli.main(["train", *QUICK, "--references", references, *PROMPTS, "--out", str(trained)]) == 0
    file = str(trained / "adapter.safetensors")
    _, metadata = load_adapter(file)
    assert metadata["anchor.subject_prompt"] == PROMPTS[1] and metadata["anchor.w"] == "0.5"
    report = json.loads((trained / "report.json").read_text())
    assert len(report["history"]["losses"]) == 3 and (trained / "report.png").exists()
    sampling = ["--prompt", "a photo of a sks star", "--steps", "2", "--count", "2", "--out", str(drawn)]
    assert cli.main(["sample", "--model", "sandbox", "--adapter", file, *sampling]) == 0
    assert len(list(drawn.glob("*.png"))) == 2
    inspect = ["inspect", "--model", "sandbox", "--adapter", file, "--references", references, "--out", str(seen)]
    assert cli.main(inspect) == 0
    measured = json.loads((seen / "report.json").read_text())
    assert measured["after"]["drift"] != measured["before"]["drift"] and len(measured["after"]["by_timestep"]) == 10


def test_prior_preservation_trains_from_the_command_line(references, tmp_path):
    more = ["--objective", "prior_preservation", "--class-pictures", "2", "--out", str(tmp_path / "out")]
    assert cli.main(["train", *QUICK, "--references", references, *PROMPTS, *more]) == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--w", "-1"),
        ("--w", "nan"),
        ("--w", "much"),
        ("--steps", "0"),
        ("--steps", "many"),
        ("--learning_rate", "nan"),
        ("--learning_rate", "-0.1"),
        ("--learning_rate", "fast"),
        ("--rank", "0"),
        ("--seed", "-1"),
        ("--objective", "magic"),
        ("--class", ""),
        ("--class", "a photo of a sks star"),
        ("--subject", " "),
        ("--model", "nowhere"),
        ("--layers", "("),
    ],
)
def test_bad_input_names_the_option_and_leaves_nothing(references, tmp_path, capsys, option, value):
    out = tmp_path / "out"
    error = refused(
        capsys, ["train", *QUICK, "--references", references, *PROMPTS, "--out", str(out), f"{option}={value}"]
    )
    assert option in error
    assert not out.exists()


def test_bad_references_are_named(tmp_path, capsys):
    call = ["train", *QUICK, *PROMPTS, "--out", str(tmp_path / "out"), "--references"]
    assert "--references" in refused(capsys, [*call, str(tmp_path / "nowhere")])
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert "holds no picture" in refused(capsys, [*call, str(folder)])
    Image.new("RGB", (64, 64)).save(folder / "1.png")
    (folder / "2.png").write_bytes(b"no picture")
    assert "2.png" in refused(capsys, [*call, str(folder)])
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_named(references, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    assert "--out" in refused(capsys, ["train", *QUICK, "--references", references, *PROMPTS, "--out", out])
    assert "--out" in refused(capsys, ["sandbox", "subject", "pip", "--out", out])


def test_a_lora_of_another_model_is_refused(tmp_path, capsys):
    import torch

    from anchor_core.adapter_file import save_adapter

    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = torch.zeros(4, 320), torch.zeros(320, 4)
    file = tmp_path / "other.safetensors"
    save_adapter(file, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, {})
    error = refused(
        capsys,
        ["sample", "--model", "sandbox", "--adapter", str(file), "--prompt", "a star", "--out", str(tmp_path / "out")],
    )
    assert "another model" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["train", "sample", "inspect", "bench", "demo", "sandbox pretrain", "sandbox subject"])
def test_every_verb_has_help_seed_and_out(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*verb.split(), "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "--seed" in text and "--out" in text


def test_adding_the_command_line_imports_nothing_heavy():
    heavy = ("peft", "diffusers", "transformers", "matplotlib")
    script = f"import sys, anchor_core.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
