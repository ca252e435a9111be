"""Everything that a training depends on besides the model, the adapter's config and the pictures.

Each option is declared once, with its limits and its help; the command line and the nodes are made from these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import check_options, option
from ..data.augment import TEMPLATES
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

    objective: str = option(
        "anchor",
        "what is minimised: anchor keeps most of what the model knew, reconstruction is plain DreamBooth",
        choices=tuple(OBJECTIVES),
    )
    w: float = option(
        0.5,
        "how firmly the subject is held to its class: 0 takes the pictures and their surroundings, 0.5 to begin "
        "with, 1 heeds prompts best and is a little less like the subject",
        minimum=0,
    )
    anchor: str = option(
        "pretrained",
        "the network that gives the anchor: pretrained keeps what the model knew; current follows the training, for "
        "comparison",
        choices=ANCHORS,
    )
    class_weight: float = option(
        0.0,
        "anchor: how firmly the class prompt itself is held to what it was, for a third pass of the model: try 0.5 if "
        "others of the class take the subject's looks; 0 for not at all",
        minimum=0,
    )
    prior_weight: float = option(
        1.0,
        "weight of the class pictures of prior_preservation and sude: more keeps the class as it was, less is nearer "
        "to the subject",
        minimum=0,
    )
    sude_weight: float = option(
        0.4, "sude: the push from the empty prompt towards the class: more looks more like any of its class", minimum=0
    )
    semantic_weight: float = option(
        1.0,
        "class_diffusion: how firmly the subject's text is held to the class's: more heeds prompts better, less is "
        "nearer to the subject",
        minimum=0,
    )
    steps: int = option(
        300,
        "how long it learns: about 100 for each picture on a large model, 150 on the sandbox; too few miss the "
        "subject, too many copy the pictures",
    )
    learning_rate: float = option(
        1e-3,
        "how far a step goes: about 1e-4 for SD1.5 and larger models, 1e-3 for the sandbox, 1 for prodigy; halve it "
        "if pictures turn garish or noisy",
        above=0,
    )
    token_learning_rate: float = option(0.0, "of token vectors, usually 5e-4 to 5e-3; 0 for learning_rate", minimum=0)
    norm_learning_rate: float = option(
        0.0, "of norms, with layers everything: 1e-6 for svdiff as published; 0 for learning_rate", minimum=0
    )
    batch_size: int = option(
        4, "pictures seen at once: more learns more evenly and takes more memory; 1 on small cards"
    )
    accumulation: int = option(1, "passes of a step: as a larger batch_size, for time instead of memory")
    optimizer: str = option(
        "adamw",
        "which one: adamw is safe; adamw8bit saves memory, prodigy finds the rate itself, schedule_free needs no "
        "schedule: these need the packages bitsandbytes, prodigyopt and schedulefree",
        choices=OPTIMIZERS,
    )
    weight_decay: float = option(1e-2, "pulls the update towards nothing; rarely worth changing", minimum=0)
    beta1: float = option(0.9, "decay of the optimizer's mean of gradients; rarely worth changing", minimum=0, below=1)
    beta2: float = option(
        0.999, "decay of the optimizer's mean of squared gradients; rarely worth changing", minimum=0, below=1
    )
    grad_clip: float = option(
        1.0, "largest norm of the whole gradient, which tames single bad steps; 0 for none", minimum=0
    )
    schedule: str = option(
        "constant",
        "course of the learning rate: cosine and linear end at 0, so that a long training settles",
        choices=SCHEDULES,
    )
    warmup: int = option(
        0, "steps in which the learning rate rises from 0: try a tenth of all if the first pictures are wild", minimum=0
    )
    ema: float = option(
        0.0,
        "decay of the averaged weights, which are then kept: try 0.99 for calmer pictures; 0 for none",
        minimum=0,
        below=1,
    )
    min_snr: float = option(
        0.0,
        "gamma of min-SNR weighting (eps and v models), which makes noise levels count alike: usually 5; 0 for none",
        minimum=0,
    )
    timestep_sampling: str = option(
        "uniform",
        "which noise levels are learnt: uniform for SD1.5 and SDXL, logit_normal (the middle) for SD3, Flux and "
        "later models, shifted for more of shape than of detail",
        choices=TIMESTEP_SAMPLINGS,
    )
    timestep_mean: float = option(
        0.0, "logit_normal: mean of the logit: above 0 learns more of shape and composition, below 0 more of detail"
    )
    timestep_std: float = option(
        1.0, "logit_normal: standard deviation of the logit: larger spreads over more noise levels", above=0
    )
    timestep_shift: float = option(
        3.0, "shifted: level u becomes s u / (1 + (s - 1) u): larger learns more of shape", above=0
    )
    timestep_min: float = option(
        0.0, "lowest noise level: above 0 leaves fine detail as the model draws it", minimum=0, below=1
    )
    timestep_max: float = option(
        1.0, "noise levels stay below this one: below 1 leaves composition as the model draws it", above=0
    )
    precision: str = option(
        "auto", "of the passes: auto is what the network computes in; the adapter is always fp32", choices=PRECISIONS
    )
    gradient_checkpointing: bool = option(
        False, "less memory, more time: switch it on when a training runs out of memory"
    )
    seed: int = option(
        0, "of every draw of the training: the same one trains the same adapter, another one is another try", minimum=0
    )
    probe_every: int = option(50, "steps between two measurements of the drift")
    stop_on_drift: float = option(
        0.0,
        "end when the drift exceeds this and go back to the last measurement below it: take a value from an earlier "
        "run's Drift Report; 0 for never",
        minimum=0,
    )
    keep: str = option(
        "last",
        "last: as the training ends; best: the earliest measurement with most of the gain, before it copies the "
        "pictures",
        choices=KEEPS,
    )
    guidance: float = option(
        RECOMMENDED_GUIDANCE, "scale (cfg) of the previews, which the file recommends for sampling", minimum=0
    )
    checkpoint_every: int = option(
        0, "steps between two checkpoints, from which a training goes on after a break; 0 for none", minimum=0
    )
    micro_batch: int = option(0, "rows of a pass computed at once: less memory, the same steps; 0 for all", minimum=0)
    memory: str = option(
        "fit",
        "fit: micro_batch and gradient_checkpointing as the memory takes; refuse what exceeds it; or off",
        choices=MEMORIES,
    )
    draws: int = option(
        0,
        "noise of each picture: 0 draws it anew at each step; 64 keeps 64 draws of each, whose anchors are then "
        "computed once and not at each step: faster in a long training on few pictures",
        minimum=0,
    )
    bank: float = option(
        1.0, "GB of anchors that are kept, in memory and in a cache folder: what is beyond is computed again", above=0
    )

    preset: str = option("", "what chose the other options, for the file to say: it changes nothing by itself")

    def __post_init__(self):
        check_options(self)
        if self.timestep_max > 1 or self.timestep_min >= self.timestep_max:
            raise ValueError(
                f"timestep_max is {self.timestep_max!r}, but it takes a number above timestep_min "
                f"({self.timestep_min:g}) and at most 1"
            )
        if self.optimizer == "schedule_free" and self.schedule != "constant":
            raise ValueError(f"schedule is {self.schedule!r}, but the schedule_free optimizer takes constant alone")
        for name in ("token_learning_rate", "norm_learning_rate"):
            if self.optimizer == "prodigy" and getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name):g}, but prodigy finds one rate for all; take 0")
        if self.class_weight and "class_weight" not in option_names(self.objective):
            raise ValueError(
                f"class_weight is {self.class_weight:g}, but it goes with the objective anchor and this is "
                f"{self.objective!r}; take 0, or the objective anchor"
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

    buckets: bool = option(
        False,
        "keep the pictures' shapes, at sizes of about the resolution's area; off cuts the centre square, and "
        "perhaps the subject",
    )
    captions: bool = option(
        False,
        "read name.txt beside each picture, which names the subject by its words: what it says besides is learnt "
        "less as part of the subject",
    )
    masks: bool = option(
        False,
        "learn only what is white in name-masklabel.png, or else opaque in the alpha channel: what is outside does "
        "not come along",
    )
    flip: bool = option(
        False,
        "mirror the pictures half of the time, for more variety; not for lettering or subjects with a left and a right",
    )
    shuffle: bool = option(
        False, "show a caption's comma-separated tags in several orders, so that none is tied to its place"
    )
    caption_dropout: float = option(
        0.0,
        "share of rows with the empty prompt, usually 0 to 0.1; more weakens the subject's word",
        minimum=0,
        below=1,
    )
    templates: bool = option(
        False,
        "say the subject in 27 neutral ways instead of one, as Textual Inversion does: less of one wording is learnt; "
        "not with captions",
    )
    resizes: int = option(
        0,
        "copies of each picture at other sizes, smaller on grey or enlarged, as Custom Diffusion makes them: the "
        "subject is learnt at any size; 40 is near to drawing anew each time, 0 for none",
        minimum=0,
    )

    def __post_init__(self):
        check_options(self)
        if self.templates and self.captions:
            raise ValueError("templates is True, but captions is too, which say what is in each picture; take one")

    @property
    def build(self) -> dict[str, Any]:
        """The options of `build_dataset`."""
        told = {name: getattr(self, name) for name in ("shuffle", "caption_dropout", "flip", "resizes")}
        return told | {"templates": TEMPLATES if self.templates else ()}
