"""The same seed gives the same adapter: again, with a cache or without, broken off or not.

In two processes: `test_two_processes_train_what_one_trains_on_the_larger_batch`; in the node:
`test_a_training_is_resumed_from_its_checkpoints`; in both backends: `test_parity_comfyui.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.test_cli import trained

WAYS = {
    "anchor": ["--dropout", "0.2", "--flip", "--checkpoint_every", "2"],
    "prior_preservation": ["--objective", "prior_preservation", "--class_pictures", "2", "--checkpoint_every", "2"],
    "text": ["--text_encoder", "--vectors", "1", "--token", "sks", "--schedule", "cosine", "--checkpoint_every", "2"],
}
SAME = ["--steps", "4", "--seed", "3", "--batch_size", "2"]


def file(out: Path) -> bytes:
    return (out / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("way", ["anchor", *(pytest.param(way, marks=pytest.mark.long) for way in list(WAYS)[1:])])
def test_again_cached_and_broken_off(references, model_folders, tmp_path, way, monkeypatch):
    from anchor_core.training.orders import Orders

    options = ["--model", str(model_folders["epsilon"]), "--resolution", "32", *SAME, *WAYS[way]]
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
