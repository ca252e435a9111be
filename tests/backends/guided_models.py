"""Tiny diffusers pipelines with an adapter, sampled under a guidance rule and by a formula written out by hand."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache, cached_property

import torch

from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.kinds import NAME
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from anchor_core.backends.diffusers.guidance import guided
from anchor_core.concept import Concept
from tests.backends import tiny_models
from tests.comfyui import contract

CONCEPT = Concept("a photo of a sks dog", "a photo of a dog")
SUBJECTS = ("a photo of a sks dog", "a sks dog in the snow")
CLASSES = ("a photo of a dog", "a dog in the snow")
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


def close(ours, theirs, atol: float = 2e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def apart(ours, theirs) -> bool:
    return not torch.allclose(ours, theirs, rtol=0, atol=2e-3)


def led(towards, away):
    return away + SCALE * (towards - away)
