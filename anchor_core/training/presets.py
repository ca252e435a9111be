"""Options by family of models: what the published trainers take for a LoRA of that family, each with its source.

An option is one of `TrainSettings` or `AdapterConfig`, or `resolution`, the edge of square pictures; where a family
has none, its models differ and each has its own. What is left out has the options' own defaults.

The trainers draw a level as sigmoid(n), n ~ N(0, 1), and shift it: s u / (1 + (s - 1) u). A shift by s adds log s to
the logit, so that this is `logit_normal` with the mean log s. Their shift by the length of the sequence (flux_shift,
flux2_shift, nextdit_shift) is s = exp(1.15) for 1024 x 1024.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..checks import check_choice

AUTO, NONE = "auto", "none"
LONG_SHIFT = 1.15
"""log s of 4096 tokens: 1024 x 1024."""


@dataclass(frozen=True)
class Preset:
    """The options of one family, and the files of the trainers in which they stand."""

    source: str
    options: dict[str, Any]


def _sigmoid(log_shift: float = 0.0) -> dict[str, Any]:
    return {"timestep_sampling": "logit_normal", "timestep_mean": round(log_shift, 4), "timestep_std": 1.0}


_UNIFORM = {"timestep_sampling": "uniform"}
_UNET = {"batch_size": 1, "layers": "attention", "gradient_checkpointing": False, **_UNIFORM}
_TRANSFORMER = {"batch_size": 1, "layers": "attention_feed_forward", "gradient_checkpointing": True}

PRESETS = {
    "sd1": Preset(
        "diffusers, examples/dreambooth/README.md (LoRA) and train_dreambooth_lora.py (rank)",
        {**_UNET, "learning_rate": 1e-4, "steps": 500, "rank": 4, "accumulation": 1, "resolution": 512},
    ),
    "sd2": Preset(
        "diffusers, examples/dreambooth/README.md (LoRA), which takes each model's own resolution",
        {**_UNET, "learning_rate": 1e-4, "steps": 500, "rank": 4, "accumulation": 1},
    ),
    "sdxl": Preset(
        "diffusers, examples/dreambooth/README_sdxl.md and train_dreambooth_lora_sdxl.py (rank)",
        {**_UNET, "learning_rate": 1e-4, "steps": 500, "rank": 4, "accumulation": 4, "resolution": 1024},
    ),
    "sd3": Preset(
        "ai-toolkit, config/examples/train_lora_sd35_large_24gb.yaml; levels: diffusers, README_sd3.md (logit_normal)",
        {**_TRANSFORMER, "learning_rate": 1e-4, "steps": 2000, "rank": 16, "resolution": 1024, **_sigmoid()},
    ),
    "flux": Preset(
        "ai-toolkit, config/examples/train_lora_flux_24gb.yaml; levels: sd-scripts, docs/flux_train_network.md "
        "(flux_shift)",
        {**_TRANSFORMER, "learning_rate": 1e-4, "steps": 2000, "rank": 16, "resolution": 1024, **_sigmoid(LONG_SHIFT)},
    ),
    "flux2": Preset(
        "diffusers, examples/dreambooth/README_flux2.md; rank and levels: musubi-tuner, docs/flux_2.md (flux2_shift)",
        {**_TRANSFORMER, "learning_rate": 1e-4, "steps": 500, "rank": 32, "accumulation": 4, "resolution": 1024,
         **_sigmoid(LONG_SHIFT)},
    ),
    "z_image": Preset(
        "diffusers, examples/dreambooth/README_z_image.md; rank and levels: musubi-tuner, docs/zimage.md (shift 2.0)",
        {**_TRANSFORMER, "learning_rate": 1e-4, "steps": 500, "rank": 32, "accumulation": 4, "resolution": 1024,
         **_sigmoid(math.log(2.0))},
    ),
    "qwen_image": Preset(
        "musubi-tuner, docs/qwen_image.md (rate, rank, shift 2.2); steps: ai-toolkit, train_lora_qwen_image_24gb.yaml",
        {**_TRANSFORMER, "learning_rate": 5e-5, "steps": 2000, "rank": 16, "resolution": 1024,
         **_sigmoid(math.log(2.2))},
    ),
    "chroma": Preset(
        "ai-toolkit, config/examples/train_lora_chroma_24gb.yaml; levels: sd-scripts, docs/flux_train_network.md "
        "(sigmoid)",
        {**_TRANSFORMER, "learning_rate": 1e-4, "steps": 2000, "rank": 16, "resolution": 1024, **_sigmoid()},
    ),
    "lumina2": Preset(
        "sd-scripts, docs/lumina_train_network.md (nextdit_shift, of a uniform level); steps: ai-toolkit, "
        "train_lora_lumina.yaml",
        {**_TRANSFORMER, "learning_rate": 1e-4, "steps": 2000, "rank": 8, "resolution": 1024,
         "timestep_sampling": "shifted", "timestep_shift": round(math.exp(LONG_SHIFT), 4)},
    ),
    "wan": Preset(
        "musubi-tuner, docs/wan.md (rate, rank, shift 3.0); steps and resolution: ai-toolkit, "
        "train_lora_wan21_1b_24gb.yaml",
        {**_TRANSFORMER, "learning_rate": 2e-4, "steps": 2000, "rank": 32, "resolution": 640,
         **_sigmoid(math.log(3.0))},
    ),
    "sandbox": Preset(
        "docs/RESULTS.md, how the settings are chosen: the quickstart's, without a vector",
        {"learning_rate": 1e-3, "steps": 150, "rank": 8, "batch_size": 4, "accumulation": 1,
         "layers": "all_linear_conv", "gradient_checkpointing": False, **_UNIFORM},
    ),
}  # fmt: skip

_RATES = {"full": 5e-6, "oft": 6e-5, "svdiff": 1e-3, "none": 2e-3}
"""Learning rates of the kinds that are no low-rank update, as their authors have them for SD1.5 (`METHODS`)."""


def preset_options(
    name: str, family: str, given: Collection[str] = (), kind: str = "lora", optimizer: str = "adamw"
) -> dict[str, Any]:
    """The options of the preset `name`, but for those that were `given`.

    Args:
        name: of `PRESETS`; `auto` for that of `family`, nothing if it has none; `none` for nothing.
        kind: of the adapter: the rates of some are others.
        optimizer: prodigy finds the rate itself, and takes 1.

    Raises:
        ValueError: there is no such preset.
    """
    check_choice("preset", name, (AUTO, NONE, *PRESETS))
    preset = PRESETS.get(family if name == AUTO else name)
    if preset is None:
        return {}
    options = dict(preset.options)
    options["learning_rate"] = learning_rate(options["learning_rate"], kind, optimizer)
    if kind == "oft" and options.get("layers") == "all_linear_conv":  # it turns no convolution but 1 x 1
        options["layers"] = "all_linear"
    return {option: value for option, value in options.items() if option not in given}


def learning_rate(usual: float, kind: str, optimizer: str) -> float:
    """What a kind of adapter and an optimizer take where a LoRA takes the `usual` rate."""
    return 1.0 if optimizer == "prodigy" else _RATES.get(kind, usual)
