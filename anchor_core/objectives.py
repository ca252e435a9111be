"""The training objectives: one function of a `Step` each, returning weighted scalar terms whose sum is the loss.

Every squared error is the mean over all elements, in the model's native prediction space. The paper writes the
sum over elements; w, a ratio of two such terms, is the same in both, and in every prediction space, because the
native and the epsilon form of both terms differ by one factor per timestep that they share. For the same reason a
step's row weights and masks go into every term alike.

A step computes a prediction when an objective first reads it, so an objective pays for the passes it reads only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_choice, check_number
from .denoiser import Step

Terms = dict[str, Tensor]

ANCHORS = ("pretrained", "current")


def _squared_error(prediction: Tensor, target: Tensor, masks: Tensor | None) -> Tensor:
    if prediction.element_size() < 4:
        prediction = prediction.float()
    error = (prediction - target.to(prediction.dtype)).square()
    if masks is not None:
        error = error * (masks / masks.mean(dim=(1, 2, 3), keepdim=True)).to(error.dtype)
    return error


def mse(prediction: Tensor, target: Tensor, weights: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
    """Mean squared error of (B, C, h, w) in float32 or better: the mean over the rows of each row's own mean.

    `weights` (B,) multiplies each row's error; `masks` (B, 1, h, w) says where a row's error is taken.
    """
    error = _squared_error(prediction, target, masks)
    if weights is not None:
        error = error * weights.reshape(-1, *[1] * (error.ndim - 1)).to(error.dtype)
    return error.mean()


def _error(step: Step, prediction: Tensor, target: Tensor) -> Tensor:
    return mse(prediction, target, step.weights, step.masks)


def reconstruction(step: Step) -> Terms:
    """|eps - eps_theta(z_t, c_sbj, t)|^2 (Semantic Anchoring, Eq. 1). One pass."""
    return {"reconstruction": _error(step, step.subject, step.target)}


def prior_preservation(step: Step, prior_weight: float = 1.0) -> Terms:
    """Eq. 1 + prior_weight * |eps' - eps_theta(z_t'^cls, c_cls, t')|^2 (DreamBooth; Semantic Anchoring, Eq. 2).

    The class pictures come with noise and timesteps of their own. Two passes; one at weight 0.
    """
    terms = reconstruction(step)
    if check_number("prior_weight", prior_weight, minimum=0) > 0:
        terms["prior"] = prior_weight * mse(step.prior_prediction, step.prior_target, step.prior.weights)
    return terms


def semantic_anchoring(step: Step, w: float = 0.5, anchor: str = "pretrained", class_weight: float = 0.0) -> Terms:
    """|eps - eps_theta(z_t, c_sbj, t)|^2 + w * |eps_theta(z_t, c_sbj, t) - eps_theta'(z_t, c_cls, t)|^2 (Eq. 5).

    theta' is the pretrained network, which is this network with the adapter off. `anchor="current"` takes theta
    itself instead, with the text encoder as it is trained, without gradient: the ablation of Fig. 6 and 7. Two
    passes, the second without a graph; one at w = 0, where Eq. 5 is Eq. 1.

    Beyond the paper, class_weight > 0 adds class_weight * |eps_theta(z_t, c_cls, t) - eps_theta'(z_t, c_cls, t)|^2,
    which holds the class prompt itself where Eq. 5 holds the subject's; at w = 0 it is what trainers call
    differential output preservation. One more pass, with a graph.
    """
    check_choice("anchor", anchor, ANCHORS)
    terms = reconstruction(step)
    if check_number("w", w, minimum=0) > 0:
        target = step.anchor if anchor == "pretrained" else step.current_anchor
        terms["anchor"] = w * _error(step, step.subject, target)
    if check_number("class_weight", class_weight, minimum=0) > 0:
        terms["class"] = class_weight * _error(step, step.class_prediction, step.anchor)
    return terms


def blended_target(step: Step, w: float = 0.5) -> Terms:
    """|eps* - eps_theta(z_t, c_sbj, t)|^2 with eps* = (eps + w * eps_theta'(z_t, c_cls, t)) / (1 + w).

    The single-target form of Eq. 5 (by Eq. 4): its gradient is that of Eq. 5 divided by 1 + w. It serves as the
    control that has the anchor's target without the anchor's larger gradient.
    """
    check_number("w", w, minimum=0)
    target = step.target if w == 0 else (step.target + w * step.anchor) / (1 + w)
    return {"blended": _error(step, step.subject, target)}


def sude(step: Step, sude_weight: float = 0.4, prior_weight: float = 1.0) -> Terms:
    """Eq. 1 + sude_weight * g * l / coef1_t + prior_weight * (the class pictures of Eq. 2); SuDe (facechain's code).

    The subject derives from its class: l = -log p(class | x_{t-1}) up to a constant, which for the posterior
    N(mu(eps), btilde_t) is a difference of errors of posterior means,

        l = (mean (mu(eps_s) - mu(eps_c))^2 - mean (mu(eps_s) - mu(eps_0))^2) / (2 btilde_t + 1e-6),

    of the subject, the class and the empty prompt, all by the current network, the last two without gradient. The
    truncation g is 1 where l is above its own value at eps_s = eps_c, else 0: nothing is learnt where the subject is
    closer to its class than the class itself. mu(eps) = coef1_t z_0(eps) + ..., coef1_t = beta_t sqrt(abar_{t-1}) /
    (1 - abar_t). The 1e-6 counts at t = 0, where btilde_t is 0. In eps_s the term is linear, a constant push along
    eps_c - eps_0.

    l and g are each row's own; masks say where its means are taken, and weights multiply it as they do Eq. 1. For a v
    model the errors are turned into those of epsilon. SuDe's prior_weight is 2. Three passes, and one for class
    pictures; the second and third have no graph.
    """
    terms = prior_preservation(step, prior_weight)
    if check_number("sude_weight", sude_weight, minimum=0) > 0:
        now, before = step.alpha_bars
        beta = 1 - now / before
        coef1 = beta * before.sqrt() / (1 - now)
        # mu(eps) - mu(eps') = -coef1 sigma / alpha (eps - eps'); for v both scale and alpha are 0 at zero terminal SNR.
        scale = step.denoiser.epsilon_scale(step.timesteps).cpu().double()
        of_x0 = (1 - now).sqrt() * (scale / now.sqrt()).nan_to_num(1.0)
        factor = (coef1 * of_x0).square() / (2 * beta * (1 - before) / (1 - now) + 1e-6)

        def error(prediction: Tensor, target: Tensor) -> Tensor:
            rows = _squared_error(prediction, target, step.masks).mean(dim=(1, 2, 3))
            return factor.to(rows) * rows

        likelihood = error(step.subject, step.current_anchor) - error(step.subject, step.unconditional)
        reference = -error(step.current_anchor, step.unconditional)
        rows = torch.where(likelihood > reference, likelihood, 0.0) / coef1.to(likelihood)
        terms["sude"] = sude_weight * (rows if step.weights is None else step.weights.to(rows) * rows).mean()
    return terms


def class_diffusion(step: Step, semantic_weight: float = 1.0) -> Terms:
    """Eq. 1 + semantic_weight * (1 - cos(e(subject prompt), e(class prompt))) (ClassDiffusion).

    e is the pooled output of the text encoder; the prompts are the concept's own, not a caption's. The second term
    reaches what is trained on the text side alone. Its class prompt is encoded by the pretrained encoder: the same as
    published, where only the subject's token is trained, and nothing that a trained encoder could move towards the
    subject.
    """
    terms = reconstruction(step)
    if check_number("semantic_weight", semantic_weight, minimum=0) > 0:
        terms["semantic"] = semantic_weight * step.text_distance
    return terms


OBJECTIVES: dict[str, Callable[..., Terms]] = {
    "reconstruction": reconstruction,
    "prior_preservation": prior_preservation,
    "anchor": semantic_anchoring,
    "blended_target": blended_target,
    "sude": sude,
    "class_diffusion": class_diffusion,
}


@dataclass(frozen=True)
class Objective:
    """A named objective with its options bound; call it with a `Step`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, step: Step) -> Terms:
        return OBJECTIVES[self.name](step, **self.options)

    def option(self, name: str) -> Any:
        """The value of an option that the objective takes, given or its default; 0 if it takes none of that name."""
        parameter = inspect.signature(OBJECTIVES[self.name]).parameters.get(name)
        return self.options.get(name, 0 if parameter is None else parameter.default)

    @property
    def reads_class_pictures(self) -> bool:
        """Whether the step must hold a `PriorBatch`."""
        return self.option("prior_weight") > 0

    @property
    def reads_anchor(self) -> bool:
        """Whether what the pretrained network predicts of the class is read."""
        pretrained = self.option("w") > 0 and self.option("anchor") != "current"
        return pretrained or self.option("class_weight") > 0

    @property
    def trains_class(self) -> bool:
        """Whether a prediction of the class prompt is trained too."""
        return self.reads_class_pictures or self.option("class_weight") > 0

    @property
    def reads_unconditional(self) -> bool:
        """Whether the empty prompt is predicted too."""
        return self.option("sude_weight") > 0

    @property
    def reads_pooled(self) -> bool:
        """Whether the step's texts must hold the pooled class prompt."""
        return self.option("semantic_weight") > 0

    def check(self, prediction_type: str) -> None:
        """ValueError if the objective has no meaning for such a model."""
        if self.reads_unconditional and prediction_type == "flow":
            raise ValueError(
                f"objective is {self.name!r}, which reads the posterior of a discrete diffusion, but a flow model has "
                "none; take anchor or prior_preservation"
            )


def option_names(name: str) -> tuple[str, ...]:
    """The options that the objective `name` takes, in order."""
    check_choice("objective", name, OBJECTIVES)
    return tuple(inspect.signature(OBJECTIVES[name]).parameters)[1:]


def make_objective(name: str, **options: Any) -> Objective:
    """The objective `name` with its options; ValueError for an unknown name or option, listing the known ones."""
    known = option_names(name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"objective {name!r} has no option {option!r}, but it takes {', '.join(known) if known else 'none'}"
            )
    for option, value in options.items():
        if option == "anchor":
            check_choice("anchor", value, ANCHORS)
        else:
            check_number(option, value, minimum=0)
    return Objective(name, options)


def lambda_from_w(w: float) -> float:
    """lambda = 1 / (1 + w), the share of the references in the blended target; in (0, 1]."""
    return 1.0 / (1.0 + check_number("w", w, minimum=0))


def w_from_lambda(lam: float) -> float:
    """w = (1 - lambda) / lambda, for lambda in (0, 1]."""
    if check_number("lambda", lam, above=0) > 1:
        raise ValueError(f"lambda is {lam!r}, but it takes a number greater than 0 and at most 1")
    return (1.0 - lam) / lam


def matched_learning_rate(learning_rate: float, w: float) -> float:
    """(1 + w) * learning_rate: what the learning rate of a control without the anchor's factor has to be.

    The gradient of Eq. 5 is 1 + w times that of its blended target, so w scales the step as well as moving the
    target. Under plain gradient descent, `blended_target` at this learning rate takes exactly the steps of Eq. 5 at
    `learning_rate`, and `reconstruction` at this learning rate is the control that shows what larger steps alone do.
    Adam divides by the gradient's own size, so there the factor cancels, but for its epsilon and for clipping:
    clipping Eq. 5's gradient at norm c clips the blended target's at c / (1 + w). An ablation over w therefore needs
    both controls: the same learning rate and this one.
    """
    return (1.0 + check_number("w", w, minimum=0)) * check_number("learning_rate", learning_rate, above=0)
