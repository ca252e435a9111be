"""What is trained besides LoRAs: whole weights, singular values, rotations, and vectors for a word of the prompt."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from anchor_core import cli
from anchor_core.adapters.adapter import Adapter
from anchor_core.adapters.attach import attach_file, attach_tensors
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter, to_file_keys
from anchor_core.adapters.formats import convert
from anchor_core.adapters.kinds import NAME
from anchor_core.concept import Concept
from anchor_core.data.dataset import Dataset, Example
from anchor_core.objectives import OBJECTIVES
from anchor_core.training.checkpoint import Checkpoints
from anchor_core.training.methods import METHODS, check_combination, method_settings
from anchor_core.training.saving import save_trained
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train
from tests.backends import tiny_models
from tests.comfyui import contract

CONCEPT = contract.CONCEPT
ARCHITECTURES = tuple(tiny_models.BUILDERS)
PARTS = {
    "full": {"kind": "full", "layers": "everything"},
    "svdiff": {"kind": "svdiff", "layers": "all_linear_conv"},
    "oft": {"kind": "oft", "layers": "attention", "rank": 4},
    "textual_inversion": {"kind": "none", "vectors": 2, "initial": "dog"},
    "custom_diffusion": {"kind": "full", "layers": "cross_attention_kv", "vectors": 1, "detach_start": True},
    "lora_with_token": {"kind": "lora", "vectors": 1},
    "text_too": {"kind": "full", "layers": "everything", "text_encoder": True},
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return {name: tiny_models.build(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def any_denoiser(request, pipelines):
    return tiny_models.denoiser_of(pipelines[request.param])


def run(denoiser, options, checkpoints=None, **settings) -> tuple[Adapter, list[float]]:
    """An adapter after a few steps, and their losses."""
    adapter = denoiser.attach(AdapterConfig(**options), seed=1)
    given = {"objective": "reconstruction", "steps": 4, "batch_size": 2, "learning_rate": 1e-2, **settings}
    latents = contract.draw(denoiser, tiny_models.LATENT, 2, seed=5)
    history = train(denoiser, adapter, latents, CONCEPT, TrainSettings(**given), checkpoints=checkpoints)
    return adapter, history.losses


def predict(denoiser, prompt: str = CONCEPT.subject_prompt) -> torch.Tensor:
    with torch.no_grad():
        conditions = [denoiser.encode_prompt(prompt, adapted=True)] * len(contract.LEVELS)
        return denoiser.predict(contract.draw(denoiser, tiny_models.LATENT), contract.times(denoiser), conditions)


# --- every architecture -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("part", ["full", "svdiff", "textual_inversion"])
def test_a_file_attaches_again_on_every_architecture(any_denoiser, part, stir):
    stir(any_denoiser.attach(AdapterConfig(**PARTS[part])), size=0.1)
    ours, tensors = predict(any_denoiser), to_file_keys(any_denoiser.adapter, any_denoiser.file_keys())
    any_denoiser.detach()
    assert not torch.allclose(predict(any_denoiser), ours, atol=1e-3)
    attach_tensors(any_denoiser, tensors, token="sks")
    torch.testing.assert_close(predict(any_denoiser), ours, atol=1e-4, rtol=0)
    any_denoiser.detach()


# --- each part ----------------------------------------------------------------------------------------------------


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


# --- token vectors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [1, 3])
def test_diffusers_reads_the_embedding_file(pipelines, tmp_path, vectors, stir):
    pipeline = pipelines["sd1"]
    denoiser = tiny_models.denoiser_of(pipeline)
    stir(denoiser.attach(AdapterConfig(kind="none", vectors=vectors, token="<dog>", initial="dog")), size=1.0)
    (path,) = save_trained(tmp_path / "adapter.safetensors", denoiser, CONCEPT, TrainSettings())
    prompts = ("a photo of a <dog> in the snow", "<dog>", "a <dog>, a cat and a <dog>")
    with torch.no_grad():
        ours = [denoiser.encode_prompt(prompt, adapted=True) for prompt in prompts]
        same = [denoiser.encode_prompt(prompt.upper(), adapted=True) for prompt in prompts]
    denoiser.detach()
    assert load_file(path)["emb_params"].shape == (vectors, tiny_models.WIDTH)
    assert all(map(torch.equal, ours, same))
    rows = pipeline.text_encoder.get_input_embeddings()
    tokenizer = pipeline.tokenizer
    from copy import deepcopy

    pipeline.text_encoder, pipeline.tokenizer = deepcopy(pipeline.text_encoder), deepcopy(tokenizer)
    try:
        pipeline.load_textual_inversion(str(path), token="<dog>")
        for prompt, condition in zip(prompts, ours, strict=True):
            theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
            torch.testing.assert_close(theirs[0], condition, atol=1e-5, rtol=0)
    finally:
        pipeline.text_encoder, pipeline.tokenizer = denoiser.text_encoder, tokenizer
    assert pipeline.text_encoder.get_input_embeddings() is rows


def test_a_prompt_too_long_for_its_vectors_loses_its_end(pipelines, caplog):
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    denoiser.attach(AdapterConfig(kind="none", vectors=3))
    fits, *cut = (denoiser.encode_prompt("sks " + "dog " * 72 + rest, adapted=True) for rest in ("", "cat", "cat " * 9))
    assert all(torch.equal(each, fits) for each in cut)
    told = [record.message for record in caplog.records if record.name.startswith("anchor_core")]
    assert told == ["a prompt is longer than 77 tokens with its vectors; its end is not used"] * 2


def test_layers_and_vectors_are_two_files_that_belong_together(pipelines, tmp_path, stir):
    denoiser = tiny_models.denoiser_of(pipelines["sdxl"])
    stir(denoiser.attach(AdapterConfig(**PARTS["custom_diffusion"])), size=0.5)
    files = save_trained(tmp_path / "adapter.safetensors", denoiser, CONCEPT, TrainSettings())
    ours = predict(denoiser)
    denoiser.detach()
    assert [file.name for file in files] == ["adapter.safetensors", "embedding.safetensors"]
    assert {name: len(part) for name, part in load_file(files[1]).items()} == {"clip_l": 1, "clip_g": 1}
    adapter, _ = attach_file(denoiser, files[0])
    assert (adapter.config.kind, adapter.config.vectors, adapter.config.token) == ("full", 1, "sks")
    torch.testing.assert_close(predict(denoiser), ours, atol=1e-4, rtol=0)
    denoiser.detach()
    moved = files[1].rename(tmp_path / "sks.safetensors")
    with pytest.raises(ValueError, match="trained together with vectors of 'sks', but no embedding is given"):
        attach_file(denoiser, files[0])
    attach_file(denoiser, files[0], moved)
    torch.testing.assert_close(predict(denoiser), ours, atol=1e-4, rtol=0)
    denoiser.detach()
    with pytest.raises(ValueError, match="^embedding is .*, but it takes a file of token vectors"):
        attach_file(denoiser, moved, moved)
    with pytest.raises(ValueError, match="is an embedding, for prompts and not for layers"):
        convert(load_file(moved), to="kohya")
    with pytest.raises(ValueError, match="another model: it is of clip_g 40, clip_l 32, and this one takes emb_params"):
        attach_file(tiny_models.denoiser_of(pipelines["sd1"]), moved)
    assert denoiser.adapter is None


def test_a_foreign_embedding_is_called_by_its_files_name(pipelines, tmp_path):
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    save_adapter(tmp_path / "cat-toy.safetensors", {"emb_params": torch.randn(tiny_models.WIDTH)}, {})
    adapter, _ = attach_file(denoiser, tmp_path / "cat-toy.safetensors")
    assert (adapter.tokens.token, adapter.tokens.count) == ("cat-toy", 1)
    assert not torch.allclose(predict(denoiser, "a cat-toy"), predict(denoiser, "a dog"), atol=1e-3)
    denoiser.detach()
    save_adapter(tmp_path / "wide.safetensors", {"emb_params": torch.randn(2, tiny_models.WIDTH + 1)}, {})
    with pytest.raises(ValueError, match="another model: it is of emb_params 33, and this one takes emb_params 32"):
        attach_file(denoiser, tmp_path / "wide.safetensors")


# --- what does not go together ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "none"}, "^kind is 'none' and vectors is 0"),
        ({"kind": "none", "vectors": 1, "text_encoder": True}, "^text_encoder is True, but with kind 'none'"),
        ({"kind": "svdiff", "layers": "everything"}, "^layers is 'everything', which has norms too, but kind 'svdiff'"),
        ({"kind": "full", "dropout": 0.5}, "^dropout is 0.5, but with kind 'full' it takes 0"),
        ({"vectors": -1}, "^vectors is -1"),
        ({"vectors": 1, "token": " "}, "^token is ' ', but it takes a word"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**options)


PROMPTS = [("a photo of a sks dog", "a photo of a dog")]


@pytest.mark.parametrize(
    ("settings", "options", "arguments", "message"),
    [
        ({"objective": "prior_preservation"}, {}, {}, "^objective is 'prior_preservation', but with kind 'none'"),
        ({}, {"token": "zwx"}, {}, "^token is 'zwx', but the subject prompt 'a photo of a sks dog' does not have"),
        ({}, {"token": "sk"}, {}, "^token is 'sk', but the subject prompt"),
        ({}, {"token": "dog"}, {}, "^token is 'dog', but the class prompt 'a photo of a dog' has that word too"),
        ({}, {}, {"caption_dropout": 0.1}, "^caption_dropout is 0.1, but with kind 'none'"),
    ],
)
def test_a_combination_that_trains_nothing_is_refused(settings, options, arguments, message):
    config = AdapterConfig(**{"kind": "none", "vectors": 1, **options})
    with pytest.raises(ValueError, match=message) as error:
        check_combination(TrainSettings(**settings), config, PROMPTS, **arguments)
    assert "\n" not in str(error.value)


def test_the_trainer_refuses_before_its_first_step(pipelines):
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    adapter = denoiser.attach(AdapterConfig(kind="none", vectors=1))
    latents = contract.draw(denoiser, tiny_models.LATENT, 1)[0].cpu()
    captions = Dataset([Example(latents, ("a sks dog", "a photo"), ("a dog", "a photo"))])
    with pytest.raises(ValueError, match="^token is 'sks', but the subject prompt 'a photo' does not have"):
        train(denoiser, adapter, captions, Concept("a sks dog", "a dog"), TrainSettings(steps=1))


def test_an_initial_word_of_several_tokens_and_a_rate_for_prodigy_are_refused(pipelines):
    denoiser = tiny_models.denoiser_of(pipelines["sdxl"])
    for options in ({"initial": "extraordinary"}, {"token": "<dog>"}):
        with pytest.raises(ValueError, match="^initial is .* tokens of this model's text encoder, but it takes a word"):
            denoiser.attach(AdapterConfig(kind="none", vectors=1, **options))
    assert denoiser.adapter is None
    with pytest.raises(ValueError, match="^token_learning_rate is 0.1, but prodigy"):
        TrainSettings(optimizer="prodigy", token_learning_rate=0.1)


# --- methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_from_its_options(pipelines, name):
    settings, config, _ = method_settings(name, steps=2, rank=4)
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    adapter = denoiser.attach(config)
    start = adapter.state_dict()
    latents = contract.draw(denoiser, tiny_models.LATENT, 2)
    history = train(denoiser, adapter, latents, CONCEPT, settings, class_latents=latents.flip(0))
    assert len(history.losses) == 2
    assert any(not torch.equal(start[key], tensor) for key, tensor in adapter.state_dict().items())
    denoiser.detach()


def test_a_methods_options_are_defaults():
    settings, config, data = method_settings("custom_diffusion", steps=7)
    assert (settings.objective, settings.steps, settings.learning_rate) == ("prior_preservation", 7, 4e-5)
    assert (config.kind, config.layers, config.vectors, data.flip) == ("full", "cross_attention_kv", 1, True)
    with pytest.raises(ValueError, match="^method is 'dreambooth2', but it takes one of semantic_anchoring, "):
        method_settings("dreambooth2")
    with pytest.raises(ValueError, match="^stepps is no option"):
        method_settings("oft", stepps=3)


SUBJECT = ["--subject", "a photo of a sks star", "--class", "a photo of a star"]


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pip")
    assert cli.main(["sandbox", "subject", "pip", "--out", str(folder)]) == 0
    return str(folder)


def test_the_command_line_trains_by_method_and_samples_with_its_vectors(references, tmp_path):
    out, drawn = tmp_path / "trained", tmp_path / "drawn"
    given = ["--method", "custom_diffusion", "--steps", "2", "--class_pictures", "1", "--learning-rate", "1e-2"]
    train = ["train", "--model", "sandbox", "--references", references, *SUBJECT, *given, "--out", str(out)]
    assert cli.main(train) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["embedding"] == "embedding.safetensors" and report["method"] == "custom_diffusion"
    assert (report["kind"], report["settings"]["batch_size"], report["settings"]["learning_rate"]) == ("full", 2, 1e-2)
    pictures = {}
    sample = ["sample", "--model", "sandbox", "--prompt", "a sks star", "--steps", "2"]
    for name, files in {
        "both": ["--adapter", str(out / "adapter.safetensors")],
        "vectors": ["--adapter", str(out / "embedding.safetensors")],
        "none": [],
    }.items():
        assert cli.main([*sample, *files, "--out", str(drawn / name)]) == 0
        pictures[name] = (drawn / name / "000.png").read_bytes()
    assert len(set(pictures.values())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "none"], "--kind: kind is 'none' and vectors is 0"),
        (["--method", "textual_inversion", "--token", "zwx"], "--token: token is 'zwx', but the subject prompt"),
        (["--method", "textual_inversion", "--objective", "prior_preservation"], "--objective: objective is 'prior"),
    ],
)
def test_the_command_line_refuses_what_trains_nothing_and_writes_nothing(tmp_path, capsys, options, message):
    train = ["train", "--model", "sandbox", "--references", "nowhere", *SUBJECT, *options]
    assert cli.main([*train, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


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
    any_denoiser.detach()
    torch.testing.assert_close(again, trained, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(untrained, trained, atol=1e-2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("part", PARTS)
def test_every_objective_trains_every_part_or_says_why_not(pipelines, part, objective):
    denoiser = tiny_models.denoiser_of(pipelines["sd1"])
    config = AdapterConfig(**PARTS[part])
    refused = {
        "prior_preservation": ("class pictures train nothing", config.kind == "none"),
        "sude": ("class pictures train nothing", config.kind == "none"),
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
