from __future__ import annotations

import math
import os

import pytest
import torch

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.attach import attach_file, from_file_keys
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import load_adapter, save_adapter, to_file_keys
from anchor_core.adapters.kinds import KINDS
from anchor_core.adapters.layers import LAYERS, exact_layers, matching_modules, matching_names
from anchor_core.adapters.metadata import base_fingerprint
from anchor_core.training.saving import save_trained
from anchor_core.training.settings import TrainSettings

LINEAR_PARTS = "attention_feed_forward"  # every kind takes it; OFT takes no 3 x 3 convolution


def predict(denoiser, make_step) -> torch.Tensor:
    with torch.no_grad():
        return make_step(denoiser).subject


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def snapshot(network) -> list[tuple[str, int, bool, torch.Tensor]]:
    return [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in network.named_parameters()]


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


def test_presets_select_what_they_say(eps_denoiser):
    network = eps_denoiser.network
    attention = set(matching_modules(network, "attention"))
    assert {name.split(".attn")[1][2:] for name in attention} == {"to_q", "to_k", "to_v", "to_out.0"}
    kv = set(matching_modules(network, "cross_attention_kv"))
    assert kv == {name for name in attention if "attn2" in name and name.endswith(("to_k", "to_v"))}
    more = set(matching_modules(network, "attention_feed_forward")) - attention
    assert {name.split(".ff.")[1] for name in more} == {"net.0.proj", "net.2"}
    linear = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(matching_modules(network, "all_linear")) == linear
    outer = {"conv_in", "conv_out"}
    convolutions = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert outer <= convolutions
    assert set(matching_modules(network, "all_linear_conv")) == linear | convolutions - outer


UNET = "input_blocks.1.1.transformer_blocks.0"
COMFYUI = {
    "unet": [
        *(f"{UNET}.attn{i}.{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"{UNET}.ff.net.0.proj", f"{UNET}.ff.net.2", "input_blocks.1.1.proj_in", "time_embed.0", "label_emb.0.0"),
        *("input_blocks.0.0", "input_blocks.1.0.in_layers.2", "input_blocks.1.0.emb_layers.1", "out.2"),
    ],
    "mmdit": [
        *(f"joint_blocks.0.{side}_block.attn.{part}" for side in ("x", "context") for part in ("qkv", "proj")),
        *("joint_blocks.0.x_block.attn2.qkv", "joint_blocks.0.x_block.attn2.proj"),
        *(f"joint_blocks.0.{side}_block.mlp.{part}" for side in ("x", "context") for part in ("fc1", "fc2")),
        *("joint_blocks.0.x_block.adaLN_modulation.1", "t_embedder.mlp.0", "y_embedder.mlp.2", "context_embedder"),
        *("x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    ],
    "flux": [
        *(f"double_blocks.0.{side}_attn.{part}" for side in ("img", "txt") for part in ("qkv", "proj")),
        *("single_blocks.0.linear1", "single_blocks.0.linear2"),
        *(f"double_blocks.0.{side}_mlp.{part}" for side in ("img", "txt") for part in ("0", "2")),
        *("double_blocks.0.img_mod.lin", "single_blocks.0.modulation.lin", "img_in", "time_in.in_layer"),
    ],
}


@pytest.mark.parametrize(
    ("family", "attention", "feed_forward", "outer"),
    [
        ("unet", 8, 2, {"input_blocks.0.0", "out.2"}),
        ("mmdit", 6, 4, {"x_embedder.proj"}),
        ("flux", 6, 4, set()),
    ],
)
def test_presets_select_the_same_in_comfyuis_networks(family, attention, feed_forward, outer):
    names = COMFYUI[family]
    assert matching_names(names, "attention") == names[:attention]
    assert matching_names(names, "attention_feed_forward") == names[: attention + feed_forward]
    assert matching_names(names, "all_linear") == names
    assert set(names) - set(matching_names(names, "all_linear_conv")) == outer
    kv = matching_names(names, "cross_attention_kv")
    assert kv == ([f"{UNET}.attn2.to_k", f"{UNET}.attn2.to_v"] if family == "unet" else [])


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_presets_select_the_same_in_diffusers_transformers(family):
    from tests.adapters.test_adapter_formats import transformer

    network = transformer(family)
    attention = set(matching_modules(network, "attention"))
    joint = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    leaves = {name.split("attn.")[1] for name in attention if ".attn." in name}
    assert leaves == (joint if family == "flux" else joint - {"to_add_out"})  # SD3's last block has no text output
    assert {name for name in attention if ".attn." not in name} == (
        {"single_transformer_blocks.0.proj_out"}
        if family == "flux"
        else {f"transformer_blocks.0.attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    )
    more = set(matching_modules(network, "attention_feed_forward")) - attention
    image = {f"transformer_blocks.0.ff.net.{part}" for part in ("0.proj", "2")}
    text = {name.replace("ff", "ff_context") for name in image}
    assert more == (image | text | {"single_transformer_blocks.0.proj_mlp"} if family == "flux" else image)
    with pytest.raises(ValueError, match="layers is 'cross_attention_kv', but this .* has no cross-attention"):
        matching_modules(network, "cross_attention_kv")


# --- several networks ---------------------------------------------------------------------------------------------


class WithText:
    """A tiny model whose adapter reaches the text encoder, as a backend attaches it."""

    def __init__(self, denoiser):
        self.denoiser, self.adapter, self.architecture = denoiser, None, "stable-diffusion-v1"
        self.networks = {"": denoiser.network, "te": denoiser.text_encoder}
        self.network, self.text_encoders = denoiser.network, {"te": denoiser.text_encoder}
        names = [name for name, part in denoiser.text_encoder.named_modules() if isinstance(part, torch.nn.Linear)]
        inner = {name: name.removeprefix("text_model.").replace(".", "_") for name in names}
        keys = {f"te:{name}": f"lora_te_text_model_{inner[name]}" for name in names}
        self.keys = {**denoiser.file_keys(), **keys}

    def attach(self, config: AdapterConfig, seed: int = 0, vectors=None) -> Adapter:
        networks = self.networks if config.text_encoder else {"": self.networks[""]}
        self.adapter = Adapter.attach(networks, config, seed, self.keys)
        return self.adapter

    def file_keys(self) -> dict[str, str]:
        return self.keys


@pytest.fixture
def with_text(eps_denoiser):
    return WithText(eps_denoiser)


@pytest.fixture
def networks(with_text):
    """The denoising network and its text encoder, and file keys for both."""
    return with_text.networks, with_text.keys


def test_a_file_with_a_text_encoder_attaches_again_and_through_diffusers(
    with_text, model_folders, make_step, stir, tmp_path
):
    from diffusers import StableDiffusionPipeline

    stir(with_text.attach(AdapterConfig(rank=2, alpha=4, text_encoder=True)))
    save_adapter(tmp_path / "lora.safetensors", to_file_keys(with_text.adapter, with_text.keys), {})
    ours = text_states(with_text.networks), predict(with_text.denoiser, make_step)
    with_text.adapter.detach()
    again, _ = attach_file(with_text, tmp_path / "lora.safetensors")
    assert again.config.text_encoder
    assert torch.equal(text_states(with_text.networks), ours[0])
    again.detach()
    pipeline = StableDiffusionPipeline.from_pretrained(
        model_folders["epsilon"], local_files_only=True, safety_checker=None
    )
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    theirs = text_states({"te": pipeline.text_encoder})
    assert not torch.equal(text_states(with_text.networks), ours[0])
    assert (theirs - ours[0]).abs().max() < 1e-4


def text_states(networks) -> torch.Tensor:
    with torch.no_grad():
        return networks["te"](torch.arange(12).view(2, 6)).last_hidden_state


def test_text_encoders_are_adapted_beside_the_network(networks, stir):
    networks, keys = networks
    untouched, modules = text_states(networks), dict(networks["te"].named_modules())
    trainable = next(networks["te"].parameters()).requires_grad_(True)
    adapter = Adapter.attach(networks, AdapterConfig(rank=2, text_encoder=True), 0, keys)
    text = [name for name in adapter.module_names if name.startswith("te:")]
    assert {name.rsplit(".", 1)[1] for name in text} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert len(text) < len(adapter.module_names) and adapter.base_module(text[0]).weight.shape == (32, 32)
    assert {id(p) for network in networks.values() for p in network.parameters() if p.requires_grad} == {
        id(parameter) for parameter in adapter.parameters()
    }
    assert torch.equal(text_states(networks), untouched)
    stir(adapter)
    full = text_states(networks)
    assert not torch.equal(full, untouched)
    with adapter.disabled():
        assert torch.equal(text_states(networks), untouched)
    tensors = to_file_keys(adapter, keys)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in tensors
    state = adapter.state_dict()
    adapter.detach()
    assert dict(networks["te"].named_modules()) == modules and not hasattr(networks["te"], "peft_config")
    assert [p for p in networks["te"].parameters() if p.requires_grad] == [trainable]
    assert torch.equal(text_states(networks), untouched)
    again = Adapter.attach(networks, AdapterConfig(rank=2, layers=exact_layers(list(adapter_names(state)))), 0, keys)
    again.load_state_dict(state)
    assert torch.equal(text_states(networks), full)


def adapter_names(state) -> dict[str, None]:
    return dict.fromkeys(key.removesuffix(".alpha") for key in state if key.endswith(".alpha"))


def test_presets_and_expressions_over_text_encoders(networks):
    networks, keys = networks
    for layers, leaves in (("all_linear", {"fc1", "fc2"}), ("cross_attention_kv", set())):
        adapter = Adapter.attach(networks, AdapterConfig(rank=2, layers=layers), 0, keys)
        text = {name.rsplit(".", 1)[1] for name in adapter.module_names if name.startswith("te:")}
        assert text == {"q_proj", "k_proj", "v_proj", "out_proj"} | leaves
        adapter.detach()
    adapter = Adapter.attach(networks, AdapterConfig(rank=2, layers="^te:.*fc1$"), 0, keys)
    assert all(name.endswith("fc1") for name in adapter.module_names)
    assert not any(parameter.requires_grad for parameter in networks[""].parameters())
    adapter.detach()
    with pytest.raises(ValueError, match="^layers is 'nothing', which matches no linear or convolution module"):
        Adapter.attach(networks, AdapterConfig(layers="nothing"), 0, keys)


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


@pytest.mark.parametrize("layers", list(LAYERS))
def test_file_gives_the_same_output_through_diffusers(
    denoiser, model_folders, make_step, stir, tmp_path, layers, concept
):
    from diffusers import StableDiffusionPipeline

    adapter = denoiser.attach(AdapterConfig(rank=4, alpha=2, layers=layers))
    stir(adapter, size=0.1)
    save_trained(tmp_path / "lora.safetensors", denoiser, concept, TrainSettings())
    ours = predict(denoiser, make_step)
    with denoiser.adapter_disabled():
        untouched = predict(denoiser, make_step)

    pipeline = StableDiffusionPipeline.from_pretrained(
        model_folders[denoiser.prediction_type], local_files_only=True, safety_checker=None
    )
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    step = make_step(denoiser)
    with torch.no_grad():
        theirs = pipeline.unet(step.noisy, step.timesteps, torch.stack(step.subject_conditions)).sample
    assert (ours - untouched).abs().max() > 1e-3
    assert (ours - theirs).abs().max() < 1e-5


def test_file_attaches_again_with_its_metadata(denoiser, make_step, stir, tmp_path, concept):
    adapter = denoiser.attach(AdapterConfig(rank=3, alpha=1.5, layers="attention_feed_forward"))
    stir(adapter)
    settings = TrainSettings(w=0.25, steps=7, seed=5, learning_rate=2e-3)
    path = tmp_path / "new" / "lora.safetensors"
    save_trained(path, denoiser, concept, settings, steps=4)
    ours, fingerprint = predict(denoiser, make_step), base_fingerprint(denoiser)
    denoiser.detach()
    again, metadata = attach_file(denoiser, path)
    assert torch.equal(predict(denoiser, make_step), ours)
    assert (again.config.rank, again.config.alpha) == (3, 1.5)
    assert {name: metadata[f"anchor.{name}"] for name in ("w", "steps", "seed", "learning_rate", "rank", "alpha")} == {
        "w": "0.25",
        "steps": "4",
        "seed": "5",
        "learning_rate": "0.002",
        "rank": "3",
        "alpha": "1.5",
    }
    assert metadata["anchor.subject_prompt"] == concept.subject_prompt
    assert metadata["anchor.class_prompt"] == concept.class_prompt
    assert metadata["anchor.objective"] == "anchor"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert metadata["anchor.layers"] == "attention_feed_forward"
    assert metadata["anchor.base_model"] == fingerprint and len(fingerprint) == 16
    assert list(path.parent.iterdir()) == [path]


def test_keys_are_kohyas(eps_denoiser, tmp_path):
    adapter = eps_denoiser.attach(AdapterConfig(rank=1, layers=r"down_blocks\.1.*attn1\.to_out\.0$"))
    keys = to_file_keys(adapter, eps_denoiser.file_keys())
    prefix = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert set(keys) == {f"{prefix}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    back = from_file_keys(keys, eps_denoiser.file_keys())
    assert back.keys() == adapter.state_dict().keys()
    del keys[f"{prefix}.alpha"]
    assert from_file_keys(keys, eps_denoiser.file_keys())[f"{adapter.module_names[0]}.alpha"] == 1


@pytest.mark.parametrize("stated", [False, True])
def test_a_file_of_diffusers_own_attaches(eps_denoiser, model_folders, make_step, tmp_path, stated):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(
        model_folders["epsilon"], local_files_only=True, safety_checker=None
    )
    config = LoraConfig(r=4, lora_alpha=8 if stated else 4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    metadata = {"unet_lora_adapter_metadata": config.to_dict()} if stated else {}
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **metadata)
    adapter, _ = attach_file(eps_denoiser, next(tmp_path.glob("*.safetensors")))
    step = make_step(eps_denoiser)
    with torch.no_grad():
        theirs = pipeline.unet(step.noisy, step.timesteps, torch.stack(step.subject_conditions)).sample
    torch.testing.assert_close(predict(eps_denoiser, make_step), theirs)
    assert adapter.config.rank == 4 and adapter.config.alpha == (8 if stated else 4)


def test_file_keys_are_the_same_with_an_adapter(eps_denoiser):
    before = eps_denoiser.file_keys()
    eps_denoiser.attach(AdapterConfig(rank=1, layers="all_linear"))
    assert eps_denoiser.file_keys() == before


def test_a_lora_for_another_model_is_one_line_and_leaves_the_network_alone(
    denoiser, model_folders, make_step, tmp_path, concept
):
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

    other = DiffusersDenoiser.from_pretrained(model_folders["other"])
    other.attach(AdapterConfig(rank=2))
    save_trained(tmp_path / "other.safetensors", other, concept, TrainSettings())
    save_adapter(tmp_path / "text.safetensors", {"lora_te_text_model_0.lora_up.weight": torch.zeros(2, 2)}, {})
    save_adapter(tmp_path / "none.safetensors", {}, {"anchor.w": "0.5"})
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors at all")
    before, untouched = snapshot(denoiser.network), predict(denoiser, make_step)
    for name, message in (
        ("other", "made for another model"),
        ("text", "not a whole LoRA: lora_te_text_model_0 lacks lora_down.weight"),
        ("none", "holds no LoRA"),
        ("broken", "not a readable safetensors file"),
        ("missing", "not a readable safetensors file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            attach_file(denoiser, tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value) and name in str(caught.value)
        assert denoiser.adapter is None
    assert [entry[:3] for entry in snapshot(denoiser.network)] == [entry[:3] for entry in before]
    assert torch.equal(predict(denoiser, make_step), untouched)


def test_a_place_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    tensors = {"a.alpha": torch.tensor(1.0)}
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (tmp_path / "file" / "lora.safetensors", tmp_path / "folder.safetensors"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="cannot be written to") as caught:
            save_adapter(path, tensors, {})
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_adapter(path, {"a.alpha": torch.tensor(1.0)}, {"anchor.w": "0.5"})
    with pytest.raises(TypeError):
        save_adapter(path, {"a.alpha": torch.tensor(2.0)}, {"anchor.w": 0.5})  # metadata holds text only
    tensors, metadata = load_adapter(path)
    assert tensors["a.alpha"] == 1 and metadata == {"anchor.w": "0.5"}
    assert list(tmp_path.iterdir()) == [path]


def test_base_fingerprint_tells_models_apart(model_folders, eps_denoiser):
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

    same = DiffusersDenoiser.from_pretrained(model_folders["epsilon"])
    for one in (eps_denoiser, same):
        one.attach(AdapterConfig(rank=1))
    assert base_fingerprint(same) == base_fingerprint(eps_denoiser)
    with torch.no_grad():
        same.adapter.base_module(same.adapter.module_names[0]).weight[0, 0] += 1e-3
    assert base_fingerprint(same) != base_fingerprint(eps_denoiser)


def test_attach_works_in_inference_mode(eps_denoiser, make_step):
    """ComfyUI runs its nodes in it."""
    with torch.inference_mode():
        adapter = Adapter.attach(eps_denoiser.network, AdapterConfig(rank=1))
    assert not any(parameter.is_inference() for parameter in adapter.parameters())
