"""Prompts in API form that the tests of this room share, and what they leave in a server's folders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file


def node(type_: str, **inputs) -> dict:
    return {"class_type": type_, "inputs": inputs}


def training(**changes) -> dict:
    """Sandbox model (1), references (2), concept (3) and a short training (4)."""
    inputs = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "concept": ["3", 0],
        "objective": "anchor", "w": 0.5, "steps": 4, "learning_rate": 1e-3, "batch_size": 2, "rank": 4,
        "layers": "attention", "seed": 0, "name": "test", "preview_every": 2, "probe_every": 0, "prior_weight": 1.0,
        "class_count": 2,
    }  # fmt: skip
    return {
        "1": node("AnchorSandboxModel"),
        "2": node("AnchorLoadReferences", references="sandbox/pip", size=64),
        "3": node("AnchorConcept", token="sks", class_word="star", template="a photo of a {}"),
        "4": node("AnchorTrainLoRA", **inputs | changes),
    }


def sampling(model, end_at_step: int = 10000) -> dict:
    """A picture (24) and its latents (25) by `model`; each large `end_at_step` is the same, but not cached."""
    return {
        "20": node("CLIPTextEncode", clip=["1", 1], text="a photo of a sks star"),
        "21": node("CLIPTextEncode", clip=["1", 1], text=""),
        "22": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "23": node(
            "KSamplerAdvanced",
            model=model,
            positive=["20", 0],
            negative=["21", 0],
            latent_image=["22", 0],
            add_noise="enable",
            noise_seed=1,
            steps=10,
            cfg=5.0,
            sampler_name="euler",
            scheduler="normal",
            start_at_step=0,
            end_at_step=end_at_step,
            return_with_leftover_noise="disable",
        ),  # fmt: skip
        "24": node("SaveImage", images=["26", 0], filename_prefix="picture"),
        "25": node("SaveLatent", samples=["23", 0], filename_prefix=f"latents/{end_at_step}"),
        "26": node("VAEDecode", samples=["23", 0], vae=["1", 2]),
    }


def pixels(png: bytes) -> numpy.ndarray:
    return numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def loras(server) -> list[Path]:
    return sorted((server.base / "output/loras").rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)


def base_latents(server, end_at_step: int) -> torch.Tensor:
    """What the untouched model on the canvas samples."""
    prompt = {"1": node("AnchorSandboxModel"), **sampling(["1", 0], end_at_step)}
    server.run(prompt)
    (file,) = (server.base / "output/latents").glob(f"{end_at_step}_*.latent")
    return load_file(file)["latent_tensor"]


def with_options(server, changes: dict, **options) -> dict:
    """`training(**changes)` with Train Options (7), whose other inputs are at their defaults."""
    inputs = server.get("/object_info/AnchorTrainOptions")["AnchorTrainOptions"]["input"]["required"]
    defaults = {name: settings["default"] for name, (_, settings) in inputs.items()}
    prompt = training(**changes, options=["7", 0]) | {"7": node("AnchorTrainOptions", **defaults | options)}
    return prompt | {"5": node("PreviewAny", source=["4", 4])}


def newest_lora(server) -> tuple[dict, dict, Path]:
    from anchor_core.adapters.file import load_adapter

    return (*load_adapter(loras(server)[-1]), loras(server)[-1])
