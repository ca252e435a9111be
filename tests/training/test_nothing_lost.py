"""What the fault suites of tests/reliability found, each in its smallest form."""

from __future__ import annotations

import shutil

import pytest
import torch

from anchor_core.adapters.file import load_adapter
from anchor_core.data.cache import Cache
from anchor_core.training import run as training
from anchor_core.training import saving
from anchor_core.training.events import Ended
from anchor_core.training.optimizers import AveragedWeights, make_optimizer
from anchor_core.training.preview import Preview
from anchor_core.training.settings import TrainSettings
from tests.reliability.trainings import Workshop


@pytest.fixture(scope="module")
def shop(model_folders):
    return Workshop(model_folders["epsilon"])


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_looking_at_the_average_leaves_the_running_weights(optimizer, ema):
    settings = TrainSettings(optimizer=optimizer, learning_rate=1e-2)
    weights = torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    made = make_optimizer([weights], settings)
    average = AveragedWeights([weights], ema, made)
    for step in range(5):
        weights.grad = torch.sin(weights.detach() + step)
        made.step()
        average.update()
        before = weights.detach().clone()
        with average:
            assert step == 0 or torch.equal(weights, before) == (optimizer == "adamw" and not ema)
        assert torch.equal(weights, before)


@pytest.mark.parametrize("where", [(Cache, "latents"), (training, "check_memory"), (Preview, "conditions")])
def test_whatever_fails_before_the_first_step_is_told(shop, tmp_path, monkeypatch, where):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patches, pytest.raises(torch.OutOfMemoryError):
        patches.setattr(*where, fail)
        shop.train("anchor", tmp_path, picture_every=2)
    assert shop.events[-1] == Ended("failed", 0, 0, "no memory")
    assert not list(tmp_path.iterdir())
    shop.check_network()


@pytest.mark.parametrize("lasting", [False, True])
def test_memory_that_runs_out_while_saving(shop, tmp_path, monkeypatch, lasting):
    """What is kept may be an earlier step's; the file says so, and the first error is the one that is raised."""
    calls, to_file_keys = [], saving.to_file_keys
    kept = shop.train("prior, best kept", tmp_path / "whole", steps=6).history.kept
    assert kept < 6

    def fail(*arguments):
        calls.append(arguments)
        if lasting or len(calls) == 1:
            raise torch.OutOfMemoryError(f"no memory, call {len(calls)}")
        return to_file_keys(*arguments)

    with monkeypatch.context() as patches, pytest.raises(torch.OutOfMemoryError, match="call 1") as caught:
        patches.setattr(saving, "to_file_keys", fail)
        shop.train("prior, best kept", tmp_path / "failed", steps=6)
    ended = shop.events[-1]
    assert (ended.how, ended.made, ended.kept) == ("failed", 6, kept)
    if lasting:
        assert caught.value.__notes__ == ["no memory, call 2"]
        assert not (tmp_path / "failed").exists()
    else:
        assert load_adapter(tmp_path / "failed" / "adapter.safetensors")[1]["anchor.steps"] == str(kept)


def test_the_vectors_that_cannot_be_written_take_the_adapter_with_them(shop, tmp_path):
    (tmp_path / "embedding.safetensors").mkdir()
    with pytest.raises(ValueError, match="the adapter cannot be written to .*embedding.safetensors .it is a folder"):
        shop.train("lora and token", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["embedding.safetensors"]


def test_a_checkpoint_folder_that_is_taken_away_is_made_again(shop, tmp_path):
    folder = tmp_path / "checkpoints"

    def listen(event) -> None:
        if event.event == "phase" and event.phase == "preparing":
            shutil.rmtree(folder)

    shop.train("anchor", tmp_path, listen=listen, checkpoint_every=2)
    assert [file.name for file in sorted(folder.iterdir())] == ["step-000002.ckpt", "step-000004.ckpt"]


def test_latents_do_not_depend_on_what_is_cached_already(shop, tmp_path):
    """A preparation that was broken off leaves some; an autoencoder's last bits depend on the pictures of a pass."""
    pictures = shop.references.pixels
    together = Cache(shop.denoiser).latents(pictures)
    Cache(shop.denoiser, tmp_path).latents(pictures[:2])
    assert all(torch.equal(*pair) for pair in zip(together, Cache(shop.denoiser, tmp_path).latents(pictures)))
