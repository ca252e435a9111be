"""What a file tells of its training, and that it is the same file each time."""

from __future__ import annotations

import subprocess
import sys

import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import load_adapter
from anchor_core.training.saving import adapter_metadata
from anchor_core.training.settings import TrainSettings
from tests.comfyui import comfy_server


def test_metadata_holds_every_setting_and_what_others_read(eps_denoiser, concept):
    eps_denoiser.attach(AdapterConfig(rank=3, kind="loha", layers="cross_attention_kv"))
    settings = TrainSettings(steps=9, seed=4, precision="fp32")
    metadata = adapter_metadata(eps_denoiser, concept, settings, steps=5)
    assert {name: metadata[f"anchor.{name}"] for name in vars(settings)} == {
        name: str(5 if name == "steps" else value) for name, value in vars(settings).items()
    }
    expected = {
        "anchor.kind": "loha",
        "anchor.text_encoder": "False",
        "anchor.dropout": "0.0",
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "loha"}',
        "ss_network_dim": "3",
        "ss_network_alpha": "3.0",
        "ss_base_model_version": "sd_v1",
        "ss_max_train_steps": "9",
        "ss_steps": "5",
        "modelspec.architecture": "stable-diffusion-v1/loha",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
    }
    assert {name: metadata[name] for name in expected} == expected
    assert "anchor.ranks" not in metadata and "None" not in metadata.values()


def test_the_same_adapter_is_the_same_file_in_every_process(tmp_path):
    program = (
        "import sys, torch; from anchor_core.adapters.file import save_adapter; "
        "save_adapter(sys.argv[1], {'b': torch.ones(3), 'a': torch.zeros(2)}, {str(i): 'x' for i in range(20)})"
    )
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for file in files:
        subprocess.run([sys.executable, "-c", program, str(file)], check=True, cwd=comfy_server.ROOT)
    assert files[0].read_bytes() == files[1].read_bytes()
    tensors, metadata = load_adapter(files[0])
    assert torch.equal(tensors["b"], torch.ones(3)) and metadata["7"] == "x" and len(metadata) == 20
