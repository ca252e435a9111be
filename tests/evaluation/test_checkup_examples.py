"""Two adapters that are trained here, one that harms its class and one that does not, told apart by the check-up."""

from __future__ import annotations

import pytest

from anchor_core.adapters.attach import attach_tensors
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import to_file_keys
from anchor_core.adapters.stated import prompts_of
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
from anchor_core.bench.sandbox_settings import SAMPLING
from anchor_core.concept import Concept
from anchor_core.data.prepare import sample_latents
from anchor_core.evaluation.checkup import check_up
from anchor_core.evaluation.settings import BUDGET, CheckupSettings
from anchor_core.evaluation.verdict import HARM, HARMS, KEEPS
from anchor_core.sandbox import model, subjects
from anchor_core.sandbox.judge import pixels
from anchor_core.training.settings import TrainSettings
from anchor_core.training.trainer import train

pytestmark = pytest.mark.skipif(
    not (model.WEIGHTS / "model_index.json").is_file(), reason="the repository holds no pretrained model"
)

CONCEPT = Concept("a photo of a sks star", "a photo of a star")
EXAMPLES = {
    "too long, at a high rate": TrainSettings(
        objective="reconstruction", learning_rate=5e-3, steps=45, batch_size=2, probe_every=1000
    ),
    "anchored": TrainSettings(objective="anchor", w=2.0, learning_rate=5e-4, steps=40, batch_size=2, probe_every=1000),
}


@pytest.fixture(scope="module")
def reports():
    """By example: with both prompts, and with the class alone."""
    import numpy as np

    denoiser, found = DiffusersDenoiser.from_pretrained(model.WEIGHTS), {}
    pictures = pixels(np.stack([np.asarray(each) for each in subjects.get("pip").references()]))
    latents = denoiser.encode_images(pictures)
    shape = tuple(latents.shape[1:])
    classes = sample_latents(denoiser, CONCEPT.class_prompt, 2, shape, **SAMPLING)
    for name, settings in EXAMPLES.items():
        adapter = denoiser.attach(AdapterConfig(rank=8))
        train(denoiser, adapter, latents, CONCEPT, settings)
        tensors = to_file_keys(adapter, denoiser.file_keys())
        denoiser.detach()
        found[name] = [
            check_up(
                denoiser, lambda tensors=tensors: attach_tensors(denoiser, tensors), {},
                prompts_of({}, subject, CONCEPT.class_prompt), latents=classes, shape=shape,
                settings=CheckupSettings(timesteps=4),
            )
            for subject in (CONCEPT.subject_prompt, "")
        ]  # fmt: skip
    return found


@pytest.mark.parametrize("which", [0, 1], ids=["with its word", "no word known"])
def test_they_are_told_apart(reports, which):
    harmful, anchored = (reports[name][which] for name in EXAMPLES)
    one, other = (report["without_trigger"]["class"]["of_prompt"] for report in (harmful, anchored))
    assert one > 1.3 * HARM and other < BUDGET / 1.1, (one, other)
    assert (harmful["verdict"]["level"], anchored["verdict"]["level"]) == (HARMS, KEEPS)
    assert harmful["suggested"]["strength"] < 0.7 < anchored["suggested"]["strength"] == 1
    assert harmful["strength"]["passes_at"] < 1 < (anchored["strength"]["passes_at"] or 2)
    assert "harms the class" in harmful["verdict"]["sentences"][0]


def test_the_anchored_one_has_learnt_something(reports):
    report = reports["anchored"][0]
    assert report["with_trigger"]["of_prompt"] > 0.1 and report["weights"]["norm"] > 0
