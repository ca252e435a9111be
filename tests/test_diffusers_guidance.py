"""The guidance rules on diffusers' own pipelines of each architecture, against formulas written out by hand."""

from __future__ import annotations

import contextlib

import pytest
import torch

from anchor_core.adapter import AdapterConfig
from anchor_core.adapter_kinds import NAME
from anchor_core.backends.diffusers import DiffusersDenoiser
from anchor_core.backends.diffusers_guidance import guided
from anchor_core.data import Concept
from anchor_core.guidance import make_rule
from tests import contract, tiny_models

PIPELINES = ("sd1", "sdxl", "sd3")
CONCEPT = Concept("a photo of a sks dog", "a photo of a dog")
SUBJECTS = ["a photo of a sks dog", "a sks dog in the snow"]
CLASSES = ["a photo of a dog", "a dog in the snow"]
STEPS, SCALE = 4, 3.0


class Model:
    """A tiny pipeline with an adapter of each layer of its network."""

    def __init__(self, name: str, folder):
        from diffusers import DDIMScheduler

        self.pipeline = tiny_models.build(name, folder)
        if name != "sd3":  # as `DiffusersDenoiser.sample` has it
            config = {"timestep_spacing": "trailing", "clip_sample": False}
            self.pipeline.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config, **config)
        self.denoiser = DiffusersDenoiser.from_pipeline(self.pipeline)
        self.adapter = self.denoiser.attach(AdapterConfig(rank=4, layers="all_linear"), seed=1)
        contract.stir(self.adapter, 0.1)
        self.noise = contract.draw(self.denoiser, tiny_models.LATENT, rows=2)

    @property
    def network(self):
        return self.denoiser.network

    def run(self, prompt=SUBJECTS, scale=SCALE, steps=STEPS, noise=None, **options):
        """The latents that the pipeline makes."""
        options = {"negative_prompt": [""] * len(prompt), "height": 16, "width": 16, "output_type": "latent", **options}
        noise = self.noise if noise is None else noise
        latents = {"latents": noise[: len(prompt)].clone()}
        return self.pipeline(prompt, num_inference_steps=steps, guidance_scale=scale, **latents, **options).images

    def guided(self, rule, prompt=SUBJECTS, class_prompt=CONCEPT.class_of, **options):
        with guided(self.pipeline, rule, adapter=self.adapter, class_prompt=class_prompt):
            return self.run(prompt, **options)

    def sample(self, rule, scale=SCALE, steps=STEPS):
        conditions, class_ = (self.denoiser.encode_prompts(prompts) for prompts in (SUBJECTS, CLASSES))
        negative = self.denoiser.encode_prompt("")
        options = {"steps": steps, "guidance": scale, "rule": rule, "class_": class_}
        return self.denoiser.sample(conditions, negative, self.noise, **options)

    @torch.no_grad()
    def by_hand(self, formula, scale=SCALE, steps=STEPS):
        """Latents by `formula(predict, step)` at each step, predict(prompts, strength) a pass by itself."""
        latents = self.noise
        for i, timestep in enumerate((sampler := self.denoiser._noise.sampler(steps, 16)).timesteps):

            def predict(prompts, strength=1.0, latents=latents, timestep=timestep):
                with self.multiplied(strength):
                    rows = [
                        self.denoiser.predict(row[None], timestep[None], [self.denoiser.encode_prompt(prompt)])
                        for row, prompt in zip(latents, prompts)
                    ]
                return torch.cat(rows)

            latents = sampler.step(formula(predict, i), timestep, latents).prev_sample
        return latents

    @contextlib.contextmanager
    def multiplied(self, strength):
        """peft's own factor of each layer's update times `strength`: W + strength up down."""
        layers = [self.adapter.layer(name) for name in self.adapter.module_names]
        before = [layer.scaling[NAME] for layer in layers]
        for layer, scaling in zip(layers, before):
            layer.scaling[NAME] = strength * scaling
        yield
        for layer, scaling in zip(layers, before):
            layer.scaling[NAME] = scaling


@pytest.fixture(scope="module", params=PIPELINES)
def model(request, tmp_path_factory):
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return Model("sd1", tmp_path_factory.mktemp("sd1"))


NULLS = ["", ""]


def led(predict, towards, away, scale=SCALE):
    return away + scale * (towards - away)


def cfg(predict, prompts):
    return led(predict, predict(prompts), predict(NULLS))


def in_mix(predict, w_c, w_s):
    null = predict(NULLS)
    return null + w_c * (predict(SUBJECTS) - null) + w_s * (predict(CLASSES) - null)


BY_HAND = {
    "cfg": ({}, lambda p, i: cfg(p, SUBJECTS)),
    "interval": (
        {"start": 0.25, "stop": 0.75},
        lambda p, i: cfg(p, SUBJECTS) if i in (1, 2) else p(SUBJECTS),
    ),
    "autoguidance": ({"weak": 0.4}, lambda p, i: led(p, p(SUBJECTS), p(SUBJECTS, 0.4))),
    "unconditional_priors": ({}, lambda p, i: led(p, p(SUBJECTS), p(NULLS, 0.0))),
    "personalization": ({"weak": 0.3}, lambda p, i: led(p, p(SUBJECTS), p(NULLS, 0.3))),
    "rare_to_frequent": (
        {"level": 5},  # the stop point is 0.6 of the steps
        lambda p, i: cfg(p, CLASSES if i == 0 else SUBJECTS),
    ),
    "score_blend": ({"subject_share": 0.25}, lambda p, i: in_mix(p, 0.25 * SCALE, 0.75 * SCALE)),
    "switching": ({"switch": 0.5}, lambda p, i: cfg(p, CLASSES if i < 2 else SUBJECTS)),
    "mixed": ({"class_share": 1 / 3}, lambda p, i: in_mix(p, 2.0, 1.0)),
    "multi_stage": ({"switch": 0.5, "class_share": 1 / 3}, lambda p, i: cfg(p, CLASSES) if i < 2 else in_mix(p, 2, 1)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_rule_is_its_formula_on_pipelines_and_in_sample(model, name):
    options, formula = BY_HAND[name]
    rule = make_rule("cfg" if name == "interval" else name, **options)
    expected, plain = model.by_hand(formula), model.run()
    torch.testing.assert_close(model.guided(rule), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(model.sample(rule), expected, rtol=0, atol=2e-4)
    assert (name == "cfg") == torch.allclose(plain, expected, rtol=0, atol=1e-3)
