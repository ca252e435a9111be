"""Everything that a training depends on besides the model, the adapter's config and the pictures.

Each option is declared once, with its limits and its help; the command line and the nodes are made from these.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_options, option
from ..guidance import RECOMMENDED_GUIDANCE
from ..objectives import ANCHORS, OBJECTIVES, Objective, make_objective, option_names

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "schedule_free")
SCHEDULES = ("constant", "cosine", "linear")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal", "shifted")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
KEEPS = ("last", "best")
MEMORIES = ("fit", "refuse", "off")


@dataclass(frozen=True)
class TrainSettings:
    """The options of a training; `fields(TrainSettings)` holds the help and the limits of each.

    `w` is that of Eq. 5, lambda = 1 / (1 + w). A step of the optimizer sees `batch_size * accumulation` rows. Levels
    of noise lie in [0, 1), the share of the schedule, 0 being clean.

    Raises:
        ValueError: naming the option that is out of its limits.
    """

    objective: str = option("anchor", "what is minimised", choices=tuple(OBJECTIVES))
    w: float = option(0.5, "weight of the anchor; 0 learns the pictures alone", minimum=0)
    anchor: str = option("pretrained", "the network that gives the anchor; current is an ablation", choices=ANCHORS)
    prior_weight: float = option(1.0, "weight of the class pictures of prior_preservation and sude", minimum=0)
    sude_weight: float = option(0.4, "weight of sude's push from the empty prompt to the class", minimum=0)
    semantic_weight: float = option(1.0, "weight of class_diffusion's distance between the two prompts", minimum=0)
    steps: int = option(300, "steps of the optimizer")
    learning_rate: float = option(1e-3, "about 1e-4 for SD1.5, 2e-3 for the sandbox, 1 for prodigy", above=0)
    token_learning_rate: float = option(0.0, "of token vectors, usually 5e-4 to 5e-3; 0 for learning_rate", minimum=0)
    batch_size: int = option(4, "rows of a pass")
    accumulation: int = option(1, "passes of a step")
    optimizer: str = option("adamw", "8 bit needs bitsandbytes, the last two a package each", choices=OPTIMIZERS)
    weight_decay: float = option(1e-2, "of the optimizer", minimum=0)
    beta1: float = option(0.9, "decay of the optimizer's mean of gradients", minimum=0, below=1)
    beta2: float = option(0.999, "decay of the optimizer's mean of squared gradients", minimum=0, below=1)
    grad_clip: float = option(1.0, "largest norm of the whole gradient; 0 for none", minimum=0)
    schedule: str = option("constant", "of the learning rate; cosine and linear end at 0", choices=SCHEDULES)
    warmup: int = option(0, "steps in which the learning rate rises from 0", minimum=0)
    ema: float = option(0.0, "decay of the averaged weights, which are then kept; 0 for none", minimum=0, below=1)
    min_snr: float = option(0.0, "gamma of min-SNR weighting (eps and v models), usually 5; 0 for none", minimum=0)
    timestep_sampling: str = option("uniform", "how noise levels are drawn", choices=TIMESTEP_SAMPLINGS)
    timestep_mean: float = option(0.0, "logit_normal: mean of the logit; above 0 draws more noise")
    timestep_std: float = option(1.0, "logit_normal: standard deviation of the logit", above=0)
    timestep_shift: float = option(3.0, "shifted: level u becomes s u / (1 + (s - 1) u)", above=0)
    timestep_min: float = option(0.0, "lowest noise level", minimum=0, below=1)
    timestep_max: float = option(1.0, "noise levels stay below this one", above=0)
    precision: str = option(
        "auto", "of the passes: auto is what the network computes in; the adapter is always fp32", choices=PRECISIONS
    )
    gradient_checkpointing: bool = option(False, "less memory, more time: blocks are computed again for the gradient")
    seed: int = option(0, "of every draw of the training", minimum=0)
    probe_every: int = option(50, "steps between two measurements of the drift")
    stop_on_drift: float = option(0.0, "end when the drift exceeds this and go back to the last below it", minimum=0)
    keep: str = option("last", "best: the earliest measured adapter near the least Eq. 5 on the probe", choices=KEEPS)
    guidance: float = option(RECOMMENDED_GUIDANCE, "of previews; the file recommends it for sampling", minimum=0)
    checkpoint_every: int = option(0, "steps between two checkpoints; 0 for none", minimum=0)
    micro_batch: int = option(0, "rows of a pass computed at once: less memory, the same steps; 0 for all", minimum=0)
    memory: str = option(
        "fit",
        "fit: micro_batch and gradient_checkpointing as the memory takes; refuse what exceeds it; or off",
        choices=MEMORIES,
    )

    def __post_init__(self):
        check_options(self)
        if self.timestep_max > 1 or self.timestep_min >= self.timestep_max:
            raise ValueError(
                f"timestep_max is {self.timestep_max!r}, but it takes a number above timestep_min "
                f"({self.timestep_min:g}) and at most 1"
            )
        if self.optimizer == "schedule_free" and self.schedule != "constant":
            raise ValueError(f"schedule is {self.schedule!r}, but the schedule_free optimizer takes constant alone")
        if self.optimizer == "prodigy" and self.token_learning_rate:
            raise ValueError(
                f"token_learning_rate is {self.token_learning_rate:g}, but prodigy finds one rate for all; take 0"
            )
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup}, but it takes less than the {self.steps} steps of the training")

    def make_objective(self) -> Objective:
        """The objective with those of these settings that it takes."""
        return make_objective(self.objective, **{name: getattr(self, name) for name in option_names(self.objective)})

    def check_model(self, prediction_type: str) -> None:
        """ValueError if these settings have no meaning for a model that predicts this."""
        self.make_objective().check(prediction_type)
        if self.min_snr and prediction_type == "flow":
            raise ValueError(
                f"min_snr is {self.min_snr:g}, but it takes 0 on a flow model; use timestep_sampling logit_normal"
            )

    @property
    def fixed_length(self) -> str:
        """Why no steps can be added while it goes on; empty if they can."""
        if self.schedule == "constant":
            return ""
        ends = f"schedule is {self.schedule!r}, whose learning rate ends at 0 after the {self.steps} planned steps"
        return f"{ends}; take constant to train on"

    @property
    def keep_w(self) -> float:
        """The w of the probe's Eq. 5 by which `keep` chooses: the training's own, else the paper's 0.5."""
        return self.w if self.objective in ("anchor", "blended_target") and self.w > 0 else 0.5


@dataclass(frozen=True)
class DataSettings:
    """How pictures and captions become a dataset."""

    buckets: bool = option(False, "keep aspect ratios, at sizes of about the resolution's area, instead of a square")
    captions: bool = option(False, "read name.txt beside each picture; it names the subject by its words")
    masks: bool = option(False, "count the loss where name-masklabel.png, or else the alpha channel, is white")
    flip: bool = option(False, "mirror the pictures half of the time; not for subjects with a left and a right")
    shuffle: bool = option(False, "see a caption's comma-separated tags in several orders")
    caption_dropout: float = option(0.0, "share of rows with the empty prompt", minimum=0, below=1)

    def __post_init__(self):
        check_options(self)
