"""Methods on the command line, from training to a picture."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from anchor_core import cli

SUBJECT = ["--subject", "a photo of a sks star", "--class", "a photo of a star"]


def test_the_command_line_trains_by_method_and_samples_with_its_vectors(references, tmp_path):
    out, drawn = tmp_path / "trained", tmp_path / "drawn"
    given = ["--method", "custom_diffusion", "--steps", "2", "--class_pictures", "1", "--learning-rate", "1e-2"]
    train = ["train", "--model", "sandbox", "--references", references, *SUBJECT, *given, "--out", str(out)]
    assert cli.main(train) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["embedding"] == "embedding.safetensors" and report["method"] == "custom_diffusion"
    assert (report["kind"], report["settings"]["batch_size"], report["settings"]["learning_rate"]) == ("full", 2, 1e-2)
    pictures = {}
    sample = ["sample", "--model", "sandbox", "--prompt", "a sks star", "--steps", "2"]
    for name, files in {
        "both": ["--adapter", str(out / "adapter.safetensors")],
        "vectors": ["--adapter", str(out / "embedding.safetensors")],
        "none": [],
    }.items():
        assert cli.main([*sample, *files, "--out", str(drawn / name)]) == 0
        pictures[name] = (drawn / name / "000.png").read_bytes()
    assert len(set(pictures.values())) == 3
    measured = [
        "--adapter",
        str(out / "adapter.safetensors"),
        "--references",
        references,
        "--out",
        str(tmp_path / "seen"),
    ]
    assert cli.main(["inspect", "--model", "sandbox", *measured]) == 0
    told = json.loads((tmp_path / "seen/report.json").read_text())["embeddings"]
    (vectors,) = load_file(out / "embedding.safetensors").values()
    assert list(told) == ["clip_l"] and told["clip_l"]["token"] == pytest.approx(vectors.norm(dim=1).tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "none"], "--kind: kind is 'none' and vectors is 0"),
        (["--method", "textual_inversion", "--token", "zwx"], "--token: token is 'zwx', but the subject prompt"),
        (["--method", "textual_inversion", "--objective", "prior_preservation"], "--objective: objective is 'prior"),
    ],
)
def test_the_command_line_refuses_what_trains_nothing_and_writes_nothing(tmp_path, capsys, options, message):
    train = ["train", "--model", "sandbox", "--references", "nowhere", *SUBJECT, *options]
    assert cli.main([*train, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
