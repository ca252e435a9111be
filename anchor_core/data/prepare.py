"""What a training is given: pictures and captions through the model's encoders, and class pictures."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..checks import check_count, check_number
from ..concept import Concept
from ..denoiser import Denoiser
from ..drift import DriftProbe
from .augment import resized
from .cache import Cache
from .captions import check_captions, prompt_pairs
from .dataset import Dataset, Example, check_dropout
from .digest import digest, digests
from .pictures import References


def build_dataset(
    denoiser: Denoiser,
    references: References,
    concept: Concept,
    *,
    templates: Sequence[str] = (),
    shuffle: bool = False,
    caption_dropout: float = 0.0,
    flip: bool = False,
    resizes: int = 0,
    cache: Cache | None = None,
    seed: int = 0,
    gap: Callable[[], None] = lambda: None,
) -> Dataset:
    """The references, encoded, each with what may be said of it.

    Args:
        references: at the sizes to train on (`bucket_sizes`, or one size); each size is a bucket.
        templates: prompts with {} for the subject's words, in place of the concept's own prompts.
        shuffle: take the comma-separated tags of each prompt in up to 8 orders, drawn from `seed`.
        caption_dropout: share of draws, in [0, 1), with the empty prompt for subject and class.
        flip: encode the mirrored pictures too, which are drawn half of the time.
        resizes: how many `resized` copies of each picture stand in its place; 0 for the picture itself.
        cache: latents that are known already; without it, none are.
        gap: called before each pass of the autoencoder; what it raises ends the preparation.

    Raises:
        ValueError: before any encoding, for prompts that do not fit (see `prompt_pairs`) or a share out of range;
            after it, for a masked picture whose edges are no multiples of the autoencoder's.
    """
    check_dropout(caption_dropout)
    pairs = prompt_pairs(concept, references.names, references.captions, templates, shuffle, seed)
    if denoiser.token_limit is not None:
        longest = {name: max((subject for subject, _ in told), key=len) for name, told in zip(references.names, pairs)}
        check_captions(longest, denoiser.count_tokens, denoiser.token_limit)
    cache, chance = cache or Cache(denoiser), random.Random(f"resizes {seed}")
    masks = references.masks or [None] * len(references)
    examples = []
    for name, picture, mask, told in zip(references.names, references.pixels, masks, pairs):
        subject, class_ = zip(*told)
        forms = [(picture, mask, (*subject, *class_))]
        if resizes:
            forms = resized(picture, mask, forms[0][2], resizes, chance)
        pixels = [each for each, _, _ in forms]
        latents = cache.latents(pixels, gap)
        mirrored = cache.latents([each.flip(-1) for each in pixels], gap) if flip else [None] * len(latents)
        for (_, counts, prompts), own, other in zip(forms, latents, mirrored):
            small = None if counts is None else _latent_mask(name, counts, own)
            if small is not None and not small.any():
                continue  # a copy so small that its edge is all of it
            texts = tuple(prompts[: len(subject)]), tuple(prompts[len(subject) :])
            examples.append(Example(own, *texts, small, other, name))
    return Dataset(examples, caption_dropout)


def of_one_size(dataset: Dataset) -> Tensor:
    """Latents (N, C, h, w) of the examples that are of the first one's size, for what takes a stack."""
    first = dataset.examples[0].latents
    return torch.stack([example.latents for example in dataset.examples if example.latents.shape == first.shape])


def _latent_mask(name: str, mask: Tensor, latents: Tensor) -> Tensor:
    """(1, H, W) to (1, h, w): the mean over the pixels of each latent."""
    height, width = latents.shape[1:]
    if mask.shape[1] % height or mask.shape[2] % width:
        raise ValueError(
            f"reference {name} is {mask.shape[2]}x{mask.shape[1]} and its latents {width}x{height}, but a mask takes "
            "pictures of whole latents; give a size that is a multiple of 8"
        )
    return adaptive_avg_pool2d(mask.detach().to("cpu", torch.float32), (height, width))


def sample_class_latents(
    denoiser: Denoiser, concept: Concept, count: int, shape: tuple[int, int, int], **options: Any
) -> Tensor:
    """Latents (count, C, h, w) that the pretrained network makes of the class prompt: the class pictures of Eq. 2.

    `options` are those of `sample_latents`. One size serves references in several buckets too, as class pictures go
    through the network in a pass of their own.
    """
    return sample_latents(denoiser, concept.class_prompt, count, shape, **options)


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    prompt: str,
    count: int,
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    steps: int = 30,
    guidance: float = 5.0,
    batch_size: int = 8,
    cache: Cache | None = None,
    gap: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents (count, C, h, w) that the pretrained network makes of a prompt.

    `shape` is that of one latent, (C, h, w). The adapter is off while they are made. A cache on disk knows them by
    their noise, the sampling, and what two steps make of the first one, in every bit. `gap` is called before each
    batch.
    """
    check_count("count", count)
    check_number("guidance", guidance, minimum=0)
    generator = torch.Generator().manual_seed(check_count("seed", seed, minimum=0))
    noise = torch.randn((count, *shape), generator=generator).to(denoiser.device)
    class_, negative = denoiser.encode_prompts([prompt, ""])

    def make() -> Tensor:
        pictures = []
        for part in noise.split(batch_size):
            gap()
            pictures.append(denoiser.sample([class_] * len(part), negative, part, steps=steps, guidance=guidance))
        return torch.cat(pictures)

    with denoiser.adapter_disabled():
        if cache is None:
            return make()
        # The network, both prompts and the schedule: a step alone would not tell schedules of the same ends apart.
        begun = denoiser.sample([class_], negative, noise[:1], steps=2, guidance=guidance)
        parts = [noise, begun, f"{steps} steps, guidance {guidance}, {batch_size} at once"]
        return cache.made("class-pictures", parts, make).to(denoiser.device)


@dataclass(frozen=True)
class ClassPictures:
    """The class pictures of objectives that read some: those given, or how the pretrained model makes them.

    Args:
        count: how many are made.
        pixels: (N, 3, H, W) in [0, 1] to take instead, called `name` in errors.
        folder: where made ones are kept for the next training.
        sampling: options of `sample_class_latents`.
    """

    count: int = 24
    pixels: Tensor | None = None
    name: str = "class_images"
    folder: Path | None = None
    sampling: Mapping[str, Any] | None = None

    def latents(
        self, denoiser: Denoiser, concept: Concept, shape: tuple[int, ...], seed: int, gap: Callable[[], None]
    ) -> Tensor:
        """(N, C, h, w)."""
        if self.pixels is None:
            cache = None if self.folder is None else Cache(denoiser, self.folder)
            options = {"seed": seed, "cache": cache, "gap": gap, **(self.sampling or {})}
            return sample_class_latents(denoiser, concept, self.count, shape, **options)
        try:
            return denoiser.encode_images(self.pixels)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class Material:
    """What a training sees of the subject, made once.

    Attributes:
        latents: (N, C, h, w), those of the first picture's size, for what takes a stack.
        class_latents: (M, C, h, w), or None.
        cache: of encoded prompts.
        about: what it was made of, for reports: JSON values.
    """

    concept: Concept
    dataset: Dataset
    latents: Tensor
    class_latents: Tensor | None
    probe: DriftProbe | None
    cache: Cache
    about: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    denoiser: Denoiser,
    references: References | Tensor,
    concept: Concept,
    *,
    class_pictures: ClassPictures | None,
    probe: Mapping[str, Any] | None,
    seed: int,
    cache: Cache | None = None,
    begin: Callable[[str], None] = lambda phase: None,
    gap: Callable[[], None] = lambda: None,
    **options: Any,
) -> Material:
    """All that a training sees of the subject.

    Args:
        references: pictures, or their latents (N, C, h, w), which all have the concept's two prompts.
        class_pictures: None for an objective that reads none.
        probe: options of the `DriftProbe`, None for none.
        begin: told the phases `preparing`, `class_pictures` and `measuring`.
        gap: called between any two calls of the model; what it raises ends the preparation.
        options: of `build_dataset`, where references are pictures.
    """
    cache = cache or Cache(denoiser)
    begin("preparing")
    if isinstance(references, Tensor):
        dataset = Dataset.of_latents(references, concept)
    else:
        dataset = build_dataset(denoiser, references, concept, cache=cache, seed=seed, gap=gap, **options)
    about = {} if isinstance(references, Tensor) else {"pictures": digests(references, dataset), "data": options}
    latents, class_latents, drift = of_one_size(dataset), None, None
    if options.get("resizes"):  # the probe's are the pictures themselves
        shape = references.pixels[0].shape
        latents = torch.stack(cache.latents([each for each in references.pixels if each.shape == shape], gap))
    if class_pictures is not None:
        begin("class_pictures")
        class_latents = class_pictures.latents(denoiser, concept, tuple(latents.shape[1:]), seed, gap)
        about["class_pictures"] = {"count": len(class_latents), "latents": digest(class_latents)}
    if probe is not None:
        begin("measuring")
        # One of each picture is enough for the readings of Fig. 2.
        samples = None if class_latents is None else class_latents[: len(latents)]
        if samples is not None and samples.shape[1:] != latents.shape[1:]:
            samples = None
        drift = DriftProbe(denoiser, latents, concept, class_latents=samples, **probe)
    return Material(concept, dataset, latents, class_latents, drift, cache, about)
