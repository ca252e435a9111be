from __future__ import annotations

import math

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.objectives import (
    OBJECTIVES,
    blended_target,
    lambda_from_w,
    make_objective,
    matched_learning_rate,
    mse,
    prior_preservation,
    reconstruction,
    semantic_anchoring,
    w_from_lambda,
)

WS = (0.0, 0.25, 0.5, 0.75, 1.0)


def predictions(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(count)]


def gradients(adapter, terms) -> list[torch.Tensor]:
    return torch.autograd.grad(sum(terms.values()), adapter.parameters())


@pytest.mark.parametrize(("w", "lam"), [(0, 1), (0.25, 0.8), (0.5, 2 / 3), (0.75, 4 / 7), (1, 0.5)])
def test_lambda_is_one_over_one_plus_w(w, lam):
    assert lambda_from_w(w) == pytest.approx(lam, rel=1e-15)
    assert w_from_lambda(lambda_from_w(w)) == pytest.approx(w, abs=1e-15)


@pytest.mark.parametrize("w", WS)
def test_equation_4(w):
    """|lam r + (1 - lam) f - e|^2 = lam (|e - r|^2 + w |e - f|^2) - lam (1 - lam) |r - f|^2."""
    r, f, e = predictions(3)
    lam = lambda_from_w(w)
    left = mse(lam * r + (1 - lam) * f, e)
    right = lam * (mse(e, r) + w * mse(e, f)) - lam * (1 - lam) * mse(r, f)
    assert left.item() == pytest.approx(right.item(), rel=1e-13)


@pytest.mark.parametrize("w", WS)
def test_minimum_of_equation_5_is_the_blended_target(w):
    r, f, e = predictions(3)
    e = ((r + w * f) / (1 + w)).requires_grad_()
    (gradient,) = torch.autograd.grad(mse(e, r) + w * mse(e, f), e)
    assert gradient.abs().max() < 1e-16


@pytest.mark.parametrize("w", WS)
@pytest.mark.parametrize("space", ["v", "flow", "x0"])
def test_equation_5_differs_between_spaces_by_one_shared_factor(space, w):
    """dv = deps / alpha, du = deps / (1 - sigma), dx0 = -sigma/alpha deps, at one z_t."""
    z0, eps, predicted, anchor = predictions(4)
    sigma = torch.linspace(0.1, 0.9, 5, dtype=torch.float64).view(-1, 1, 1, 1)
    alpha = 1 - sigma if space == "flow" else (1 - sigma**2).sqrt()
    z_t = alpha * z0 + sigma * eps

    def native(e):
        x0 = (z_t - sigma * e) / alpha
        return {"v": alpha * e - sigma * x0, "flow": e - x0, "x0": x0}[space]

    scale = {"v": 1 / alpha, "flow": 1 / (1 - sigma), "x0": -sigma / alpha}[space]
    torch.testing.assert_close(native(predicted) - native(anchor), scale * (predicted - anchor))
    torch.testing.assert_close(native(eps), {"v": alpha * eps - sigma * z0, "flow": eps - z0, "x0": z0}[space])
    for row in range(5):
        factor = scale[row].item() ** 2
        native_loss = mse(native(predicted)[row], native(eps)[row]) + w * mse(
            native(predicted)[row], native(anchor)[row]
        )
        eps_loss = mse(predicted[row], eps[row]) + w * mse(predicted[row], anchor[row])
        assert native_loss.item() == pytest.approx(factor * eps_loss.item(), rel=1e-12)
    blended = (native(eps) + w * native(anchor)) / (1 + w)
    torch.testing.assert_close(blended, native((eps + w * anchor) / (1 + w)))


def test_backend_epsilon_scale_is_the_factor_between_native_and_epsilon(denoiser, make_step):
    step = make_step(denoiser)
    with torch.no_grad():
        native, target = step.subject, step.target
    cumulative = denoiser.scheduler.alphas_cumprod[step.timesteps].view(-1, 1, 1, 1)
    if denoiser.prediction_type == "v_prediction":
        epsilon = (1 - cumulative).sqrt() * step.noisy + cumulative.sqrt() * native
    else:
        epsilon = native
    scale = denoiser.epsilon_scale(step.timesteps).view(-1, 1, 1, 1)
    torch.testing.assert_close(scale * (native - target), epsilon - step.noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("w", [0.25, 0.5, 1.0])
def test_gradient_of_equation_5_is_one_plus_w_times_that_of_the_blended_target(denoiser, make_step, stir, w):
    adapter = denoiser.attach(AdapterConfig(rank=2))
    stir(adapter)
    two_terms = gradients(adapter, semantic_anchoring(make_step(denoiser), w=w))
    one_term = gradients(adapter, blended_target(make_step(denoiser), w=w))
    for two, one in zip(two_terms, one_term, strict=True):
        torch.testing.assert_close(two, (1 + w) * one, rtol=1e-3, atol=1e-5 * float(two.abs().max()) + 1e-9)


def test_equation_5_is_blended_loss_times_one_plus_w_plus_a_constant(denoiser, make_step, stir):
    stir(denoiser.attach(AdapterConfig(rank=2)))
    step, w = make_step(denoiser), 0.5
    with torch.no_grad():
        two = sum(semantic_anchoring(step, w=w).values())
        one = sum(blended_target(step, w=w).values())
        constant = lambda_from_w(w) * w * mse(step.target, step.anchor)
    torch.testing.assert_close(two, (1 + w) * one + constant)


def test_w_0_is_reconstruction_exactly(denoiser, make_step, stir):
    adapter = denoiser.attach(AdapterConfig(rank=2))
    stir(adapter)
    plain = reconstruction(make_step(denoiser))
    anchored = semantic_anchoring(make_step(denoiser), w=0)
    assert torch.equal(plain["reconstruction"], sum(anchored.values()))
    for one, other in zip(gradients(adapter, plain), gradients(adapter, anchored), strict=True):
        assert torch.equal(one, other)


def test_anchor_pass_builds_no_graph_and_ignores_the_adapter(denoiser, make_step, stir):
    untouched = make_step(denoiser).anchor
    stir(denoiser.attach(AdapterConfig(rank=2)))
    step = make_step(denoiser)
    assert step.subject.requires_grad
    assert not step.anchor.requires_grad and step.anchor.grad_fn is None
    assert torch.equal(step.anchor, untouched)
    assert not step.current_anchor.requires_grad
    assert not torch.equal(step.current_anchor, untouched)


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("reconstruction", {}, 1),
        ("anchor", {"w": 0.5}, 2),
        ("anchor", {"w": 0.5, "anchor": "current"}, 2),
        ("anchor", {"w": 0}, 1),
        ("anchor", {"w": 0.5, "class_weight": 0.5}, 3),
        ("anchor", {"w": 0, "class_weight": 0.5}, 3),
        ("prior_preservation", {}, 2),
        ("prior_preservation", {"prior_weight": 0}, 1),
        ("blended_target", {"w": 0.5}, 2),
        ("blended_target", {"w": 0}, 1),
        ("sude", {}, 4),
        ("sude", {"prior_weight": 0}, 3),
        ("sude", {"prior_weight": 0, "sude_weight": 0}, 1),
        ("class_diffusion", {"semantic_weight": 0}, 1),
    ],
)
def test_an_objective_pays_for_the_passes_that_it_reads(eps_denoiser, make_step, name, options, passes):
    eps_denoiser.attach(AdapterConfig(rank=2))
    step = make_step(eps_denoiser, prior=True)
    calls = []
    eps_denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    terms = make_objective(name, **options)(step)
    assert all(term.ndim == 0 and math.isfinite(term.detach()) for term in terms.values())
    assert len(calls) == passes


def test_prior_preservation_weighs_its_second_term(eps_denoiser, make_step):
    step = make_step(eps_denoiser, prior=True)
    with torch.no_grad():
        terms = prior_preservation(step, prior_weight=0.3)
        expected = mse(step.prior_prediction, step.prior_target)
    torch.testing.assert_close(terms["prior"], 0.3 * expected)


def test_prior_preservation_without_class_pictures_says_so(eps_denoiser, make_step):
    with pytest.raises(ValueError, match="class pictures"):
        prior_preservation(make_step(eps_denoiser))


def test_matched_learning_rate_takes_the_steps_of_equation_5(eps_denoiser, make_step, stir):
    """Plain gradient descent on the blended target at the matched rate lands where Eq. 5 lands."""
    w, rate, ends = 0.5, 0.1, []
    assert matched_learning_rate(rate, w) == pytest.approx(0.15)
    for objective, learning_rate in ((semantic_anchoring, rate), (blended_target, matched_learning_rate(rate, w))):
        adapter = eps_denoiser.attach(AdapterConfig(rank=2))
        stir(adapter)
        optimiser = torch.optim.SGD(adapter.parameters(), lr=learning_rate)
        for _ in range(3):
            optimiser.zero_grad()
            sum(objective(make_step(eps_denoiser), w=w).values()).backward()
            optimiser.step()
        ends.append(adapter.state_dict())
        eps_denoiser.detach()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("w", [-0.1, math.nan, math.inf, "0.5", True, None])
def test_bad_w_is_named(w):
    with pytest.raises(ValueError, match=r"^w is .* takes a finite number of at least 0$"):
        make_objective("anchor", w=w)


def test_unknown_objective_lists_the_known_ones():
    with pytest.raises(ValueError, match="objective is 'anchors'.*" + ".*".join(OBJECTIVES)):
        make_objective("anchors")
    with pytest.raises(ValueError, match="no option 'w'"):
        make_objective("reconstruction", w=1)
    with pytest.raises(ValueError, match="anchor is 'frozen'.*pretrained, current"):
        make_objective("anchor", anchor="frozen")


@pytest.mark.parametrize("lam", [0, -1, 1.5, math.nan])
def test_bad_lambda_is_named(lam):
    with pytest.raises(ValueError, match="^lambda is"):
        w_from_lambda(lam)


def test_masks_and_weights_take_each_rows_own_mean():
    prediction, target = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    masks = torch.zeros(2, 1, 3, 3)
    masks[0, :, :2], masks[1, :, 1, 1] = 1, 0.5
    weights = torch.tensor([3.0, 0.25])
    error = (prediction - target).square()
    rows = torch.stack([error[0, :, :2].mean(), error[1, :, 1, 1].mean()])
    torch.testing.assert_close(mse(prediction, target, weights, masks), (weights * rows).mean())
    torch.testing.assert_close(mse(prediction, target, torch.ones(2), torch.ones(2, 1, 3, 3)), mse(prediction, target))


def test_weights_and_masks_keep_the_gradient_identity_of_eq_5(eps_denoiser, concept, latents, stir):
    from anchor_core.denoiser import Step

    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    stir(adapter)
    masks = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    subject, class_ = ([eps_denoiser.encode_prompt(p)] * 3 for p in (concept.subject_prompt, concept.class_prompt))
    gradients = []
    for objective in (semantic_anchoring, blended_target):
        step = Step(
            eps_denoiser, latents, latents.flip(0), torch.tensor([20, 400, 900]), subject, class_,
            weights=torch.tensor([0.5, 2.0, 1.0]), masks=masks,
        )  # fmt: skip
        gradients.append(torch.autograd.grad(sum(objective(step, w=0.7).values()), adapter.parameters()))
    for full, blended in zip(*gradients):
        torch.testing.assert_close(full, 1.7 * blended, rtol=1e-4, atol=1e-8)
