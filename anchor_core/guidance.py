"""The guidance rules: each is a table of branches, an affine combination of predictions at one step of sampling.

A branch is a prediction made with (prompt, adapter strength). Every rule here leads away from one branch towards a mix
of others, away + g (sum of share * branch - away), with shares that sum to 1; so a table is the same in epsilon, v, x0
and velocity space. The scale g is the sampler's own: 1 is the conditional prediction, above it is extrapolation.

A new rule is one class here, in `RULES`.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from .branches import CLASS, SUBJECT, Branch, Mix, Table
from .checks import check_choice, check_number, check_options, option

RECOMMENDED_GUIDANCE = 5.0
"""The scale of a sampling that nothing else is known of."""


@dataclass(frozen=True)
class Rule:
    """A guidance rule with its options, all of them numbers from 0 to 1 or choices.

    Args:
        start, stop: the share of the steps in which the scale counts (guidance interval): the steps
            round(start N) <= i < round(stop N) of N, from the noisiest, i = 0; in the others the scale is 1.
    """

    name: ClassVar[str]

    start: float = option(
        0.0,
        "share of the steps before the scale counts: above 0 pictures of several seeds differ more, and a step "
        "costs half until then",
        minimum=0,
    )
    stop: float = option(
        1.0,
        "share of the steps after which the scale counts no more: below 1 a step costs half from then on, and "
        "detail is softer",
        minimum=0,
    )

    def __post_init__(self):
        check_options(self)
        for each in fields(self):
            if isinstance(each.default, float) and not 0 <= getattr(self, each.name) <= 1:
                raise ValueError(f"{each.name} is {getattr(self, each.name)!r}, but it takes a number from 0 to 1")
        if self.start > self.stop:
            raise ValueError(f"start is {self.start!r}, but it takes at most stop, which is {self.stop!r}")

    def scale_at(self, step: int, steps: int, scale: float) -> float:
        """The scale at step `step` (from 0, the noisiest) of `steps`."""
        check_number("scale", scale)
        return scale if _reached(self.start, step, steps) and not _reached(self.stop, step, steps) else 1.0

    def table(self, step: int, steps: int) -> Table:
        """What the rule says at step `step` (from 0, the noisiest) of `steps`."""
        raise NotImplementedError

    @cached_property
    def _tables(self) -> list[Table]:
        return [self.table(i, 1000) for i in range(1000)]

    @cached_property
    def branches(self) -> list[Branch]:
        """Every branch that some step may ask for."""
        return list(dict.fromkeys(branch for table in self._tables for branch in table.branches(2.0)))

    @property
    def masked(self) -> bool:
        """Whether some step has a mask, for which cross-attention is read."""
        return any(table.outside is not None for table in self._tables)


def _reached(share: float, step: int, steps: int) -> bool:
    """Whether `share` of the steps are over; rounded, as 0.14 of 50 is 7.000000000000001."""
    return step >= round(share * steps)


def _mixed(class_share: float) -> Mix:
    return {SUBJECT: 1 - class_share, CLASS: class_share}


# --- the rules ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassifierFree(Rule):
    """eps_null + g (eps_c - eps_null) (arXiv 2207.12598); with `start` and `stop` guidance in an interval
    (arXiv 2404.07724, whose inclusive [a, b] of N steps is start = a / N, stop = (b + 1) / N)."""

    name = "cfg"

    def table(self, step, steps):
        return Table({SUBJECT: 1})


@dataclass(frozen=True)
class Autoguidance(Rule):
    """eps_weak + g (eps - eps_weak), the same prompt in both (arXiv 2406.02507).

    The weak model is the adapter at strength `weak`, or with `early` an early checkpoint of its training.
    """

    name = "autoguidance"

    weak: float = option(
        0.5,
        "strength of the adapter in the model that sampling is led away from: lower is nearer to the subject, "
        "higher heeds the prompt better; try 0.25 to 0.75",
    )
    early: bool = option(
        False,
        "lead away from an early checkpoint of the training, connected as early_lora, instead of a weaker adapter",
    )

    def table(self, step, steps):
        weak = Branch("subject", early=True) if self.early else Branch("subject", self.weak)
        return Table({SUBJECT: 1}, weak)


@dataclass(frozen=True)
class UnconditionalPriors(Rule):
    """eps_pretrained(null) + g (eps_theta(c) - eps_pretrained(null)) (arXiv 2503.20240, Eq. 7)."""

    name = "unconditional_priors"

    def table(self, step, steps):
        return Table({SUBJECT: 1}, Branch("null", 0.0))


@dataclass(frozen=True)
class Personalization(Rule):
    """eps_theta_weak(null) + g (eps_theta(c) - eps_theta_weak(null)), theta_weak = (1 - weak) theta' + weak theta
    (personalization guidance, arXiv 2508.00319): the weights are interpolated, not the outputs.

    weak = 1 is classifier-free guidance, weak = 0 unconditional priors. The paper's own default could not be read;
    0.5 is a guess.
    """

    name = "personalization"

    weak: float = option(
        0.5,
        "strength of the adapter in the model that sampling is led away from: lower is nearer to the subject, "
        "higher heeds the prompt better; try 0.25 to 0.75",
    )

    def table(self, step, steps):
        return Table({SUBJECT: 1}, Branch("null", self.weak))


@dataclass(frozen=True)
class RareToFrequent(Rule):
    """Classifier-free guidance whose prompt alternates: the class prompt at every `period`-th step, from the first,
    until the stop point of the `level`; the subject's otherwise (Rare-to-Frequent, arXiv 2410.22376).

    The visual detail of what is rare: 0 not rare, 1 a rough shape ... 5 hair-fine. Stop points of the released code,
    of 50 steps: SD3 (0, 5, 10, 20, 30, 40), SDXL (0, 3, 5, 10, 20, 30).
    """

    name = "rare_to_frequent"
    STOPS: ClassVar = {"sd3": (0, 0.1, 0.2, 0.4, 0.6, 0.8), "sdxl": (0, 0.06, 0.1, 0.2, 0.4, 0.6)}

    level: int = option(
        3,
        "visual detail of the subject: 0 not rare, 1 a rough shape, to 5 hair-fine; more lets the class prompt take "
        "turns for longer",
        minimum=0,
    )
    stops: str = option(
        "sdxl",
        "how long the class prompt takes turns at each level: as on SD3, or as on SDXL, which ends earlier",
        choices=STOPS,
    )
    period: int = option(
        2, "the class prompt serves at every step that this divides: 2 is every other one, 1 every one until its end"
    )

    def __post_init__(self):
        super().__post_init__()
        check_choice("level", self.level, range(6))

    def table(self, step, steps):
        frequent = not _reached(self.STOPS[self.stops][self.level], step, steps) and step % self.period == 0
        return Table({CLASS if frequent else SUBJECT: 1})


@dataclass(frozen=True)
class ScoreBlend(Rule):
    """Classifier-free guidance towards lambda eps_subject + (1 - lambda) eps_class (Semantic Anchoring, Eq. 3)."""

    name = "score_blend"

    subject_share: float = option(
        2 / 3,
        "lambda, the subject's share of the mix: more is nearer to the subject, less heeds the prompt; 2/3 belongs "
        "to w = 0.5",
    )

    def table(self, step, steps):
        return Table(_mixed(1 - self.subject_share))


@dataclass(frozen=True)
class Switching(Rule):
    """Classifier-free guidance towards the class prompt until `switch`, and the subject's from there
    (Beyond Fine-Tuning: SD2 7 of 50 steps at g = 7, SDXL 10 of 50 at 5, PixArt 8 of 20 at 4.5)."""

    name = "switching"

    switch: float = option(
        0.14,
        "share of the steps before the subject's prompt counts (masked: the mask): more takes composition and "
        "surroundings from the class prompt, less is nearer to the subject",
    )

    def table(self, step, steps):
        return Table({SUBJECT if _reached(self.switch, step, steps) else CLASS: 1})


@dataclass(frozen=True)
class Mixed(Rule):
    """eps_null + w_c (eps_c - eps_null) + w_s (eps_s - eps_null), w_c + w_s = g (Beyond Fine-Tuning:
    SD2 3.5 + 3.5, SDXL 2.5 + 2.5, PixArt 2.5 + 2). It is a score blend with lambda = 1 - class_share."""

    name = "mixed"

    class_share: float = option(
        0.5,
        "the class prompt's part of the scale, w_s / (w_c + w_s) (masked: inside the mask): more heeds the prompt, "
        "less is nearer to the subject",
    )

    def table(self, step, steps):
        return Table(_mixed(self.class_share))


@dataclass(frozen=True)
class MultiStage(Rule):
    """The class prompt alone until `switch`, mixed from there (Beyond Fine-Tuning: SD2 10 of 50 steps, 4 + 3)."""

    name = "multi_stage"

    switch: float = option(
        0.2,
        "share of the steps before the subject's prompt counts (masked: the mask): more takes composition and "
        "surroundings from the class prompt, less is nearer to the subject",
    )
    class_share: float = option(
        3 / 7,
        "the class prompt's part of the scale, w_s / (w_c + w_s) (masked: inside the mask): more heeds the prompt, "
        "less is nearer to the subject",
    )

    def table(self, step, steps):
        share = self.class_share if _reached(self.switch, step, steps) else 1.0
        return Table(_mixed(share))


@dataclass(frozen=True)
class MaskedMix(Rule):
    """Mixed with `early_share` until `switch`; from there mixed inside the mask of the class word and the class
    prompt alone outside (Beyond Fine-Tuning: SD2 3 of 50 steps, shares 1 and 0.5, quantile 0.7; SDXL 0.2, 0.5, 0.5)."""

    name = "masked"

    switch: float = option(
        0.06,
        "share of the steps before the subject's prompt counts (masked: the mask): more takes composition and "
        "surroundings from the class prompt, less is nearer to the subject",
    )
    early_share: float = option(
        1.0, "the class prompt's part of the scale before the mask counts: 1 is the class prompt alone"
    )
    class_share: float = option(
        0.5,
        "the class prompt's part of the scale, w_s / (w_c + w_s) (masked: inside the mask): more heeds the prompt, "
        "less is nearer to the subject",
    )
    quantile: float = option(
        0.7,
        "share of the picture outside of the mask, where the class prompt alone draws: more keeps the surroundings",
        below=1,
    )

    def table(self, step, steps):
        if not _reached(self.switch, step, steps):
            return Table(_mixed(self.early_share))
        if self.class_share == 1:
            return Table(_mixed(1.0))  # the same on both sides of any mask
        return Table(_mixed(self.class_share), outside=_mixed(1.0), quantile=self.quantile)


RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        ClassifierFree,
        Autoguidance,
        UnconditionalPriors,
        Personalization,
        RareToFrequent,
        ScoreBlend,
        Switching,
        Mixed,
        MultiStage,
        MaskedMix,
    )
}

RULE_OPTIONS: dict[str, dict[str, Field]] = {}
"""Name of each option -> name of each rule that takes it -> its field there."""
for _name, _field in [(rule.name, each) for rule in RULES.values() for each in fields(rule)]:
    RULE_OPTIONS.setdefault(_field.name, {})[_name] = _field


def make_rule(name: str, **options: Any) -> Rule:
    """The rule `name` with its options; ValueError for an unknown name or option, listing the known ones."""
    rule = RULES[check_choice("rule", name, RULES)]
    known = [each.name for each in fields(rule)]
    for option_name in options:
        if option_name not in known:
            raise ValueError(f"rule {name!r} has no option {option_name!r}, but it takes {', '.join(known)}")
    return rule(**options)
