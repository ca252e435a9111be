"""Methods by name: an objective and what it trains, with the options their authors gave for Stable Diffusion 1.5.

An option is one of `TrainSettings`, `AdapterConfig` or `DataSettings`, or `class_pictures`, how many the pretrained
model makes for the objectives that read them. Learning rates are those that the authors' scripts arrive at after they
scale them by the batch. What a method leaves out here has the options' own defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from ..adapters.config import AdapterConfig
from ..adapters.kinds import NO_LAYERS
from ..adapters.layers import EVERYTHING
from ..checks import check_choice
from ..concept import word_pattern
from ..objectives import matched_learning_rate
from .settings import DataSettings, TrainSettings

CLASS_PICTURES = "class_pictures"


@dataclass(frozen=True)
class Method:
    """One method: where it and its options come from, and the options."""

    source: str
    options: dict[str, Any]


_DREAMBOOTH = {"objective": "prior_preservation", "prior_weight": 1.0, "batch_size": 1, CLASS_PICTURES: 200}
_LORA = {"kind": "lora", "rank": 4, "layers": "attention", "learning_rate": 1e-4, "steps": 500, "guidance": 7.5}
_CUSTOM = {
    "kind": "full",
    "layers": "cross_attention_kv",
    "vectors": 1,
    "detach_start": True,
    "flip": True,
    "resizes": 40,
}

_OFT = {
    "kind": "oft", "rank": 4, "layers": "attention", "learning_rate": 6e-5, "steps": 10005, "guidance": 7.5,
}  # fmt: skip

METHODS = {
    "semantic_anchoring": Method(
        "arXiv 2511.22245, Eq. 5; it states no training options, these are diffusers' of DreamBooth LoRA",
        {"objective": "anchor", "w": 0.5, "batch_size": 1, **_LORA},
    ),
    "matched_reconstruction": Method(
        "the control of semantic_anchoring: Eq. 1 alone at the learning rate matched to w = 0.5, (1 + w) times its own",
        {**_LORA, "objective": "reconstruction", "batch_size": 1, "learning_rate": matched_learning_rate(1e-4, 0.5)},
    ),
    "dreambooth": Method(
        "arXiv 2208.12242; options of diffusers' train_dreambooth with prior preservation",
        {**_DREAMBOOTH, "kind": "full", "layers": EVERYTHING, "learning_rate": 5e-6, "steps": 800, "guidance": 7.5},
    ),
    "dreambooth_lora": Method(
        "arXiv 2106.09685; options of diffusers' train_dreambooth_lora", {**_DREAMBOOTH, **_LORA}
    ),
    "textual_inversion": Method(
        "arXiv 2208.01618; options of diffusers' textual_inversion, 5e-4 scaled by 4 passes; 27 prompts of our own",
        {
            "objective": "reconstruction", "kind": NO_LAYERS, "vectors": 1, "learning_rate": 2e-3, "steps": 3000,
            "batch_size": 1, "accumulation": 4, "flip": True, "templates": True,
            "guidance": 7.5,
        },
    ),
    "custom_diffusion": Method(
        "arXiv 2212.04488; options of diffusers' train_custom_diffusion, 1e-5 scaled by 2 rows and 2 kinds of pictures",
        {**_DREAMBOOTH, **_CUSTOM, "batch_size": 2, "learning_rate": 4e-5, "steps": 500, "guidance": 6.0},
    ),
    "svdiff": Method(
        "arXiv 2303.11305; options of svdiff-pytorch, which is not the authors', but for the text encoder's norms",
        {
            **_DREAMBOOTH, "kind": "svdiff", "layers": EVERYTHING, "text_encoder": True, "learning_rate": 1e-3,
            "norm_learning_rate": 1e-6, "steps": 500, "guidance": 7.5,
        },
    ),
    "oft": Method(
        "arXiv 2306.07280; options of the authors' DreamBench runs",
        {**_DREAMBOOTH, **_OFT},
    ),
    "coft": Method(
        "arXiv 2306.07280, constrained; options of the authors' DreamBench runs",
        {**_DREAMBOOTH, **_OFT, "coft": 6e-5},
    ),
    "sude": Method(
        "arXiv 2403.06775; options of the authors' code, which also trains on a single picture",
        {
            "objective": "sude", "sude_weight": 0.4, "prior_weight": 2.0, "kind": "full", "layers": EVERYTHING,
            "text_encoder": True, "learning_rate": 1e-6, "steps": 800, "batch_size": 1, "guidance": 10.0,
            CLASS_PICTURES: 50,
        },
    ),
    "class_diffusion": Method(
        "arXiv 2405.17532; options of the authors' code, 1e-5 scaled by 2 rows",
        {
            **_CUSTOM, "objective": "class_diffusion", "semantic_weight": 1.0, "learning_rate": 2e-5, "steps": 500,
            "batch_size": 2, "guidance": 6.0,
        },
    ),
}  # fmt: skip


def method_options(name: str) -> dict[str, Any]:
    """The options of the method `name`; ValueError listing the methods if there is none."""
    return dict(METHODS[check_choice("method", name, METHODS)].options)


def method_settings(name: str, **options: Any) -> tuple[TrainSettings, AdapterConfig, DataSettings]:
    """The settings of the method `name`, with these options instead of its own.

    Raises:
        ValueError: if there is no such method, or an option is out of its limits.
    """
    wanted = {**method_options(name), **options}
    parts = (TrainSettings, AdapterConfig, DataSettings)
    known = {part: {field.name for field in fields(part)} for part in parts}
    for option in wanted:
        if option != CLASS_PICTURES and not any(option in names for names in known.values()):
            raise ValueError(f"{option} is no option of a training; take one of the settings' names")
    settings, config, data = (
        part(**{option: value for option, value in wanted.items() if option in known[part]}) for part in parts
    )
    return settings, config, data


def check_combination(
    settings: TrainSettings,
    config: AdapterConfig,
    prompts: Iterable[tuple[str, str]],
    caption_dropout: float = 0.0,
) -> None:
    """Refuse an objective, a trained part and prompts that do not go together.

    Args:
        prompts: subject prompt and class prompt, of each picture.
        caption_dropout: share of rows with the empty prompt.

    Raises:
        ValueError: with the reason.
    """
    if settings.make_objective().reads_pooled and not config.trains_text:
        raise ValueError(
            f"objective is {settings.objective!r}, which acts on the text side alone, but nothing is trained there; "
            "set text_encoder or vectors, or take another objective"
        )
    alone = config.kind == NO_LAYERS
    if alone and settings.make_objective().trains_class:
        raise ValueError(
            f"objective is {settings.objective!r}, but with kind 'none' only the token's vectors train, which the "
            "class prompt lacks, so that its own term trains nothing; take anchor with class_weight 0"
        )
    if alone and caption_dropout:
        raise ValueError(
            f"caption_dropout is {caption_dropout:g}, but with kind 'none' only the token's vectors train, which the "
            "empty prompt does not have; take 0"
        )
    if not config.vectors:
        return
    token = word_pattern(config.token)
    for subject, class_ in prompts:
        if not token.search(subject):
            raise ValueError(
                f"token is {config.token!r}, but the subject prompt {subject!r} does not have that word; "
                "give the word that stands for the subject"
            )
        if token.search(class_):
            raise ValueError(
                f"token is {config.token!r}, but the class prompt {class_!r} has that word too; "
                "give a word of the subject prompt alone"
            )
