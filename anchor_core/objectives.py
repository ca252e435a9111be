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

from torch import Tensor

from .checks import check_choice, check_number
from .denoiser import Step

Terms = dict[str, Tensor]

ANCHORS = ("pretrained", "current")


def mse(prediction: Tensor, target: Tensor, weights: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
    """Mean squared error of (B, C, h, w) in float32 or better: the mean over the rows of each row's own mean.

    `weights` (B,) multiplies each row's error; `masks` (B, 1, h, w) says where a row's error is taken.
    """
    if prediction.element_size() < 4:
        prediction = prediction.float()
    error = (prediction - target.to(prediction.dtype)).square()
    if masks is not None:
        error = error * (masks / masks.mean(dim=(1, 2, 3), keepdim=True)).to(error.dtype)
    if weights is not None:
        error = error * weights.reshape(-1, *[1] * (error.ndim - 1)).to(error.dtype)
    return error.mean()


def _error(step: Step, prediction: Tensor, target: Tensor) -> Tensor:
    return mse(prediction, target, step.weights, step.masks)


def reconstruction(step: Step) -> Terms:
    """|eps - eps_theta(z_t, c_sbj, t)|^2 (Semantic Anchoring, Eq. 1). One pass."""
    return {"reconstruction": _error(step, step.subject, step.target)}


def prior_preservation(step: Step, weight: float = 1.0) -> Terms:
    """Eq. 1 + weight * |eps' - eps_theta(z_t'^cls, c_cls, t')|^2 (DreamBooth; Semantic Anchoring, Eq. 2).

    The class pictures come with noise and timesteps of their own. Two passes; one at weight 0.
    """
    terms = reconstruction(step)
    if check_number("prior_weight", weight, minimum=0) > 0:
        terms["prior"] = weight * mse(step.prior_prediction, step.prior_target, step.prior.weights)
    return terms


def semantic_anchoring(step: Step, w: float = 0.5, anchor: str = "pretrained") -> Terms:
    """|eps - eps_theta(z_t, c_sbj, t)|^2 + w * |eps_theta(z_t, c_sbj, t) - eps_theta'(z_t, c_cls, t)|^2 (Eq. 5).

    theta' is the pretrained network, which is this network with the adapter off. `anchor="current"` takes theta
    itself instead, without gradient: the ablation of Fig. 6 and 7. Two passes, the second without a graph; one at
    w = 0, where Eq. 5 is Eq. 1.
    """
    check_choice("anchor", anchor, ANCHORS)
    terms = reconstruction(step)
    if check_number("w", w, minimum=0) > 0:
        target = step.anchor if anchor == "pretrained" else step.current_anchor
        terms["anchor"] = w * _error(step, step.subject, target)
    return terms


def blended_target(step: Step, w: float = 0.5) -> Terms:
    """|eps* - eps_theta(z_t, c_sbj, t)|^2 with eps* = (eps + w * eps_theta'(z_t, c_cls, t)) / (1 + w).

    The single-target form of Eq. 5 (by Eq. 4): its gradient is that of Eq. 5 divided by 1 + w. It serves as the
    control that has the anchor's target without the anchor's larger gradient.
    """
    check_number("w", w, minimum=0)
    target = step.target if w == 0 else (step.target + w * step.anchor) / (1 + w)
    return {"blended": _error(step, step.subject, target)}


OBJECTIVES: dict[str, Callable[..., Terms]] = {
    "reconstruction": reconstruction,
    "prior_preservation": prior_preservation,
    "anchor": semantic_anchoring,
    "blended_target": blended_target,
}


@dataclass(frozen=True)
class Objective:
    """A named objective with its options bound; call it with a `Step`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, step: Step) -> Terms:
        return OBJECTIVES[self.name](step, **self.options)

    @property
    def reads_class_pictures(self) -> bool:
        """Whether the step must hold a `PriorBatch`."""
        return self.name == "prior_preservation" and self.options.get("weight", 1.0) > 0


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
    for option in ("w", "weight"):
        if option in options:
            check_number("prior_weight" if option == "weight" else option, options[option], minimum=0)
    if "anchor" in options:
        check_choice("anchor", options["anchor"], ANCHORS)
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
