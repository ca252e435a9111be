"""What the embedded model's autoencoder keeps of a subject: the ceiling of every subject fidelity on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from anchor_core.evaluation.metrics import mean_pairwise_cosine
from anchor_core.sandbox import model, subjects, world
from anchor_core.sandbox.judge import Judge


def tensor(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(each) for each in pictures])).movedim(-1, 1).float() / 255


@pytest.fixture(scope="module")
def denoiser() -> DiffusersDenoiser:
    return DiffusersDenoiser.from_pretrained(model.WEIGHTS)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.mark.parametrize("name", subjects.names())
def test_a_subject_keeps_its_identity_through_the_autoencoder(denoiser, judge, name):
    subject = subjects.get(name)
    references = tensor(subject.references())
    asked = tensor([world.draw(scene) for scene in subject.prompt_scenes() if scene is not None])
    decoded = denoiser.decode_latents(denoiser.encode_images(asked))
    real, kept = (mean_pairwise_cosine(judge.identity(each), judge.identity(references)) for each in (asked, decoded))
    assert real > 0.75
    assert kept > real - 0.05
