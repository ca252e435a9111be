"""An adapter on a network: nothing at its start, what its strength does, and off without a trace."""

from __future__ import annotations

import math

import pytest
import torch

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.kinds import KINDS
from anchor_core.adapters.layers import LAYERS
from tests.adapters.networks import predict, snapshot

LINEAR_PARTS = "attention_feed_forward"  # every kind takes it; OFT takes no 3 x 3 convolution


@pytest.mark.parametrize("layers", [*LAYERS, r"attn2\.to_v$", r"resnets\.0\.conv1$"])
def test_a_new_adapter_has_no_effect_and_a_trained_one_can_be_switched_off_exactly(denoiser, make_step, stir, layers):
    untouched = predict(denoiser, make_step)
    adapter = denoiser.attach(AdapterConfig(rank=2, layers=layers))
    assert torch.equal(predict(denoiser, make_step), untouched)
    stir(adapter)
    assert not torch.equal(predict(denoiser, make_step), untouched)
    with adapter.disabled():
        assert not adapter.enabled
        assert torch.equal(predict(denoiser, make_step), untouched)
    with denoiser.adapter_disabled():
        assert torch.equal(predict(denoiser, make_step), untouched)
    assert adapter.enabled
    assert not torch.equal(predict(denoiser, make_step), untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_without_effect_and_comes_off_exactly(eps_denoiser, make_step, stir, kind, dtype):
    eps_denoiser.network.to(dtype)
    step = make_step(eps_denoiser)
    text = torch.cat([condition.view(1, -1, 32) for condition in step.subject_conditions]).to(dtype)

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return eps_denoiser.network(step.noisy.to(dtype), step.timesteps, text).sample

    modules, untouched = dict(eps_denoiser.network.named_modules()), predict()
    layers = LINEAR_PARTS if kind == "oft" else "all_linear_conv"
    adapter = eps_denoiser.attach(AdapterConfig(rank=4, kind=kind, layers=layers))
    assert torch.equal(predict(), untouched)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in adapter.parameters())
    stir(adapter)
    assert not torch.equal(predict(), untouched)
    with adapter.disabled():
        assert torch.equal(predict(), untouched)
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    with adapter.scaled(0):
        assert torch.equal(predict(), untouched)
    eps_denoiser.detach()
    assert dict(eps_denoiser.network.named_modules()) == modules
    assert torch.equal(predict(), untouched)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(eps_denoiser, make_step, kind):
    adapter = eps_denoiser.attach(AdapterConfig(rank=4, kind=kind, layers=LINEAR_PARTS))
    optimiser, losses = torch.optim.SGD(adapter.parameters(), lr=1.0), []
    for _ in range(3):
        step = make_step(eps_denoiser)
        loss = (step.subject - step.target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_strength_interpolates_the_weights_of_every_kind(eps_denoiser, stir, kind):
    # OFT takes no such convolution, and full trains its bias as well, which the formula below leaves out.
    plain = kind in ("oft", "full")
    layers = r"mid_block.*attn2\.to_k$" if plain else r"mid_block.*(attn2\.to_k|resnets\.0\.conv1)$"
    adapter = eps_denoiser.attach(AdapterConfig(rank=4, alpha=2, kind=kind, layers=layers))
    stir(adapter)
    for name in adapter.module_names:
        layer, base = adapter.layer(name), adapter.base_module(name)
        weight = base.weight.detach()
        rows = weight.shape[1]
        x = torch.randn(2, rows, *((5, 5) if weight.dim() == 4 else ()), generator=torch.Generator().manual_seed(0))
        adapted = _materialised(layer, weight)
        for strength in (1.0, 0.3, -2.0):
            blend = {"weight": weight + strength * (adapted - weight)}
            with torch.no_grad(), adapter.scaled(strength):
                expected = torch.func.functional_call(base, blend, x)
                torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
        assert not layer._forward_hooks and not base._forward_hooks


def _materialised(layer, weight: torch.Tensor) -> torch.Tensor:
    """The adapted weight as a matrix product with the identity, patch by patch for a convolution."""
    count = weight[0].numel()
    patches = torch.eye(count).view(count, *weight.shape[1:])  # one kernel-sized input for each entry of a row
    with torch.no_grad():
        zero = torch.zeros_like(patches[:1])
        made = layer(patches) - layer(zero)
    centre = made if weight.dim() == 2 else made[:, :, made.shape[2] // 2, made.shape[3] // 2]
    return centre.T.reshape(weight.shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 33}, r"^rank is 33, but layer down_blocks\.1\..*attn2\.to_k is 32 wide"),
        ({"rank": 33, "kind": "dora"}, "^rank is 33, but layer .* is 32 wide"),
        ({"rank": 5, "kind": "oft"}, "^rank is 5, but for oft it is the number of blocks .* takes 64 channels"),
        ({"rank": 64, "kind": "oft"}, "^rank is 64, but for oft"),
        (
            {"rank": 4, "kind": "oft", "layers": "conv1$"},
            "^kind is 'oft', which takes linear layers .* selects .*conv1",
        ),
    ],
)
def test_a_layer_that_is_too_narrow_is_named_and_nothing_is_left(eps_denoiser, options, message):
    eps_denoiser.network.conv_in.weight.requires_grad_(True)
    before = snapshot(eps_denoiser.network)
    with pytest.raises(ValueError, match=message):
        eps_denoiser.attach(AdapterConfig(**options))
    assert [entry[:3] for entry in snapshot(eps_denoiser.network)] == [entry[:3] for entry in before]
    assert eps_denoiser.adapter is None


def test_dora_refuses_a_row_without_direction():
    network = torch.nn.Sequential(torch.nn.Linear(8, 8))
    torch.nn.init.zeros_(network[0].weight[3])
    with pytest.raises(ValueError, match="^kind is 'dora', but layer 0 has output rows of zero weight"):
        Adapter.attach({"": network}, AdapterConfig(rank=2, kind="dora", layers="."))


def test_an_adapter_that_fails_half_way_leaves_nothing():
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    network[1].weight = torch.nn.Parameter(network[1].weight.detach().to(torch.float8_e4m3fn))  # DoRA cannot add to it
    modules, before = dict(network.named_modules()), snapshot(network)
    with pytest.raises(RuntimeError):
        Adapter.attach({"": network}, AdapterConfig(rank=2, kind="dora", layers="."))
    assert dict(network.named_modules()) == modules and not hasattr(network, "peft_config")
    assert [entry[:3] for entry in snapshot(network)] == [entry[:3] for entry in before]


def test_switching_off_survives_an_exception_and_nests(eps_denoiser, stir):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    with pytest.raises(KeyError), adapter.disabled(), adapter.disabled():
        raise KeyError
    assert adapter.enabled
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_strength_0_is_the_base_and_strength_scales_the_update(eps_denoiser, make_step, stir):
    untouched = predict(eps_denoiser, make_step)
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    stir(adapter)
    full = predict(eps_denoiser, make_step)
    with adapter.scaled(0):
        assert torch.equal(predict(eps_denoiser, make_step), untouched)
    with adapter.scaled(0.5):
        half = predict(eps_denoiser, make_step)
    assert torch.equal(predict(eps_denoiser, make_step), full)
    with torch.no_grad():
        for up in adapter.parameters()[1::2]:
            up.mul_(0.5)
    torch.testing.assert_close(predict(eps_denoiser, make_step), half)


def test_the_update_is_alpha_over_rank_times_up_times_down(eps_denoiser, stir):
    adapter = eps_denoiser.attach(AdapterConfig(rank=4, alpha=2, layers=r"mid_block.*attn2\.to_q$"))
    stir(adapter)
    (name,) = adapter.module_names
    state = adapter.state_dict()
    x = torch.randn(3, state[f"{name}.lora_down.weight"].shape[1], generator=torch.Generator().manual_seed(0))
    base = adapter.base_module(name)
    update = 2 / 4 * state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]
    with torch.no_grad():
        torch.testing.assert_close(eps_denoiser.network.get_submodule(name)(x), base(x) + x @ update.T)


def test_detach_gives_back_the_very_same_network(denoiser, make_step, stir):
    denoiser.network.conv_in.weight.requires_grad_(True)  # what was trainable must be so again
    modules = dict(denoiser.network.named_modules())
    before, untouched = snapshot(denoiser.network), predict(denoiser, make_step)
    stir(denoiser.attach(AdapterConfig(rank=2, layers="all_linear")))
    predict(denoiser, make_step)
    denoiser.detach()
    denoiser.detach()
    after = snapshot(denoiser.network)
    assert [entry[:3] for entry in after] == [entry[:3] for entry in before]
    assert all(torch.equal(one[3], other[3]) for one, other in zip(before, after, strict=True))
    now = dict(denoiser.network.named_modules())
    assert list(now) == list(modules) and all(now[name] is modules[name] for name in modules)
    assert not hasattr(denoiser.network, "peft_config")
    assert torch.equal(predict(denoiser, make_step), untouched)
    assert denoiser.adapter is None
    denoiser.attach(AdapterConfig(rank=2))


def test_only_the_adapter_is_trainable(eps_denoiser):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2))
    trainable = {id(p) for p in eps_denoiser.network.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


# Factors of a layer that do not start the same.
DRAWN = {"lora": 1, "dora": 1, "lokr": 1, "loha": 3, "oft": 0, "full": 0, "svdiff": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_initialisation_depends_on_the_seed_and_the_file_key_alone(eps_denoiser, kind):
    states = []
    for seed, layers, global_seed in ((0, "attention", 1), (0, LINEAR_PARTS, 2), (1, "attention", 1)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        adapter = eps_denoiser.attach(AdapterConfig(rank=16, layers=layers, kind=kind), seed=seed)
        states.append(adapter.state_dict())
        modules = len(adapter.module_names)
        assert torch.equal(torch.get_rng_state(), before)
        eps_denoiser.detach()
    first, more, other = states
    assert all(torch.equal(first[name], more[name]) for name in first)
    drawn = [name for name in first if not torch.equal(first[name], other[name])]
    assert len(drawn) == DRAWN[kind] * modules


def test_a_loras_start_is_that_of_diffusers(eps_denoiser):
    first = eps_denoiser.attach(AdapterConfig(rank=4)).state_dict()
    downs = [name for name in first if name.endswith("lora_down.weight")]
    assert all(not first[name].any() for name in first if name.endswith("lora_up.weight"))
    assert torch.cat([first[name].flatten() for name in downs]).std().item() == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("oft", "full", "svdiff")])
def test_dropout_is_off_outside_its_context(eps_denoiser, make_step, stir, kind):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2, dropout=0.5, kind=kind))
    stir(adapter)
    assert torch.equal(predict(eps_denoiser, make_step), predict(eps_denoiser, make_step))
    with adapter.dropout():
        assert not torch.equal(predict(eps_denoiser, make_step), predict(eps_denoiser, make_step))
    assert torch.equal(predict(eps_denoiser, make_step), predict(eps_denoiser, make_step))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "^rank is 0"),
        ({"rank": 2.5}, "^rank is 2.5"),
        ({"alpha": -1}, "^alpha is -1"),
        ({"alpha": math.nan}, "^alpha is nan"),
        ({"dropout": 1}, "^dropout is 1"),
        ({"layers": ""}, "^layers is ''.*attention"),
        ({"layers": "("}, r"^layers is '\('.*regular expression"),
        ({"kind": "other"}, "^kind is 'other', but it takes one of lora, dora, lokr, loha, oft"),
        ({"kind": "oft", "dropout": 0.1}, "^dropout is 0.1, but with kind 'oft' it takes 0"),
    ],
)
def test_bad_config_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**options)


def test_layers_that_match_nothing_and_a_second_adapter_are_errors(eps_denoiser):
    with pytest.raises(ValueError, match="layers is 'atention', which matches no .* attention, cross_attention_kv"):
        eps_denoiser.attach(AdapterConfig(layers="atention"))
    eps_denoiser.attach(AdapterConfig(rank=1))
    with pytest.raises(ValueError, match="has an adapter already"):
        eps_denoiser.attach(AdapterConfig(rank=1))
    assert eps_denoiser.adapter is not None


def test_state_round_trip_and_mismatch(eps_denoiser, stir):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2, alpha=3))
    stir(adapter)
    state = adapter.state_dict()
    eps_denoiser.detach()
    other = eps_denoiser.attach(AdapterConfig(rank=2))
    name = other.module_names[0]
    for wrong in (
        {key: value for key, value in state.items() if not key.startswith(name)},
        {**state, "nowhere.alpha": torch.tensor(1.0)},
        {**state, f"{name}.lora_up.weight": torch.zeros(1, 2)},
    ):
        before = other.state_dict()
        with pytest.raises(ValueError, match="do not fit the attached adapter"):
            other.load_state_dict(wrong)
        assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    other.load_state_dict(state)
    assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())


def test_attach_works_in_inference_mode(eps_denoiser, make_step):
    """ComfyUI runs its nodes in it."""
    with torch.inference_mode():
        adapter = Adapter.attach(eps_denoiser.network, AdapterConfig(rank=1))
    assert not any(parameter.is_inference() for parameter in adapter.parameters())
