"""COFT: the constraint of the authors' code, computed here from its formula."""

from __future__ import annotations

import math

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig

EPSILON, RANK = 1e-3, 4


@pytest.fixture
def turned(eps_denoiser):
    """The tiny model with an OFT of random parameters, constrained."""
    adapter = eps_denoiser.attach(AdapterConfig(kind="oft", rank=RANK, coft=EPSILON))
    generator = torch.Generator().manual_seed(0)
    state = adapter.state_dict()
    adapter.load_state_dict({name: torch.randn(part.shape, generator=generator) for name, part in state.items()})
    return eps_denoiser, adapter


def predict(denoiser):
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn((1, 4, 8, 8), generator=generator)
    return denoiser.predict(noisy, torch.tensor([500]), [denoiser.encode_prompt("a photo of a sks dog")])


def full(vector: torch.Tensor) -> torch.Tensor:
    """A block's skew-symmetric matrix of the entries above its diagonal."""
    side = round((1 + math.sqrt(1 + 8 * vector.shape[-1])) / 2)
    matrix = torch.zeros(len(vector), side, side)
    rows, columns = torch.triu_indices(side, side, 1)
    matrix[:, rows, columns] = vector
    return matrix - matrix.transpose(1, 2)


def test_before_each_pass_the_blocks_are_projected_to_the_ball(turned):
    denoiser, adapter = turned
    before = adapter.state_dict()
    predict(denoiser)
    after, some = adapter.state_dict(), 0
    for name, vector in after.items():
        if not name.endswith("oft_R.weight"):
            continue
        free, held = full(before[name]), full(vector)
        side = free.shape[-1]
        radius = EPSILON * side**2 / math.sqrt(RANK)
        norms = free.norm(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(held, free * (radius / norms).clamp(max=1))
        some += 1
    assert some
    predict(denoiser)  # what is in the ball stays
    torch.testing.assert_close(adapter.state_dict(), after)


def test_gradients_of_two_passes_go_through_one_projection(turned):
    denoiser, adapter = turned
    loss = predict(denoiser).square().mean() + predict(denoiser).mean()
    loss.backward()
    gradients = [factor.grad for factor in adapter.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_it_is_an_option_of_oft_alone():
    with pytest.raises(ValueError, match="coft is 0.001, but it takes 0 with kind 'lora'"):
        AdapterConfig(coft=1e-3)
