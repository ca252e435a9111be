"""The preset of the training node: what it decides, where that is told, and what a workflow without it means."""

from __future__ import annotations

import json

import pytest

from anchor_core.training.purposes import purpose_options
from tests.comfyui import comfy_server
from tests.nodes.graphs import newest_lora, node, training, with_options

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


def trained(server, prompt) -> tuple[dict, dict]:
    """The file's metadata and the record of the training of a prompt."""
    server.run(prompt | {"5": node("PreviewAny", source=["4", 4])})
    _, metadata, file = newest_lora(server)
    return metadata, json.loads((file.with_suffix(".run") / "run.json").read_text())


def test_a_preset_decides_and_the_file_and_the_record_say_what(server):
    metadata, record = trained(server, training(preset="quick try", seed=50, steps=1000, preview_every=0))
    wanted = purpose_options("quick try", "sandbox", 5)
    assert record["step"] == record["steps"] == wanted["steps"] < 1000
    assert record["preset"] == metadata["anchor.preset"] == "quick try (sandbox)"
    assert record["chosen"] == wanted
    assert {name: metadata[f"anchor.{name}"] for name in wanted} == {name: str(each) for name, each in wanted.items()}


def test_without_it_and_by_manual_the_node_trains_as_it_says(server):
    for seed, given in ((51, {}), (52, {"preset": "manual"})):
        metadata, record = trained(server, training(seed=seed, preview_every=0, **given))
        assert (record["steps"], metadata["anchor.rank"], metadata["anchor.learning_rate"]) == (4, "4", "0.001")
        assert record["preset"] == metadata["anchor.preset"] == "manual" and record["chosen"] == {}


def test_what_train_options_say_stays(server):
    changes = {"preset": "quick try", "seed": 53, "preview_every": 0}
    prompt = with_options(server, changes, timestep_sampling="shifted", micro_batch=2)
    metadata, record = trained(server, prompt)
    assert (metadata["anchor.timestep_sampling"], metadata["anchor.micro_batch"]) == ("shifted", "2")
    assert record["chosen"].keys().isdisjoint({"timestep_sampling", "micro_batch"})
    assert metadata["anchor.layers"] == "all_linear_conv"


@pytest.mark.parametrize("w, refused", [(3.0, False), (-0.5, True)])
def test_w_may_lie_beyond_the_slider_but_not_below_0(server, w, refused):
    prompt = training(w=w, seed=54, steps=1, preview_every=0) | {"5": node("PreviewAny", source=["4", 4])}
    if refused:
        with pytest.raises(ValueError, match="Value -0.5 smaller than min of 0"):
            server.queue(prompt)
    else:
        server.run(prompt)
        assert newest_lora(server)[1]["anchor.w"] == "3.0"
