"""Textual Inversion's prompts and Custom Diffusion's resizing, as datasets have them."""

from __future__ import annotations

import random

import pytest
import torch

from anchor_core.concept import Concept
from anchor_core.data.augment import FAR, NEAR, TEMPLATES, resized
from anchor_core.data.pictures import References
from anchor_core.data.prepare import build_dataset, prepare
from anchor_core.training.settings import DataSettings

CONCEPT = Concept("a photo of a sks dog", "a photo of a dog")


def test_27_prompts_name_the_subject_once():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 27
    for template in TEMPLATES:
        concept = Concept.from_words("sks", "dog", template)
        assert concept.class_of(concept.subject_prompt) == concept.class_prompt
        assert template.startswith("a ") and " photo of " in template or template.split()[1] in (
            "photo", "picture", "drawing", "depiction",
        )  # fmt: skip


def test_resized_pictures_lie_on_grey_with_a_mask_or_are_cut_from_enlarged_ones():
    picture = torch.zeros(3, 128, 128)
    picture[0] = 1
    made = resized(picture, None, ["a photo of a sks dog", "a photo of a dog"], 400, random.Random(0))
    smaller = [each for each in made if not bool(each[1].all())]
    # 400 draws at .66: within four standard deviations.
    assert 0.66 * 400 - 38 < len(smaller) < 0.66 * 400 + 38
    for pixels, mask, prompts in made:
        assert pixels.shape == picture.shape and mask.shape == (1, 128, 128)
        counted = mask[0] > 0.5
        assert torch.allclose(pixels[:, counted], picture[:, counted], atol=1e-5)
        if mask.all():
            words = NEAR
        else:
            inside = (pixels[0] - 1).abs() < 1e-5
            side = int(inside.any(0).sum())
            assert 42 <= side <= 128 and int(counted.any(0).sum()) == side - 4  # an edge of 2 on each side
            assert (pixels[:, ~inside] - 0.5).abs().max() < 1e-5
            words = FAR if side < 0.6 * 128 - 1 else () if side > 0.6 * 128 + 1 else None
        if words is not None:
            begins = tuple(f"{word} photo of a " for word in words) or ("a photo of a ",)
            assert all(prompt.startswith(begins) for prompt in prompts)
        assert prompts[0].replace("sks ", "") == prompts[1]
    assert {prompt.partition(" photo")[0] for _, _, (prompt, _) in made} == {"a", *FAR, *NEAR}


def test_a_pictures_own_mask_goes_along():
    picture, mask = torch.rand(3, 64, 64), torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    for _, counts, _ in resized(picture, mask, ["a"], 50, random.Random(1)):
        assert counts.mean() < 0.75  # of an enlarged half, at most .72 is seen


@pytest.fixture
def references():
    generator = torch.Generator().manual_seed(0)
    return References([torch.rand(3, 64, 64, generator=generator) for _ in range(2)], ["1.png", "2.png"])


def test_a_dataset_has_the_copies_in_the_place_of_the_pictures(eps_denoiser, references):
    data = DataSettings(resizes=6, flip=True)
    dataset = build_dataset(eps_denoiser, references, CONCEPT, seed=3, **data.build)
    assert 8 <= len(dataset.examples) <= 12  # but those that are all edge
    assert {example.name for example in dataset.examples} == {"1.png", "2.png"}
    for example in dataset.examples:
        assert example.mask is not None and example.mask.any() and example.flipped is not None
        assert example.subject_prompts[0].replace("sks ", "") == example.class_prompts[0]
    again = build_dataset(eps_denoiser, references, CONCEPT, seed=3, **data.build)
    assert all(torch.equal(one.latents, two.latents) for one, two in zip(dataset.examples, again.examples))
    other = build_dataset(eps_denoiser, references, CONCEPT, seed=4, **data.build)
    assert [example.subject_prompts for example in other.examples] != [e.subject_prompts for e in dataset.examples]
    material = prepare(eps_denoiser, references, CONCEPT, class_pictures=None, probe=None, seed=3, **data.build)
    torch.testing.assert_close(material.latents, eps_denoiser.encode_images(references.stack()))


def test_templates_stand_for_the_concepts_own_prompts(eps_denoiser, references):
    dataset = build_dataset(eps_denoiser, references, CONCEPT, **DataSettings(templates=True).build)
    (first, second) = dataset.examples
    assert len(first.subject_prompts) == 27 and first.subject_prompts == second.subject_prompts
    assert first.subject_prompts[0] == "a photo of a sks dog" and first.class_prompts[0] == "a photo of a dog"
    with pytest.raises(ValueError, match="templates is True, but captions is too"):
        DataSettings(templates=True, captions=True)
