"""What the nodes say to inputs that do not fit, in a real ComfyUI: one sentence that names the input, and no file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui import comfy_server, odd_nodes
from tests.nodes.every_node import prompts
from tests.nodes.graphs import node

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    comfy_server.install_pack(base / "custom_nodes" / comfy_server.PACK)
    odd = base / "custom_nodes/odd"
    odd.mkdir()
    shutil.copy(odd_nodes.__file__, odd / "__init__.py")
    shutil.copy(comfy_server.ROOT / "tests/comfyui/comfy_models.py", odd)
    for folder in ("embeddings", "loras"):
        (base / "models" / folder).mkdir(parents=True)
    save_file({"emb_params": torch.randn(2, 128)}, base / "models/embeddings/pip.safetensors")
    save_file(odd_nodes.lora(), base / "models/loras/told.safetensors", {"anchor.guidance": "lots"})
    save_file(odd_nodes.lora(torch.nan), base / "models/loras/nan.safetensors")
    server = comfy_server.ComfyServer(*found, base)
    yield server
    server.stop()


NAN, ODD = float("nan"), ["50", 0]
OTHER = "made for another model"


def files(server) -> list[Path]:
    written = (file for folder in ("output", "models") for file in (server.base / folder).rglob("*"))
    return sorted(file for file in written if file.is_file())


@pytest.mark.parametrize(
    ("target", "name", "value", "message"),
    [
        ("train", "images", "IMAGE nan", "images holds NaN"),
        ("train", "images", "IMAGE infinite", "images holds NaN or infinite"),
        ("train", "images", "IMAGE pixel", "images are 1x1, but this model takes 4 pixels"),
        ("train", "images", "IMAGE none", "images holds no picture"),
        ("train", "class_images", "IMAGE grey", "class_images is (2, 64, 64, 1)"),
        ("train", "class_images", "IMAGE pixel", "class_images: images are 1x1"),
        ("train", "clip", "CLIP none", "clip is empty"),
        ("train", "clip", "CLIP sd3", "clip: the prompt has embeddings of width 24, but this model takes 128"),
        ("train", "vae", "VAE none", "vae is empty"),
        ("train", "vae", "VAE sd3", "16, 8, 8), but this model takes 4 channels"),
        ("drift", "images", "IMAGE nan", "images holds NaN"),
        ("drift", "vae", "VAE none", "vae is empty"),
        ("drift", "lora", "LORA_MODEL tokens", "lora: it was trained together with vectors of 'sks'"),
        ("drift", "lora", "LORA_MODEL nan", "lora has NaN"),
        ("drift", "lora", "LORA_MODEL wide", f"lora: this LoRA was {OTHER}"),
        ("compare", "pictures.system0", "IMAGE nan", "pictures of one holds NaN"),
        ("compare", "pictures.system0", "IMAGE none", "pictures of one holds no picture"),
        ("apply", "strength", NAN, "strength is nan"),
        ("apply", "lora", "LORA_MODEL nan", "lora has NaN"),
        ("apply", "lora", "LORA_MODEL none", "lora holds no tensor"),
        ("apply", "file", "nan.safetensors", "nan.safetensors has NaN"),
        ("save", "lora", "LORA_MODEL none", "lora holds no tensor"),
        ("save", "lora", "LORA_MODEL nan", "lora has NaN"),
        ("save", "name", "x" * 300, "cannot be written"),
        ("load", "file", "told.safetensors", "anchor.guidance is 'lots'"),
        ("guide", "lora", "LORA_MODEL nan", "lora has NaN"),
        ("guide", "lora", "LORA_MODEL other", f"lora: this LoRA was {OTHER}"),
        ("guide", "early_lora", "LORA_MODEL nan", "early_lora has NaN"),
        ("guide", "class_conditioning", "CONDITIONING nan", "class_conditioning has embeddings with NaN"),
        ("guide", "class_conditioning", "CONDITIONING wide", "class_conditioning has embeddings of width 768"),
        ("guide", "rule", None, "rule is missing; choose one of cfg"),
        ("conditioning", "class_conditioning", "CONDITIONING nan", "class_conditioning has NaN"),
        ("conditioning", "class_conditioning", "CONDITIONING wide", "class_conditioning is (77, 768)"),
        ("conditioning", "class_conditioning", "CONDITIONING long", "class_conditioning has 154 tokens"),
        ("conditioning", "class_conditioning", "CONDITIONING two", "class_conditioning has 2 encodings"),
        ("conditioning", "subject_conditioning", "CONDITIONING none", "class_conditioning has 1 encodings"),
        ("conditioning", "subject_conditioning", "CONDITIONING zero", "subject_conditioning or class_conditioning is"),
        ("conditioning", "norm_mix", NAN, "norm_mix is nan"),
        ("embedding", "clip", "CLIP none", "clip is empty"),
        ("embedding", "norm_mix", NAN, "norm_mix is nan"),
        ("embedding", "name", "two words", "name is 'two words', but prompts read embedding:name up to ' '"),
        ("embedding", "name", "one[1]", "name is 'one[1]'"),
    ],
)
def test_one_sentence_names_the_input_and_nothing_is_written(server, target, name, value, message):
    prompt = prompts()[target]
    kind, _, odd = value.partition(" ") if isinstance(value, str) else ("", "", "")
    if kind in odd_nodes.VALUES:
        prompt["50"] = node(f"Odd{kind}", value=odd)
        value = ODD
    if name == "class_images":
        prompt["4"]["inputs"]["objective"] = "prior_preservation"
    prompt["4"]["inputs"][name] = value
    before = files(server)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        server.run(prompt)
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert files(server) == before


@pytest.mark.parametrize("target", ["train", "compare", "apply", "guide", "conditioning", "embedding"])
def test_the_same_prompts_run_otherwise(server, target):
    assert server.run(prompts()[target])
