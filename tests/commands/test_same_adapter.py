"""The same seed gives the same adapter: again, with a cache or without, broken off or not, in 1 or 2 processes.

The node's is `test_a_training_is_resumed_from_its_checkpoints`, both backends' is in `test_parity_comfyui.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anchor_core.adapters.file import load_adapter
from tests.commands.test_cli import PROMPTS, QUICK, ROOT, references, trained  # noqa: F401

WAYS = {
    "anchor": ["--dropout", "0.2", "--flip", "--checkpoint_every", "2"],
    "prior_preservation": ["--objective", "prior_preservation", "--class_pictures", "2", "--checkpoint_every", "2"],
    "text": ["--text_encoder", "--vectors", "1", "--token", "sks", "--schedule", "cosine", "--checkpoint_every", "2"],
}
SAME = ["--steps", "4", "--seed", "3", "--batch_size", "2"]


def file(out: Path) -> bytes:
    return (out / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("way", ["anchor", *(pytest.param(way, marks=pytest.mark.long) for way in list(WAYS)[1:])])
def test_again_cached_and_broken_off(references, tmp_path, way, monkeypatch):  # noqa: F811
    from anchor_core.training.orders import Orders

    options = [*SAME, *WAYS[way]]
    trained(references, tmp_path / "first", *options)
    trained(references, tmp_path / "again", *options)
    for name in ("cold", "warm"):
        trained(references, tmp_path / name, *options, "--cache", str(tmp_path / "cache"))
    goes_on = Orders.goes_on
    monkeypatch.setattr(Orders, "goes_on", lambda self, made, planned: made < 2 and goes_on(self, made, planned))
    trained(references, tmp_path / "parts", *options)
    monkeypatch.undo()
    assert file(tmp_path / "parts") != file(tmp_path / "first")
    trained(references, tmp_path / "parts", *options, "--resume")
    for name in ("again", "cold", "warm", "parts"):
        assert file(tmp_path / name) == file(tmp_path / "first"), name


def test_one_process_and_two(references, tmp_path):  # noqa: F811
    """To rounding: the gradient is the mean of two means."""
    options = ["--seed", "3", "--steps", "4", "--flip"]
    trained(references, tmp_path / "one", *options, "--batch_size", "4")
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "-m", "anchor_core.cli", "train", *QUICK, "--references", references, *PROMPTS, *options]
    command += ["--out", tmp_path / "two", "--batch_size", "2", "--device", "cpu"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_adapter(tmp_path / name / "adapter.safetensors")[0] for name in ("one", "two"))
    assert one.keys() == two.keys()
    first, second = (torch.cat([side[key].flatten().double() for key in sorted(side)]) for side in (one, two))
    assert torch.cosine_similarity(first, second, dim=0) > 0.99999
