"""What is trained besides LoRAs, in every architecture: whole weights, singular values, rotations, and word vectors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.attach import attach_file, attach_tensors
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import to_file_keys
from anchor_core.adapters.kinds import NAME
from anchor_core.adapters.weight_kinds import FullLayer
from anchor_core.objectives import OBJECTIVES
from anchor_core.training.checkpoint import Checkpoints
from anchor_core.training.saving import save_trained
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train
from tests.backends import tiny_models
from tests.comfyui import contract
from tests.training.parts import CONCEPT, PARTS, predict, run


def test_the_contract_holds_for_whole_networks_and_token_vectors(any_denoiser):
    for options in ({"kind": "full", "layers": "everything"}, {"kind": "none", "vectors": 2}):
        contract.check_detach_restores(any_denoiser, tiny_models.LATENT, **options)
        contract.check_file_keys(any_denoiser, tiny_models.LATENT, **options)
    contract.check_text_encoder_adapter(any_denoiser, tiny_models.LATENT, "everything", kind="full")
    for vectors in (1, 3):
        contract.check_token_vectors(any_denoiser, tiny_models.LATENT, vectors)


def test_everything_is_every_parameter_and_starts_as_it_is(any_denoiser, stir):
    untouched, count = predict(any_denoiser), sum(p.numel() for p in any_denoiser.network.parameters())
    adapter = any_denoiser.attach(AdapterConfig(kind="full", layers="everything"))
    assert sum(parameter.numel() for parameter in adapter.parameters()) == count
    assert torch.equal(predict(any_denoiser), untouched)
    stir(adapter)
    assert not torch.equal(predict(any_denoiser), untouched)
    with adapter.disabled():
        assert torch.equal(predict(any_denoiser), untouched)
    with adapter.scaled(0):
        assert torch.equal(predict(any_denoiser), untouched)
    any_denoiser.detach()
    assert torch.equal(predict(any_denoiser), untouched)


class Products(TorchDispatchMode):
    """Which operations are asked of the kernels, in order: what decides a result's last bits, on any processor."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


def test_whole_weights_are_computed_with_as_the_frozen_ones_are():
    """torch multiplies an input that is not contiguous otherwise for a weight that requires grad."""
    base, pixels = torch.nn.Linear(16, 8).requires_grad_(False), torch.randn(3, 16, 4).transpose(1, 2)
    layer = FullLayer(base)
    with torch.no_grad(), Products() as frozen:
        expected = layer.base_layer(pixels)
    with torch.no_grad(), Products() as trained:
        ours = layer(pixels)
    assert torch.equal(ours, expected)
    assert [name for name in trained.names if "detach" not in name] == frozen.names
    layer(pixels).sum().backward()
    torch.testing.assert_close(layer.trained["weight"].grad, pixels.sum((0, 1)).expand(8, -1))


@pytest.mark.parametrize("part", ["full", "svdiff", "textual_inversion"])
def test_a_file_attaches_again_on_every_architecture(any_denoiser, part, stir):
    stir(any_denoiser.attach(AdapterConfig(**PARTS[part])), size=0.1)
    ours, tensors = predict(any_denoiser), to_file_keys(any_denoiser.adapter, any_denoiser.file_keys())
    any_denoiser.detach()
    assert not torch.allclose(predict(any_denoiser), ours, atol=1e-3)
    attach_tensors(any_denoiser, tensors, token="sks")
    torch.testing.assert_close(predict(any_denoiser), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "layer", [torch.nn.Linear(12, 8), torch.nn.Linear(12, 20), torch.nn.Conv2d(4, 8, 3, padding=1, stride=2)], ids=repr
)
def test_svdiff_shifts_the_singular_values(layer):
    network = torch.nn.Sequential(layer)
    adapter = Adapter.attach(network, AdapterConfig(kind="svdiff", layers="."))
    (shift,) = adapter.parameters()
    with torch.no_grad():
        shift.copy_(torch.linspace(-3, 1, len(shift)))  # some below -S, where the new value is 0
    left, singular, right = torch.linalg.svd(layer.weight.detach().double().flatten(1), full_matrices=False)
    weight = (left @ torch.diag(torch.relu(singular + shift.detach())) @ right).reshape(layer.weight.shape)
    assert (singular + shift.detach() < 0).any()
    x = torch.randn(2, *((12,) if layer.weight.dim() == 2 else (4, 6, 6)))
    expected = torch.func.functional_call(layer, {"weight": weight.float()}, x)
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapter.layer("0").change() + layer.weight, weight.float(), atol=1e-5, rtol=1e-5)


def test_oft_rotates_by_blocks(eps_denoiser, stir):
    adapter = eps_denoiser.attach(AdapterConfig(kind="oft", rank=4))
    stir(adapter)
    for name in adapter.module_names[:6]:
        rotation = adapter.layer(name).get_delta_weight(NAME).detach().double()
        assert not torch.allclose(rotation, torch.eye(len(rotation), dtype=rotation.dtype), atol=1e-2)
        blocks = torch.block_diag(*torch.ones(4, len(rotation) // 4, len(rotation) // 4))
        assert not rotation[blocks == 0].any() and rotation[blocks == 1].all()
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(len(rotation)).double(), atol=1e-5, rtol=0)
        weight = adapter.base_module(name).weight.detach().double()
        torch.testing.assert_close((weight @ rotation.T).norm(dim=1), weight.norm(dim=1), atol=1e-5, rtol=0)


def test_the_first_tokens_key_and_value_take_no_gradient():
    network = torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict({"to_k": torch.nn.Linear(6, 4, bias=False)})})
    options = {"kind": "full", "layers": "cross_attention_kv"}
    adapter = Adapter.attach(network, AdapterConfig(**options, detach_start=True))
    x = torch.randn(2, 5, 6, requires_grad=True)
    y = network["attn2"]["to_k"](x)
    y.sum().backward()
    (weight,) = adapter.parameters()
    torch.testing.assert_close(weight.grad, x.detach()[:, 1:].sum((0, 1)).expand(4, -1))
    assert not x.grad[:, 0].any() and x.grad[:, 1:].all()
    adapter.detach()
    assert not network["attn2"]["to_k"]._forward_hooks
    with pytest.raises(ValueError, match="^detach_start is True, but it goes with layers cross_attention_kv only"):
        AdapterConfig(kind="full", detach_start=True)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_learns_repeats_and_leaves_the_rest_alone(pipelines, part):
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    before = {name: tensor.clone() for name, tensor in denoiser.text_encoder.state_dict().items()}
    adapter, losses = run(denoiser, PARTS[part])
    state = adapter.state_dict()
    denoiser.detach()
    adapter, repeated = run(denoiser, PARTS[part])
    assert repeated == losses and all(torch.equal(state[name], tensor) for name, tensor in adapter.state_dict().items())
    optimiser, losses = torch.optim.Adam(adapter.parameters(), lr=1e-3), []
    for _ in range(3):
        step = contract.make_step(denoiser, tiny_models.LATENT)
        step.subject_conditions = [denoiser.encode_prompt(CONCEPT.subject_prompt, adapted=True)] * 3
        losses.append((step.subject - step.target).square().mean())
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[2] < losses[1] < losses[0]
    denoiser.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.text_encoder.state_dict().items())


def test_a_resumed_training_with_two_learning_rates_makes_the_same_steps(pipelines, tmp_path):
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    part, options = PARTS["lora_with_token"], {"token_learning_rate": 0.1, "ema": 0.5}
    whole, losses = run(denoiser, part, **options)
    state = whole.state_dict()
    denoiser.detach()
    for steps in (2, 4):
        again, resumed = run(denoiser, part, Checkpoints(tmp_path), steps=steps, checkpoint_every=1, **options)
        ended = again.state_dict()
        denoiser.detach()
    assert resumed == losses and all(torch.equal(state[key], tensor) for key, tensor in ended.items())
    slow, _ = run(denoiser, part, **{**options, "token_learning_rate": 1e-4})
    start = denoiser.text_encoder.get_input_embeddings().weight[denoiser.tokenizer("sks").input_ids[1]]
    far, near = ((vectors["te:tokens"] - start).abs().mean() for vectors in (state, slow.state_dict()))
    assert 0 < near < 1e-3 < far
    denoiser.detach()


def test_a_file_of_all_weights_has_the_stock_loaders_names_and_is_read_again(any_denoiser, stir, tmp_path):
    """The stock loader would leave out biases of fused layers, without a word, under diffusers' own names."""
    adapter = any_denoiser.attach(AdapterConfig(kind="full", layers="everything"))
    stir(adapter, size=0.1)
    trained = predict(any_denoiser)
    (file,) = save_trained(tmp_path / "full.safetensors", any_denoiser, CONCEPT, TrainSettings(steps=1))
    any_denoiser.detach()
    prefix = ("lora_unet_", "diffusion_model.")
    assert all(key.startswith(prefix) for key in load_file(file))
    untrained = predict(any_denoiser)
    attach_file(any_denoiser, file)
    again = predict(any_denoiser)
    torch.testing.assert_close(again, trained, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(untrained, trained, atol=1e-2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("part", PARTS)
def test_every_objective_trains_every_part_or_says_why_not(pipelines, part, objective):
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    config = AdapterConfig(**PARTS[part])
    refused = {
        "prior_preservation": ("its own term trains nothing", config.kind == "none"),
        "sude": ("its own term trains nothing", config.kind == "none"),
        "class_diffusion": ("acts on the text side alone", not config.trains_text),
    }
    message, expected = refused.get(objective, ("", False))
    adapter = denoiser.attach(config, seed=1)
    before = adapter.state_dict()
    latents = contract.draw(denoiser, tiny_models.LATENT, 2, seed=5)
    settings = TrainSettings(objective=objective, steps=2, batch_size=2, learning_rate=1e-2)
    try:
        if expected:
            with pytest.raises(ValueError, match=f"^objective is '{objective}'.*{message}"):
                train(denoiser, adapter, latents, CONCEPT, settings, class_latents=latents)
            assert all(torch.equal(before[key], value) for key, value in adapter.state_dict().items())
        else:
            history = train(denoiser, adapter, latents, CONCEPT, settings, class_latents=latents)
            assert len(history.losses) == 2
            assert any(not torch.equal(before[key], value) for key, value in adapter.state_dict().items())
    finally:
        denoiser.detach()
