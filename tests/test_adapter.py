from __future__ import annotations

import math
import os

import pytest
import torch

from anchor_core.adapter import LAYERS, Adapter, AdapterConfig, matching_modules
from anchor_core.adapter_file import (
    attach_file,
    base_fingerprint,
    from_file_keys,
    load_adapter,
    save_adapter,
    save_trained,
    to_file_keys,
)
from anchor_core.trainer import TrainSettings


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


def test_initialisation_depends_on_the_seed_alone(eps_denoiser):
    states = []
    for seed, layers, global_seed in ((0, "attention", 1), (0, "all_linear", 2), (1, "attention", 1)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        states.append(eps_denoiser.attach(AdapterConfig(rank=4, layers=layers), seed=seed).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
        eps_denoiser.detach()
    first, more, other = states
    assert all(torch.equal(first[name], more[name]) for name in first)
    downs = [name for name in first if name.endswith("lora_down.weight")]
    assert not any(torch.equal(first[name], other[name]) for name in downs)
    assert all(not first[name].any() for name in first if name.endswith("lora_up.weight"))
    assert torch.cat([first[name].flatten() for name in downs]).std().item() == pytest.approx(1 / 4, rel=0.05)


def test_dropout_is_off_outside_its_context(eps_denoiser, make_step, stir):
    adapter = eps_denoiser.attach(AdapterConfig(rank=2, dropout=0.5))
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
        ({"kind": "loha"}, "^kind is 'loha'.*lora"),
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


def test_file_keys_are_the_same_with_an_adapter(eps_denoiser):
    before = eps_denoiser.file_keys()
    eps_denoiser.attach(AdapterConfig(rank=1, layers="all_linear"))
    assert eps_denoiser.file_keys() == before


def test_a_lora_for_another_model_is_one_line_and_leaves_the_network_alone(
    denoiser, model_folders, make_step, tmp_path, concept
):
    from anchor_core.backends.diffusers import DiffusersDenoiser

    other = DiffusersDenoiser.from_pretrained(model_folders["other"])
    other.attach(AdapterConfig(rank=2))
    save_trained(tmp_path / "other.safetensors", other, concept, TrainSettings())
    save_adapter(tmp_path / "text.safetensors", {"lora_te_text_model_0.lora_up.weight": torch.zeros(2, 2)}, {})
    save_adapter(tmp_path / "none.safetensors", {}, {"anchor.w": "0.5"})
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors at all")
    before, untouched = snapshot(denoiser.network), predict(denoiser, make_step)
    for name, message in (
        ("other", "made for another model"),
        ("text", "made for another model: lora_te_text_model_0"),
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
    from anchor_core.backends.diffusers import DiffusersDenoiser

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
