"""What a training's record and file say of how they were made."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.data.digest import digest, digests
from anchor_core.data.pictures import References
from anchor_core.training.events import Described, Saved, StepMade
from anchor_core.training.provenance import file_hash, versions
from anchor_core.training.record import Record, read_record
from anchor_core.training.saving import adapter_metadata
from anchor_core.training.settings import TrainSettings


def test_the_nodes_record_holds_it_too(tmp_path):
    record = Record(tmp_path / "dog.run", {"id": "abc"}, TrainSettings(steps=1))
    record(StepMade(1, 1, 0.5, {"anchor": 0.5}, 0.1))
    record(Saved(1, (tmp_path / "dog.safetensors",)))
    record(Described({"versions": versions(), "files": {"dog.safetensors": "1f"}}))
    assert read_record(tmp_path / "dog.run/run.json")["made_with"]["files"] == {"dog.safetensors": "1f"}


def test_versions_are_of_what_is_loaded_and_of_the_host(monkeypatch):
    assert versions()["torch"] == torch.__version__ and "comfyui" not in versions()
    monkeypatch.setitem(sys.modules, "comfyui_version", SimpleNamespace(__version__="0.33.0"))
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert versions()["comfyui"] == "0.33.0" and "bitsandbytes" not in versions()


def test_the_file_says_versions_device_and_precision_and_no_path(eps_denoiser, concept):
    eps_denoiser.attach(AdapterConfig(rank=2))
    metadata = adapter_metadata(eps_denoiser, concept, TrainSettings())
    assert json.loads(metadata["anchor.versions"])["torch"] == torch.__version__
    assert metadata["anchor.device"].startswith("cpu ") and metadata["anchor.dtype"] == "float32"


def test_hashes_tell_pictures_masks_and_captions_apart():
    pictures = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), torch.full((3, 8, 8), 1 / 255)]
    masks = [torch.ones(1, 8, 8), torch.full((1, 8, 8), 0.5), torch.ones(1, 8, 8)]
    one, two, three = digests(References(pictures, ["a", "b", "c"], masks, ["x", "x", "y"]))
    assert one["picture"] == two["picture"] == digest(torch.zeros(3, 8, 8)) != three["picture"]
    assert one["mask"] == three["mask"] != two["mask"] and one["caption"] == two["caption"] != three["caption"]
    assert digests(References(pictures, ["a", "b", "c"]))[0].keys() == {"name", "picture"}


def test_a_file_that_is_gone_again_is_no_fault(tmp_path, caplog):
    assert file_hash(tmp_path / "gone.safetensors") is None and "cannot be read again" in caplog.text
