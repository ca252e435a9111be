"""What the workflows have in common."""

from __future__ import annotations

from typing import Any

from tests.workflows.graph import Graph, Out

SANDBOX = {"references": "sandbox/pip", "size": 64}
PICKED = {"references": "[pictures on the node]"}
SAMPLING = {"sampler_name": "ddim", "scheduler": "ddim_uniform", "steps": 30, "cfg": 4.0, "seed": 1}
NEW_PLACE = "a photo of a sks star in the snow"


def sandbox(g: Graph) -> tuple[Out, Out, Out]:
    return tuple(g.add("AnchorSandboxModel"))


def pictures(g: Graph, **settings: Any) -> list[Out]:
    return g.add("AnchorLoadReferences", "Pictures of the subject", **(SANDBOX | settings))


def star(g: Graph, **words: str) -> list[Out]:
    return g.add("AnchorConcept", "What it is", **({"token": "sks", "class_word": "star"} | words))


def train(g: Graph, model, clip, vae, images, concept, title: str | None = None, **settings: Any) -> list[Out]:
    learnt = {"steps": 150, "learning_rate": 1e-3, "rank": 8, "layers": "all_linear_conv"}
    given = learnt | {"name": "quickstart"} | settings
    seen = {} if images is None else {"images": images}
    return g.add("AnchorTrainLoRA", title, model=model, clip=clip, vae=vae, concept=concept, **seen, **given)


def prompt(g: Graph, clip, text, title: str) -> Out:
    return g.add("CLIPTextEncode", title, clip=clip, text=text)[0]


def sample(g: Graph, model, positive, negative, latents, title: str, **settings: Any) -> Out:
    given = SAMPLING | settings
    links = {"model": model, "positive": positive, "negative": negative, "latent_image": latents}
    return g.add("KSampler", title, **links, **given)[0]


def show(g: Graph, latents, vae, title: str, prefix: str) -> tuple[Out, int]:
    """The pictures, and the node that saves them."""
    made = g.add("VAEDecode", vae=vae, samples=latents)[0]
    g.add("SaveImage", title, images=made, filename_prefix=prefix)
    return made, g.last


def drawn(g: Graph, rows: list[tuple[str, Out, Out]], negative, latents, vae, prefix: str, **how: Any) -> list:
    """A column of samplers and one of their pictures; `rows` are (title, model, positive)."""
    g.column(300)
    made = [sample(g, model, positive, negative, latents, title, **how) for title, model, positive in rows]
    g.column(300)
    return [show(g, each, vae, title, f"{prefix}/{title}") for each, (title, *_) in zip(made, rows)]
