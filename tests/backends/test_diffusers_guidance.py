"""The guidance rules on diffusers' own pipelines of each architecture, against formulas written out by hand."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache, cached_property

import pytest
import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter, to_file_keys
from anchor_core.adapters.kinds import NAME
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from anchor_core.backends.diffusers.guidance import guided
from anchor_core.concept import Concept
from anchor_core.guidance import SUBJECT, make_rule
from tests.backends import tiny_models
from tests.comfyui import contract

CONCEPT = Concept("a photo of a sks dog", "a photo of a dog")
SUBJECTS = ("a photo of a sks dog", "a sks dog in the snow")
CLASSES = ("a photo of a dog", "a dog in the snow")
CLASS_WORD_AT = (5, 2)  # of the class prompts' tokens, after that of the start
NULLS = ("", "")
STEPS, SCALE = 4, 3.0


class Model:
    """A tiny pipeline with an adapter in each linear layer of its network."""

    def __init__(self, name: str, folder, **options):
        from diffusers import DDIMScheduler

        self.pipeline = tiny_models.build(name, folder)
        if name != "sd3":  # as `DiffusersDenoiser.sample` has it
            config = {"timestep_spacing": "trailing", "clip_sample": False}
            self.pipeline.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config, **config)
        self.denoiser = DiffusersDenoiser.from_pipeline(self.pipeline)
        self.adapter = self.denoiser.attach(AdapterConfig(rank=4, layers="all_linear", **options), seed=1)
        contract.stir(self.adapter, 0.1)
        self.noise = contract.draw(self.denoiser, tiny_models.LATENT, rows=2)
        self.encode = cache(lambda prompts, adapted=False: self.denoiser.encode_prompts(prompts, adapted))

    def run(self, prompts=SUBJECTS, scale=SCALE, steps=STEPS, **options):
        """The latents that the pipeline makes."""
        if isinstance(prompts, tuple):
            options = {"negative_prompt": [""] * len(prompts), "prompt": list(prompts), **options}
        sizes = {"height": 2 * self.noise.shape[2], "width": 2 * self.noise.shape[3]}
        options = {"latents": self.noise.clone(), "output_type": "latent", **sizes, **options}
        return self.pipeline(num_inference_steps=steps, guidance_scale=scale, **options).images

    @cached_property
    def plain(self):
        return self.run()

    def guided(self, rule, prompts=SUBJECTS, class_prompt=CONCEPT.class_of, **options):
        with guided(self.pipeline, rule, adapter=self.adapter, class_prompt=class_prompt):
            return self.run(prompts, **options)

    def sample(self, rule, scale=SCALE):
        options = {"steps": STEPS, "guidance": scale, "rule": rule, "class_": self.encode(CLASSES)}
        return self.denoiser.sample(self.encode(SUBJECTS), self.encode(NULLS)[0], self.noise, **options)

    @torch.no_grad()
    def by_hand(self, formula):
        """Latents by `formula(predict, step)` at each step; predict(prompts, strength=1) is a pass by itself."""
        latents, sampler = self.noise, self.denoiser._noise.sampler(STEPS, 16)
        for i, timestep in enumerate(sampler.timesteps):
            prediction = formula(Predict(self, latents, timestep), i)
            latents = sampler.step(prediction, timestep, latents).prev_sample
        return latents

    @contextmanager
    def multiplied(self, strength):
        """peft's own factor of each layer's update times `strength`: W + strength up down."""
        layers = [self.adapter.layer(name) for name in self.adapter.module_names]
        before = [layer.scaling[NAME] for layer in layers]
        for layer, scaling in zip(layers, before):
            layer.scaling[NAME] = strength * scaling
        yield
        for layer, scaling in zip(layers, before):
            layer.scaling[NAME] = scaling


class Predict:
    def __init__(self, model: Model, latents, timestep):
        self.model, self.latents, self.timestep = model, latents, timestep

    def __call__(self, prompts, strength=1.0):
        with self.model.multiplied(strength):
            times = self.timestep.expand(len(self.latents))
            return self.model.denoiser.predict(self.latents, times, self.model.encode(prompts))


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def model(request, tmp_path_factory):
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return Model("sd1", tmp_path_factory.mktemp("sd1"))


def close(ours, theirs, atol: float = 2e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def apart(ours, theirs) -> bool:
    return not torch.allclose(ours, theirs, rtol=0, atol=2e-3)


# --- every rule is its formula --------------------------------------------------------------------------------------


def led(towards, away):
    return away + SCALE * (towards - away)


def cfg(p, prompts):
    return led(p(prompts), p(NULLS))


def mix(p, w_c, w_s):
    null = p(NULLS)
    return null + w_c * (p(SUBJECTS) - null) + w_s * (p(CLASSES) - null)


BY_HAND = {
    "cfg": ({"start": 0.25, "stop": 0.75}, lambda p, i: cfg(p, SUBJECTS) if i in (1, 2) else p(SUBJECTS)),
    "autoguidance": ({"weak": 0.4}, lambda p, i: led(p(SUBJECTS), p(SUBJECTS, 0.4))),
    "unconditional_priors": ({}, lambda p, i: led(p(SUBJECTS), p(NULLS, 0.0))),
    "personalization": ({"weak": 0.3}, lambda p, i: led(p(SUBJECTS), p(NULLS, 0.3))),
    "rare_to_frequent": ({"level": 5}, lambda p, i: cfg(p, CLASSES if i == 0 else SUBJECTS)),  # stop point 0.6
    "score_blend": ({"subject_share": 0.25}, lambda p, i: mix(p, 0.25 * SCALE, 0.75 * SCALE)),
    "switching": ({"switch": 0.5}, lambda p, i: cfg(p, CLASSES if i < 2 else SUBJECTS)),
    "mixed": ({"class_share": 1 / 3}, lambda p, i: mix(p, 2, 1)),
    "multi_stage": ({"switch": 0.5, "class_share": 1 / 3}, lambda p, i: cfg(p, CLASSES) if i < 2 else mix(p, 2, 1)),
}


def check_formula(model, name):
    options, formula = BY_HAND[name]
    rule, expected = make_rule(name, **options), model.by_hand(formula)
    close(model.guided(rule), expected)
    close(model.sample(rule), expected)
    assert apart(expected, model.plain)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_rule_is_its_formula_on_pipelines_and_in_sample(sd1, name):
    check_formula(sd1, name)


@pytest.mark.parametrize("name", ["autoguidance", "personalization", "mixed"])
def test_rules_are_their_formulas_on_every_architecture(model, name):
    check_formula(model, name)


def class_word_map(predict: Predict, shape):
    """The class prompts' maps (B, 1, h, w), by diffusers' own attention scores, in a pass by itself."""
    from diffusers.models.attention_processor import AttnProcessor

    network, scores, names = predict.model.denoiser.network, [], []
    processors = network.attn_processors
    network.set_attn_processor(AttnProcessor())
    for name, module in network.named_modules():
        if name.endswith("attn2"):
            names.append(module)
            module.get_attention_scores = lambda *given, own=module.get_attention_scores: (
                scores.append(own(*given)) or scores[-1]
            )
    predict(CLASSES)
    network.set_attn_processor(processors)
    for module in names:
        del module.get_attention_scores
    total = 0
    for each in scores:  # (B heads, S, T)
        positions = each.shape[1]
        height = round((positions * shape[0] / shape[1]) ** 0.5)
        of_word = torch.stack([rows.mean(0)[:, at] for rows, at in zip(each.chunk(2), CLASS_WORD_AT)])
        small = of_word.view(2, 1, height, positions // height)
        total = total + torch.nn.functional.interpolate(small, shape, mode="bilinear", align_corners=False)
    return total / len(scores)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_masked_sampling_reads_the_class_words_cross_attention(name, tmp_path):
    model, shares = Model(name, tmp_path), []
    model.noise = torch.cat([model.noise, model.noise.flip(0, 2)], dim=-1)  # wide: (2, 4, 8, 16)

    def formula(p, i):
        if i == 0:
            return cfg(p, CLASSES)
        found = class_word_map(p, (8, 16))
        threshold = torch.stack([row.flatten().sort().values[round(0.75 * 127)] for row in found])
        inside = found > threshold.view(-1, 1, 1, 1)
        shares.append(inside.float().mean((1, 2, 3)))
        return torch.where(inside, mix(p, 2, 1), cfg(p, CLASSES))

    rule = make_rule("masked", switch=0.25, class_share=1 / 3, quantile=95 / 127)
    expected = model.by_hand(formula)
    assert all(torch.equal(share, torch.full((2,), 0.25)) for share in shares) and len(shares) == STEPS - 1
    close(model.guided(rule), expected)
    close(model.sample(rule), expected)
    assert not any(module._forward_hooks for module in model.denoiser.network.modules())
    with pytest.raises(ValueError, match="^the class prompt is the subject's"):
        model.guided(rule, class_prompt=list(SUBJECTS))


# --- limits ---------------------------------------------------------------------------------------------------------


def test_limits_are_the_plain_pipeline(sd1):
    for name, options in (
        ("cfg", {}),
        ("personalization", {"weak": 1.0}),
        ("switching", {"switch": 0.0}),
        ("mixed", {"class_share": 0.0}),
        ("rare_to_frequent", {"level": 0}),
    ):
        close(sd1.guided(make_rule(name, **options)), sd1.plain, 1e-5)
    with sd1.adapter.scaled(0.6):
        plain = sd1.run()
        close(sd1.guided(make_rule("personalization", weak=1.0)), plain, 1e-5)
        assert apart(plain, sd1.guided(make_rule("personalization", weak=0.5)))
    close(sd1.guided(make_rule("switching", switch=1.0)), sd1.run(CLASSES), 1e-5)
    with sd1.adapter.disabled():
        close(sd1.guided(make_rule("personalization", weak=0.3)), sd1.run(), 1e-5)


def test_at_a_scale_of_1_every_rule_is_conditional(sd1):
    conditional = sd1.run(scale=1.0)
    for name in ("cfg", "autoguidance", "unconditional_priors", "personalization"):
        close(sd1.guided(make_rule(name), scale=1.0), conditional, 1e-5)
        close(sd1.sample(make_rule(name), scale=1.0), conditional)
    close(sd1.guided(make_rule("autoguidance", weak=1.0)), conditional, 1e-5)
    close(sd1.guided(make_rule("personalization", start=1.0)), conditional, 1e-5)
    blend = sd1.by_hand(lambda p, i: (p(SUBJECTS) + p(CLASSES)) / 2)
    close(sd1.guided(make_rule("mixed"), scale=1.0), blend)


def test_personalization_at_0_is_unconditional_priors(sd1):
    assert torch.equal(
        sd1.guided(make_rule("personalization", weak=0.0)), sd1.guided(make_rule("unconditional_priors"))
    )


def test_an_early_checkpoint_is_the_weak_model(sd1):
    own = sd1.adapter.state_dict()
    early = {name: tensor if name.endswith("alpha") else 0.7 * tensor.flip(0) for name, tensor in own.items()}
    sd1.adapter.hold_early(early)

    def formula(p, i):
        strong = p(SUBJECTS)
        sd1.adapter.load_state_dict(early)
        weak = p(SUBJECTS)
        sd1.adapter.load_state_dict(own)
        return led(strong, weak)

    expected = sd1.by_hand(formula)
    rule = make_rule("autoguidance", early=True)
    close(sd1.guided(rule), expected)
    close(sd1.sample(rule), expected)
    assert apart(expected, sd1.plain)
    after = sd1.adapter.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in own.items())


# --- one batch, and nothing left behind -----------------------------------------------------------------------------


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


# --- the pipeline's own options -------------------------------------------------------------------------------------


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


# --- refusals -------------------------------------------------------------------------------------------------------


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
