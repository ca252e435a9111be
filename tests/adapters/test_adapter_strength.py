"""Strengths of single rows, and early checkpoints, on the networks of each architecture and for every kind."""

from __future__ import annotations

import pytest
import torch

from anchor_core.adapters.attach import read_early
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter, to_file_keys
from anchor_core.adapters.kinds import KINDS
from tests.backends import tiny_models
from tests.comfyui import contract

STRENGTHS = (1.0, 0.0, 0.3, -1.5)
ATTENTION = r"attn\d?\.to_[qkv]$"


@pytest.fixture(scope="module", params=tiny_models.BUILDERS)
def denoiser(request, tmp_path_factory):
    return tiny_models.denoiser_of(tiny_models.build(request.param, tmp_path_factory.mktemp("parts")))


def predict(denoiser):
    """Four rows of one latent, timestep and prompt: (4, C, h, w)."""
    noisy = contract.draw(denoiser, tiny_models.LATENT, rows=1).expand(4, -1, -1, -1)
    condition = denoiser.encode_prompt("a photo of a sks dog")
    with torch.no_grad():
        return denoiser.predict(noisy, contract.times(denoiser, (0.5,)).expand(4), [condition] * 4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_rows_that_differ_in_strength_alone_differ(denoiser, kind):
    """In every linear and convolution layer of every architecture: each runs the rows of the batch."""
    if kind == "dora" and denoiser.architecture.startswith(("flux", "stable-diffusion-v3")):
        layers = "all_linear"  # their patch convolutions have rows of zero weight in a tiny model
    else:
        layers = "all_linear_conv"
    untouched = predict(denoiser)
    with contract.attached(denoiser, layers, kind=kind) as adapter:
        adapted = predict(denoiser)
        with adapter.scaled(torch.tensor(STRENGTHS)):
            rows = predict(denoiser)
        torch.testing.assert_close(rows[0], adapted[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(rows[1], untouched[1], rtol=0, atol=1e-5)
        for i, strength in enumerate(STRENGTHS):
            with adapter.scaled(strength):
                torch.testing.assert_close(rows[i], predict(denoiser)[i], rtol=1e-4, atol=1e-4)
            assert all((rows[i] - rows[j]).abs().max() > 1e-3 for j in range(i)), "two strengths give the same"
        assert torch.equal(predict(denoiser), adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_strengths_a_row(eps_denoiser, stir, kind):
    layers = ATTENTION if kind == "oft" else r"attn\d?\.to_[qkv]$|resnets\.0\.conv1$|time_emb_proj$"
    untouched = predict(eps_denoiser)
    adapter = eps_denoiser.attach(AdapterConfig(rank=4, kind=kind, layers=layers))
    stir(adapter)
    adapted = predict(eps_denoiser)
    with adapter.scaled(torch.tensor(STRENGTHS)):
        rows = predict(eps_denoiser)
    # lerp is exact at both ends, and so is what comes before it
    torch.testing.assert_close(rows[0], adapted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(rows[1], untouched[1], rtol=0, atol=1e-5)
    assert (adapted[0] - untouched[0]).abs().max() > 1e-3
    for i, strength in enumerate(STRENGTHS):
        with adapter.scaled(strength):
            torch.testing.assert_close(rows[i], predict(eps_denoiser)[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_runs_once_where_the_kind_leaves_the_input_alone(eps_denoiser, stir, kind):
    adapter = eps_denoiser.attach(AdapterConfig(rank=4, kind=kind, layers=r"mid_block.*attn2\.to_k$"))
    stir(adapter)
    (name,), runs = adapter.module_names, []
    hook = adapter.base_module(name).register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), adapter.scaled(0.5):
        adapter.layer(name)(torch.ones(2, 3, adapter.base_module(name).in_features))
    hook.remove()
    assert len(runs) == (2 if kind == "oft" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_early_checkpoint(eps_denoiser, stir, kind):
    adapter = eps_denoiser.attach(AdapterConfig(rank=4, alpha=2, kind=kind, layers=ATTENTION))
    stir(adapter)
    early = adapter.state_dict()
    early = {name: tensor * 1.5 if name.endswith("alpha") else tensor for name, tensor in early.items()}
    adapter.load_state_dict(early)
    expected = predict(eps_denoiser)
    with adapter.scaled(0.3):
        weakened = predict(eps_denoiser)
    stir(adapter, seed=8)
    if KINDS[kind].alpha:
        adapter.load_state_dict({name: t / 1.5 if "alpha" in name else t for name, t in adapter.state_dict().items()})
    late, state = predict(eps_denoiser), adapter.state_dict()
    assert (late - expected).abs().max() > 1e-3
    adapter.hold_early(early)
    assert torch.equal(predict(eps_denoiser), late)
    with adapter.scaled(1.0, early=True):
        torch.testing.assert_close(predict(eps_denoiser), expected, rtol=1e-4, atol=1e-4)
    with adapter.scaled(torch.tensor([1.0, 1.0, 0.3, 0.0]), early=torch.tensor([False, True, True, True])):
        rows = predict(eps_denoiser)
    with adapter.disabled():
        untouched = predict(eps_denoiser)
    for row, whole in zip(rows, (late, expected, weakened, untouched)):
        torch.testing.assert_close(row, whole[0], rtol=1e-4, atol=1e-4)
    after = adapter.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_a_strength_inside_another_multiplies_it(eps_denoiser, stir):
    adapter = eps_denoiser.attach(AdapterConfig(rank=4))
    stir(adapter)
    with adapter.scaled(0.2):
        expected = predict(eps_denoiser)
    with adapter.scaled(0.5):
        half = predict(eps_denoiser)
        with adapter.scaled(torch.full((4,), 0.4)):
            torch.testing.assert_close(predict(eps_denoiser), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(predict(eps_denoiser), half)
    eps_denoiser.detach()
    assert not any(module._forward_hooks for module in eps_denoiser.network.modules())


def test_strengths_that_do_not_fit_are_refused(eps_denoiser):
    adapter = eps_denoiser.attach(AdapterConfig(rank=4))
    with pytest.raises(ValueError, match=r"^strength is \(2, 2\), but it takes a number, or one for each row"):
        with adapter.scaled(torch.ones(2, 2)):
            pass
    with pytest.raises(ValueError, match="^strength is of 3 rows, but layer down_blocks.* runs 4; give one a row"):
        with adapter.scaled(torch.ones(3)):
            predict(eps_denoiser)
    with pytest.raises(ValueError, match="^early is true, but the adapter holds no early checkpoint"):
        with adapter.scaled(1.0, early=torch.tensor([False, True])):
            pass
    state = adapter.state_dict()
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"^the early checkpoint does not fit the attached adapter: {name} is missing"):
        adapter.hold_early({key: tensor for key, tensor in state.items() if key != name})
    assert not adapter.holds_early
    assert not any(module._forward_hooks for module in eps_denoiser.network.modules())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_early_checkpoint_is_read_from_a_file(eps_denoiser, stir, tmp_path, kind):
    from anchor_core.training.checkpoint import Checkpoints

    adapter = eps_denoiser.attach(AdapterConfig(rank=4, kind=kind, layers=ATTENTION))
    stir(adapter)
    state = adapter.state_dict()
    save_adapter(tmp_path / "early.safetensors", to_file_keys(adapter, eps_denoiser.file_keys()), {})
    checkpoint = Checkpoints(tmp_path).save(5, {"adapter": state})
    eps_denoiser.detach()
    for file in (tmp_path / "early.safetensors", checkpoint):
        early = read_early(eps_denoiser, file)
        assert eps_denoiser.adapter is None and early.keys() == state.keys()
        assert all(torch.allclose(early[name], tensor) for name, tensor in state.items())
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.ckpt is not a readable checkpoint"):
        read_early(eps_denoiser, tmp_path / "broken.ckpt")
