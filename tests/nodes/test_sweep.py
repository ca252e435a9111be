"""The sweep node: strengths of a LoRA, and trainings of several w and lengths, as pictures with scores."""

from __future__ import annotations

import pytest

from tests.comfyui import comfy_server
from tests.nodes.graphs import loras, newest_lora, node, pixels, training

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))


def sweep(**changes) -> dict:
    """A sweep (40) on the sandbox, with its grid (41), its pictures (42) and its table (43)."""
    prompt = {key: each for key, each in training().items() if key != "4"}
    inputs = {name: training()["4"]["inputs"][name] for name in ("model", "clip", "vae", "images", "concept")}
    inputs |= {
        "sweep": "strength",
        "values": "0, 1",
        "prompt": "a photo of a sks star on grass",
        "count": 2,
        "size": 64,
    }
    inputs |= {"seed": 3, "sampling_steps": 4, "guidance": 4.0, "judge": "sandbox", "preset": "quick try"}
    return prompt | {
        "40": node("AnchorSweep", **inputs | {"name": "swept"} | changes),
        "41": node("SaveImage", images=["40", 0], filename_prefix="grid"),
        "42": node("SaveImage", images=["40", 1], filename_prefix="swept"),
        "43": node("PreviewAny", source=["40", 2]),
    }


def shots(server, outputs) -> list:
    files = (server.base / "output" / each["filename"] for each in outputs["42"]["images"])
    return [pixels(file.read_bytes()) for file in files]


def test_strengths_are_drawn_from_the_same_noise_with_their_scores(server):
    made = training(seed=60, steps=8, learning_rate=2e-2, preview_every=0)["4"]
    outputs = server.run(sweep(lora=["4", 1]) | {"4": made})
    (told,) = outputs["40"]["anchor_sweep"]
    assert (told["what"], [each["value"] for each in told["values"]]) == ("strength", ["0", "1"])
    assert len(outputs["40"]["anchor_pictures"]) == 4 and told["best"] in (0, 1)
    for each in told["values"]:
        assert [set(scores) for scores in each["scores"]] == [{"clip_i", "clip_t", "dino"}] * 2
        assert each["means"]["dino"] == pytest.approx(sum(scores["dino"] for scores in each["scores"]) / 2)
    one, two, three, four = shots(server, outputs)
    assert abs(one - two).max() > 1 and abs(one - three).max() > 1 and abs(two - four).max() > 1
    # Strength 0 is the model itself.
    zero = sweep(lora=["4", 1], values="0", judge="[none]") | {"4": made}
    alone = shots(server, server.run(zero))
    assert all((a == b).all() for a, b in zip(alone, (one, two)))
    assert "| 0" in outputs["43"]["text"][0] and "CLIP-T" in outputs["43"]["text"][0]
    assert pixels(server.picture(outputs["41"])).shape[1] > 300


def test_each_w_is_a_training_of_its_own_and_steps_are_looked_at_in_one(server):
    options = {"7": node("AnchorTrainOptions", **defaults(server))}
    before = len(loras(server))
    outputs = server.run(sweep(sweep="w", values="0, 1", count=1, options=["7", 0]) | options)
    assert len(loras(server)) == before + 2 and newest_lora(server)[1]["anchor.w"] == "1.0"
    assert newest_lora(server)[1]["anchor.preset"] == "quick try (sandbox)"
    one, two = shots(server, outputs)
    assert abs(one - two).max() > 1

    outputs = server.run(sweep(sweep="steps", values="2, 4", count=1, options=["7", 0]) | options)
    (told,) = outputs["40"]["anchor_sweep"]
    assert [each["value"] for each in told["values"]] == ["2", "4"]
    last = loras(server)[-2:]
    assert sorted(file.name for file in last) == ["swept_00003_.safetensors", "swept_00003_step000002.safetensors"]


def defaults(server) -> dict:
    inputs = server.get("/object_info/AnchorTrainOptions")["AnchorTrainOptions"]["input"]["required"]
    return {name: settings["default"] for name, (_, settings) in inputs.items()}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "lora is not connected, whose strength is varied"),
        ({"sweep": "steps", "values": "0.5, 2"}, "a sweep of steps takes whole numbers of at least 1"),
        ({"sweep": "w", "prompt": "a photo of a dog"}, "does not name the subject"),
    ],
)
def test_what_does_not_go_together_is_said(server, changes, said):
    with pytest.raises(RuntimeError, match=said):
        server.run(sweep(**changes))


def test_values_that_are_no_numbers_are_refused_before_the_run(server):
    with pytest.raises(ValueError, match="values is '0, x', but it takes numbers"):
        server.queue(sweep(values="0, x"))
