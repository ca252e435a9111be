"""The guidance rules within diffusers' pipelines: steps, schedulers, options and LoRAs, and what is left behind."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from anchor_core.adapters.file import save_adapter, to_file_keys
from anchor_core.backends.diffusers.guidance import guided
from anchor_core.branches import SUBJECT
from anchor_core.guidance import make_rule
from tests.backends import tiny_models
from tests.backends.guided_models import NULLS, SCALE, STEPS, SUBJECTS, Model, apart, close, led
from tests.comfyui import contract


@contextmanager
def counted(network):
    """The rows of each pass of the network."""
    first = getattr(network, "conv_in", None) or network.pos_embed
    rows = []
    hook = first.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    yield rows
    hook.remove()


def test_a_step_is_one_batch_of_the_branches_that_count(model):
    for name, options, expected in (
        ("personalization", {}, [4, 4, 4, 4]),
        ("cfg", {"start": 0.25, "stop": 0.5}, [2, 4, 2, 2]),
        ("multi_stage", {"switch": 0.5}, [4, 4, 6, 6]),
    ):
        with counted(model.denoiser.network) as rows:
            model.guided(make_rule(name, **options))
        with counted(model.denoiser.network) as in_sample:
            model.sample(make_rule(name, **options))
        assert rows == in_sample == expected
    with counted(model.denoiser.network) as rows:
        model.guided(make_rule("personalization"), scale=1.0)
    assert rows == [2] * STEPS


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("HeunDiscreteScheduler", [2, 2, 2, 4, 4, 4, 4, 2, 2, 2, 2]),  # runs at the end of a step
        ("KDPM2DiscreteScheduler", [2, 2, 2, 2, 4, 4, 4, 4, 2, 2, 2]),  # in its middle
        ("KDPM2AncestralDiscreteScheduler", [2, 2, 2, 4, 4, 4, 4, 2, 2, 2, 2]),  # at its end, but for rounding
    ],
)
def test_steps_of_schedulers_that_run_the_network_twice(sd1, scheduler, expected):
    import diffusers

    before = sd1.pipeline.scheduler
    sd1.pipeline.scheduler = getattr(diffusers, scheduler).from_config(before.config)
    try:
        with counted(sd1.denoiser.network) as rows:
            sd1.guided(make_rule("cfg", start=0.33, stop=0.67), steps=6)
    finally:
        sd1.pipeline.scheduler = before
    assert rows == expected


def test_after_the_block_the_pipeline_is_as_before(model):
    plain, pipeline, network = model.plain, model.pipeline, model.denoiser.network
    hooks = [len(module._forward_hooks) for module in network.modules()]
    before = dict(vars(pipeline)), set(vars(network))
    with pytest.raises(KeyError):
        with guided(pipeline, make_rule("personalization", weak=0.2), adapter=model.adapter) as same:
            assert same is pipeline
            assert apart(model.run(), plain)
            with pytest.raises(ValueError, match="^pipeline is guided already"):
                with guided(pipeline, make_rule("cfg")):
                    pass
            raise KeyError
    with pytest.raises(RuntimeError):
        model.guided(make_rule("personalization"), latents=torch.zeros(2, 1, 8, 8))
    assert dict(vars(pipeline)).keys() == before[0].keys() and set(vars(network)) == before[1]
    assert [len(module._forward_hooks) for module in network.modules()] == hooks
    assert torch.equal(model.run(), plain)


def test_offloading_that_replaces_the_networks_forward_changes_nothing(sd1):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    rule, network = make_rule("personalization", weak=0.2), sd1.denoiser.network
    expected = sd1.guided(rule)
    with guided(sd1.pipeline, rule, adapter=sd1.adapter):
        add_hook_to_module(network, ModelHook())
        assert torch.equal(sd1.run(), expected)
        remove_hook_from_module(network)
        assert torch.equal(sd1.run(), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd1", {"guidance_rescale": 0.7, "negative_prompt": ["a cat", "snow"]}),
        ("sd1", {"prompts": None, "prompt": "a sks dog", "num_images_per_prompt": 2}),
        ("sdxl", {"prompt_2": ["a sks dog", "the sks dog"], "negative_prompt_2": ["cat", "dog"], "denoising_end": 0.7}),
        ("sd3", {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9, "max_sequence_length": 64}),
    ],
    ids=["rescale", "images_per_prompt", "second_prompt", "skip_layers"],
)
def test_cfg_as_a_rule_is_the_pipelines_own_under_its_options(tmp_path, name, options):
    model = Model(name, tmp_path)
    plain = model.run(**options)
    assert torch.equal(model.guided(make_rule("cfg"), **options), plain)
    # The class prompt goes through the same options: with the subject's words in it, it is the subject's.
    close(model.guided(make_rule("mixed", class_share=0.3), class_prompt=lambda text: text, **options), plain, 1e-4)
    assert apart(model.guided(make_rule("mixed", class_share=0.3), **options), plain)


def test_cfg_as_a_rule_has_the_rows_of_the_pipelines_batch_in_their_order(model):
    """Row by row: on some processors a row's last bits depend on its place in the batch."""

    network = model.denoiser.network
    last = getattr(network, "conv_out", None) or network.proj_out

    def outputs(run):
        found = []
        hook = last.register_forward_hook(lambda module, inputs, output: found.append(output.clone()))
        run()
        hook.remove()
        return found

    theirs, ours = outputs(model.run), outputs(lambda: model.guided(make_rule("cfg")))
    assert len(ours) == len(theirs) == STEPS and apart(*theirs[0].chunk(2))
    assert all(map(torch.equal, ours, theirs))


def test_class_prompts_are_one_text_one_for_each_or_a_function(sd1):
    rule, prompts = make_rule("mixed"), ("a sks dog", "a sks dog")
    expected = sd1.guided(rule, prompts, class_prompt=["a dog", "a dog"])
    assert torch.equal(sd1.guided(rule, prompts, class_prompt="a dog"), expected)
    assert torch.equal(sd1.guided(rule, prompts), expected)
    embeddings, negative = sd1.pipeline.encode_prompt(list(prompts), "cpu", 1, True)
    given = {"prompt_embeds": embeddings, "negative_prompt_embeds": negative}
    assert torch.equal(sd1.guided(rule, None, class_prompt="a dog", **given), expected)
    with pytest.raises(ValueError, match="^class_prompt is a function"):
        sd1.guided(rule, None, **given)
    with pytest.raises(ValueError, match="^class_prompt has 3 texts, but the pipeline 2 prompts"):
        sd1.guided(rule, class_prompt=["a dog"] * 3)
    with pytest.raises(ValueError, match="^the class prompt is encoded to .2, 77, 32."):
        sd1.guided(rule, None, class_prompt="a dog", **{key: part[:, :40] for key, part in given.items()})


@pytest.mark.parametrize(("name", "text_encoder"), [("sd1", True), ("sd3", False)])
def test_a_pipelines_own_lora_is_weakened(tmp_path, name, text_encoder):
    model = Model(name, tmp_path, text_encoder=text_encoder)
    rules = [make_rule("personalization", weak=0.3), make_rule("autoguidance", weak=0.3)]
    expected = [model.guided(rule) for rule in rules]
    keys = model.denoiser.file_keys()
    save_adapter(tmp_path / "lora.safetensors", to_file_keys(model.adapter, keys), {})
    model.denoiser.detach()
    model.adapter = None
    with pytest.raises(ValueError, match="^rule is 'personalization', which weakens the adapter, but the network has"):
        model.guided(rules[0])
    model.pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    for rule, latents in zip(rules, expected):
        close(model.guided(rule), latents, 1e-3)
    model.pipeline.fuse_lora()
    with pytest.raises(ValueError, match="^the pipeline's LoRA is fused"):
        model.guided(rules[0])


def test_a_trained_text_encoder_is_weakened_with_the_network(tmp_path):
    model = Model("sd1", tmp_path, text_encoder=True)

    def encoded(prompts, strength):
        with model.multiplied(strength):
            return model.denoiser.encode_prompts(prompts, adapted=True)

    def predict(p, prompts, strength):
        conditions = encoded(prompts, strength)
        with model.multiplied(strength):
            return model.denoiser.predict(p.latents, p.timestep.expand(2), conditions)

    for rule, weak in (("personalization", NULLS), ("autoguidance", SUBJECTS)):
        rule = make_rule(rule, weak=0.3)
        expected = model.by_hand(lambda p, i, weak=weak: led(predict(p, SUBJECTS, 1.0), predict(p, weak, 0.3)))
        close(model.guided(rule), expected)
        conditions = {branch: encoded(SUBJECTS if branch.prompt == "subject" else NULLS, branch.strength)
                      for branch in rule.branches}  # fmt: skip
        options = {"steps": STEPS, "guidance": SCALE, "rule": rule, "encoded": conditions}
        close(model.denoiser.sample(conditions[SUBJECT], None, model.noise, **options), expected)
    embeddings, negative = model.pipeline.encode_prompt(list(SUBJECTS), "cpu", 1, True)
    with pytest.raises(ValueError, match="^the subject prompt is given as embeddings, but the rule"):
        model.guided(rule, None, prompt_embeds=embeddings, negative_prompt_embeds=negative)


def test_rules_that_do_not_go_with_a_model_are_refused(sd1, tmp_path):
    with pytest.raises(ValueError, match="^rule is 'mixed', which takes the class prompt too"):
        sd1.guided(make_rule("mixed"), class_prompt=None)
    other = Model("sd3", tmp_path / "sd3")
    with pytest.raises(ValueError, match="^rule is 'masked', which reads cross-attention.*SD3Transformer2DModel"):
        other.guided(make_rule("masked"))
    with pytest.raises(ValueError, match="^rule is 'autoguidance' with early, but the adapter holds no"):
        other.sample(make_rule("autoguidance", early=True))
    with pytest.raises(ValueError, match="^adapter is attached to another network"):
        with guided(sd1.pipeline, make_rule("cfg"), adapter=other.adapter):
            pass
    flux = tiny_models.build("flux", tmp_path / "flux")
    with pytest.raises(ValueError, match="^pipeline is a FluxPipeline"):
        with guided(flux, make_rule("cfg")):
            pass
    denoiser = tiny_models.denoiser_of(flux)
    empty = denoiser.encode_prompt("")
    with pytest.raises(ValueError, match="^rule is 'cfg', but this network takes its guidance scale as an input"):
        noise = contract.draw(denoiser, tiny_models.LATENT, rows=1)
        denoiser.sample([empty], empty, noise, steps=2, guidance=3.0, rule=make_rule("cfg"))
