"""What can be set of a check-up; light, since the node that lists it as inputs is loaded with ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_options, option

BUDGET = 0.7
"""Of the class prompt's own effect (`of_prompt`): up to it the class is kept (docs/CHECKUP.md)."""


@dataclass(frozen=True)
class CheckupSettings:
    """What a check-up measures on, and the change of the class that it allows."""

    timesteps: int = option(
        8, "how many noise levels, evenly over the schedule; more is a finer curve and takes longer"
    )
    noises: int = option(1, "noises for each picture and level; more is less chance and takes longer")
    count: int = option(4, "class pictures to measure on, which the untouched model makes where none are given")
    steps: int = option(20, "sampling steps of those pictures")
    budget: float = option(
        BUDGET,
        "how far a LoRA may move the class prompt's prediction, over what that prompt's own words do; the strength at "
        "which it passes this is looked for",
        above=0.0,
    )
    seed: int = option(0, "seed of the pictures and noises: keep it to compare LoRAs", minimum=0)

    def __post_init__(self):
        check_options(self)
