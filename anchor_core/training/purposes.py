"""What a training is for, as one word: the family's options of `presets`, turned towards it.

`manual` decides nothing. Every other one decides all of `DECIDED`, so that none of them is left over from another
training; what was given besides wins.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..checks import check_choice, check_count
from .presets import AUTO, learning_rate, preset_options

QUICK, SUBJECT, STYLE, LOW_MEMORY, MANUAL = "quick try", "subject", "style", "low memory", "manual"
PURPOSES = (AUTO, QUICK, SUBJECT, STYLE, LOW_MEMORY, MANUAL)

DECIDED = {
    "steps": 500, "learning_rate": 1e-4, "batch_size": 1, "rank": 8, "layers": "attention", "accumulation": 1,
    "micro_batch": 0, "gradient_checkpointing": False, "timestep_sampling": "uniform", "timestep_mean": 0.0,
    "timestep_std": 1.0, "timestep_shift": 3.0,
}  # fmt: skip
"""What is decided, with what a family takes that says nothing of it."""

_OTHER = {
    False: {"rank": 4},
    True: {"rank": 16, "layers": "attention_feed_forward", "timestep_sampling": "logit_normal"},
}
"""For models of no family, by whether they are flow models: what most rows of the table have in common."""

STEPS_A_PICTURE, _SANDBOX_STEPS = 100, 30
STYLE_RANK, SMALL_RANK = 32, 8


def purpose_options(
    purpose: str,
    family: str,
    pictures: int,
    *,
    flow: bool = False,
    given: Collection[str] = (),
    kind: str = "lora",
    optimizer: str = "adamw",
) -> dict[str, Any]:
    """The options of `TrainSettings` and `AdapterConfig` that a purpose decides, but for those that were `given`.

    Args:
        family: of `families.FAMILIES`, or empty.
        pictures: how many references there are; `subject` learns longer from more of them.
        flow: whether the model predicts a flow, which counts where it is of no family.
        kind, optimizer: as `preset_options` takes them.

    Raises:
        ValueError: there is no such purpose, or no picture.
    """
    check_choice("preset", purpose, PURPOSES)
    if purpose == MANUAL:
        return {}
    check_count("pictures", pictures)
    of_family = preset_options(AUTO, family)
    options = DECIDED | (of_family or _OTHER[flow])
    options["learning_rate"] = learning_rate(options["learning_rate"], kind, optimizer)
    if purpose == QUICK:
        options |= {"steps": max(1, options["steps"] // 4), "rank": min(options["rank"], SMALL_RANK)}
    elif purpose == SUBJECT:
        options["steps"] = pictures * (_SANDBOX_STEPS if family == "sandbox" else STEPS_A_PICTURE)
    elif purpose == STYLE:
        options["rank"] = max(options["rank"], STYLE_RANK)
        if options["layers"] == "attention":
            options["layers"] = "attention_feed_forward"
    elif purpose == LOW_MEMORY:
        # The same rows a step, one after another.
        rows = options["batch_size"] * options["accumulation"]
        options |= {"batch_size": 1, "accumulation": rows, "micro_batch": 1, "rank": min(options["rank"], SMALL_RANK)}
        options["gradient_checkpointing"] = bool(of_family)
    return {option: options[option] for option in DECIDED if option not in given}
