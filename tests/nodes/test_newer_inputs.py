"""Inputs that Train Options and Drift Report have had since later than their first version."""

from __future__ import annotations

import pytest
import torch

from tests.comfyui import comfy_server
from tests.nodes.graphs import newest_lora, node, pixels, training, with_options

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


OFT, SVDIFF = {"kind": "oft"}, {"kind": "svdiff", "layer_pattern": "everything"}


@pytest.mark.parametrize(
    "base, name, value",
    [
        (OFT, "coft", 1e-6),
        ({}, "templates", True),
        ({}, "resizes", 2),
        (SVDIFF, "norm_learning_rate", 1e-6),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_an_option_reaches_the_training(server, base, name, value):
    trained = []
    for given in ({}, {name: value}):
        server.run(with_options(server, {"name": name, "steps": 2, "preview_every": 0}, **base, **given))
        trained.append(newest_lora(server))
    assert trained[0][2] != trained[1][2]
    (before, _, _), (after, metadata, _) = trained
    assert any(not torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert metadata.get(f"anchor.{name}", str(value)) == str(value)


def report(server, **changes) -> tuple[str, tuple[int, ...]]:
    """The numbers of a Drift Report (6), and the plot's shape."""
    prompt = training(steps=2, preview_every=0, name="drifted")
    given = {name: prompt["4"]["inputs"][name] for name in ("model", "clip", "vae", "images", "concept")}
    prompt["6"] = node("AnchorDriftReport", **given, lora=["4", 1], timesteps=2, noises=1, seed=0, **changes)
    prompt |= {"7": node("PreviewAny", source=["6", 1]), "8": node("PreviewImage", images=["6", 0])}
    outputs = server.run(prompt)
    return outputs["7"]["text"][0], pixels(server.picture(outputs["8"])).shape


def test_the_other_readings_and_the_steps_own_distances_are_drawn(server):
    numbers, plain = report(server)
    readings, wide = report(server, class_pictures=1)
    steps, wider = report(server, class_pictures=1, history=["4", 3])
    assert "B, same noise" not in numbers and numbers.splitlines()[:4] == readings.splitlines()[:4]
    rows = {line[:15].strip(): [float(cell) for cell in line[15:].split()] for line in readings.splitlines()[1:]}
    # Other noise is further away than the same, and that than the same z_t of the untouched model.
    assert rows["C, other noise"][0] > rows["B, same noise"][0] > rows["drift"][0]
    assert steps == readings
    assert [shape[1] / plain[1] for shape in (wide, wider)] == pytest.approx([3 / 2, 5 / 2], abs=0.01)
