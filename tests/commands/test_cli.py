"""The command line as a user meets it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from anchor_core import cli
from anchor_core.adapters.file import load_adapter
from tests.comfyui.comfy_server import free_port

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["--subject", "a photo of a sks star", "--class", "a photo of a star"]
QUICK = ["--model", "sandbox", "--steps", "3", "--batch_size", "2", "--rank", "2"]


def refused(capsys, arguments: list[str]) -> str:
    """The one line on stderr of a call that must be refused with exit status 2."""
    capsys.readouterr()
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


def test_a_subject_is_written_with_its_report(pip):
    about = json.loads((pip / "report.json").read_text())
    assert about["class"] == "star" and len(about["prompts"]) == 25
    assert all(Image.open(pip / name).size == (64, 64) for name in about["references"])


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
        ("--class_pictures", "0"),
        ("--stop_on_drift", "1e-9"),
    ],
)
def test_bad_input_names_the_option_and_leaves_nothing(references, tmp_path, capsys, option, value):
    out = tmp_path / "out"
    error = refused(
        capsys, ["train", *QUICK, "--references", references, *PROMPTS, "--out", str(out), f"{option}={value}"]
    )
    assert option in error
    assert not out.exists()


def test_two_kinds_of_half_precision_do_not_mix(references, tmp_path, capsys):
    call = ["train", *QUICK, "--references", references, *PROMPTS, "--out", str(tmp_path / "out")]
    for dtype, precision in (("fp16", "bf16"), ("bf16", "fp16")):
        assert "--precision" in refused(capsys, [*call, "--dtype", dtype, "--precision", precision])


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


def test_a_folder_without_comfyui_is_named(tmp_path, capsys):
    told = refused(capsys, ["bench", "speed", "--comfyui", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "--comfyui" in told and "main.py" in told


def test_a_lora_of_another_model_is_refused(tmp_path, capsys):
    import torch

    from anchor_core.adapters.file import save_adapter

    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = torch.zeros(4, 320), torch.zeros(320, 4)
    file = tmp_path / "other.safetensors"
    save_adapter(file, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, {})
    error = refused(
        capsys,
        ["sample", "--model", "sandbox", "--adapter", str(file), "--prompt", "a star", "--out", str(tmp_path / "out")],
    )
    assert "another model" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "verb", ["train", "sample", "inspect", "bench run", "demo", "sandbox pretrain", "sandbox subject", "adjust"]
)
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


def trained(references, out, *options: str) -> dict:
    assert cli.main(["train", *QUICK, "--references", references, *PROMPTS, "--out", str(out), *options]) == 0
    return json.loads((out / "report.json").read_text())


def test_every_setting_is_an_option_with_help(capsys):
    from dataclasses import fields

    from anchor_core.adapters.config import AdapterConfig
    from anchor_core.training.settings import DataSettings, TrainSettings

    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for kind in (TrainSettings, AdapterConfig, DataSettings):
        for field in fields(kind):
            assert f"--{field.name}" in text or "help" not in field.metadata


def test_resume_goes_on_where_a_training_was_broken_off(references, tmp_path, capsys):
    whole = trained(references, tmp_path / "whole", "--steps", "5")
    trained(references, tmp_path / "parts", "--steps", "3", "--checkpoint_every", "2")
    line = refused(
        capsys, ["train", *QUICK, "--references", references, *PROMPTS, "--out", str(tmp_path / "parts"),
                 "--checkpoint_every", "2"]
    )  # fmt: skip
    assert "--out" in line and "give --resume or another folder" in line
    resumed = trained(references, tmp_path / "parts", "--steps", "5", "--checkpoint_every", "2", "--resume")
    assert resumed["history"]["losses"] == whole["history"]["losses"]
    one, other = (load_adapter(tmp_path / name / "adapter.safetensors")[0] for name in ("whole", "parts"))
    assert all((one[key] == other[key]).all() for key in one)


def test_resume_needs_a_checkpoint_of_this_training(references, tmp_path, capsys):
    arguments = ["train", *QUICK, "--references", references, *PROMPTS, "--out", str(tmp_path / "run")]
    assert "--resume" in refused(capsys, [*arguments, "--resume"])
    assert not (tmp_path / "run").exists()
    trained(references, tmp_path / "run", "--checkpoint_every", "2")
    assert "of another training: its w is 0.5" in refused(capsys, [*arguments, "--resume", "--w", "0.25"])


def test_two_processes_train_what_one_trains_on_the_larger_batch(references, tmp_path):
    """The gradient is the mean over the processes, so the whole training agrees to rounding."""
    one = trained(references, tmp_path / "one", "--batch_size", "4")
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", free_port()]  # accelerate 1.0 takes no 0
    command = [*launch, "-m", "anchor_core.cli", "train", *QUICK, "--references", references, *PROMPTS]
    command += ["--out", tmp_path / "two", "--batch_size", "2", "--device", "cpu"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert two["history"]["losses"] == pytest.approx(one["history"]["losses"], rel=1e-5)
    assert done.stdout.count("adapter.safetensors") == 1
    files = [load_adapter(tmp_path / name / "adapter.safetensors")[0] for name in ("one", "two")]
    first, second = (torch.cat([file[key].flatten().double() for key in sorted(file)]) for file in files)
    assert torch.cosine_similarity(first, second, dim=0) > 0.99999


def test_captions_buckets_masks_and_cache(pip, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (96, 64), (64, 96)]):
        picture = Image.open(pip / f"{number}.png").convert("RGB").resize(size)
        picture.putalpha(Image.linear_gradient("L").resize(size))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a sks star, number {number}, in the snow")
    options = ["--captions", "--masks", "--buckets", "--flip", "--shuffle", "--caption_dropout", "0.2"]
    first = trained(str(folder), tmp_path / "first", *options, "--cache", str(tmp_path / "cache"))
    files = {file.name for file in (tmp_path / "cache").iterdir()}
    again = trained(str(folder), tmp_path / "again", *options, "--cache", str(tmp_path / "cache"))
    assert first["history"]["losses"] == again["history"]["losses"]
    assert files and files == {file.name for file in (tmp_path / "cache").iterdir()}
    assert first["data"]["masks"] is True


def test_convert_rewrites_a_file(references, tmp_path, capsys):
    trained(references, tmp_path / "run")
    source = tmp_path / "run" / "adapter.safetensors"
    assert cli.main(["convert", str(source), "--to", "diffusers", "--out", str(tmp_path / "converted")]) == 0
    target = tmp_path / "converted" / json.loads((tmp_path / "converted" / "report.json").read_text())["file"]
    tensors, metadata = load_adapter(target)
    assert all(key.startswith("unet.") for key in tensors) and metadata["anchor.w"] == "0.5"
    (tmp_path / "text").write_text("no LoRA")
    line = refused(capsys, ["convert", str(tmp_path / "text"), "--to", "kohya", "--out", str(tmp_path / "none")])
    assert "not a readable safetensors file" in line and not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha", "oft"])
def test_every_kind_of_adapter_trains_and_is_read_again(references, tmp_path, kind):
    references = str(shutil.copytree(references, tmp_path / "one", ignore=lambda folder, names: sorted(names)[1:]))
    report = trained(references, tmp_path / "run", "--kind", kind, "--text_encoder")
    file = str(tmp_path / "run" / "adapter.safetensors")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a sks star in the snow\na photo of a sks star wearing a red hat\n\na sks star\n")
    arguments = ["--model", "sandbox", "--adapter", file, "--references", references, "--out", str(tmp_path / "seen")]
    assert cli.main(["inspect", *arguments, "--prompts", str(prompts)]) == 0
    seen = json.loads((tmp_path / "seen" / "report.json").read_text())
    assert seen["collapse"]["hausdorff"]["from_class"] > 0 and seen["collapse"]["kl"]["within"] == 0
    assert seen["metadata"]["anchor.kind"] == kind and report["history"]["kept"] == 3
    assert seen["after"]["drift"] != seen["before"]["drift"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_keeps_the_adapter_so_far(references, tmp_path, number):

    command = [
        sys.executable,
        "-m",
        "anchor_core.cli",
        "train",
        *QUICK,
        "--steps",
        "100000",
        "--references",
        references,
    ]
    command += [*PROMPTS, "--out", str(tmp_path / "run"), "--checkpoint_every", "1", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    try:
        while not list((tmp_path / "run").glob("checkpoints/*.ckpt")):
            assert process.poll() is None, "the training ended before its first step"
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    tensors, metadata = load_adapter(tmp_path / "run" / "adapter.safetensors")
    made = int(metadata["anchor.steps"])
    assert f"cancelled after {made} steps" in output and str(tmp_path / "run" / "adapter.safetensors") in output


def test_a_file_recommends_its_guidance(references, tmp_path):
    trained(references, tmp_path / "run", "--guidance", "3.5")
    file = str(tmp_path / "run" / "adapter.safetensors")
    for name, options, expected in (("own", [], 3.5), ("given", ["--guidance", "2"], 2.0)):
        arguments = ["--model", "sandbox", "--adapter", file, "--prompt", "a sks star", "--steps", "2", *options]
        assert cli.main(["sample", *arguments, "--out", str(tmp_path / name)]) == 0
        assert json.loads((tmp_path / name / "report.json").read_text())["guidance"] == expected
