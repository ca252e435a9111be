"""The workflows that come with the pack: what is in their files, and that they run to their end in a real ComfyUI."""

from __future__ import annotations

import json
from itertools import combinations

import numpy
import pytest
from PIL import Image

from tests.comfyui import comfy_server
from tests.nodes.graphs import loras, pixels
from tests.nodes.test_nodes import NODES
from tests.workflows.graph import TITLE, needed_height, specs
from tests.workflows.make import FOLDER, SUBGRAPHS, written

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

FILES = sorted(FOLDER.glob("*.json"))
LOADERS = ("CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader")
VIEWS = {"AnchorTrainLoRA": "run", "AnchorSweep": "grid"}
"""Widgets that the page's scripts add."""
FILE_WIDGETS = ("ckpt_name", "unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "file", "image")


def workflow(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def saved(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_the_files_are_those_that_are_made(object_info):
    """After an input was added: python -m tests.workflows.make."""
    made = written(object_info)
    assert {*FOLDER.glob("*.json"), *SUBGRAPHS.glob("*.json")} == set(made)
    for file, content in made.items():
        assert json.loads(file.read_text(encoding="utf-8")) == content, file.stem


def test_every_node_of_ours_is_in_one():
    used = {node["type"] for file in FILES for node in workflow(file.stem)["nodes"]}
    assert not set(NODES) - used


def test_it_opens_without_a_missing_node_or_value(saved, object_info):
    assert saved["version"] == 0.4 and saved["nodes"][0]["type"] == "MarkdownNote"
    for node in saved["nodes"][1:]:
        assert node["type"] in object_info
        assert node["properties"]["cnr_id"] == (
            "semantic-anchor" if node["type"].startswith("Anchor") else "comfy-core"
        )
    prompt = comfy_server.to_api(saved, object_info)
    for entry in prompt.values():
        known = specs(object_info[entry["class_type"]])
        for name, value in entry["inputs"].items():
            kind, options = known.get(name, (None, {}))
            if isinstance(value, list) or name in FILE_WIDGETS:
                continue
            choices = kind if isinstance(kind, list) else options.get("options", [value])
            assert value in [each["key"] if isinstance(each, dict) else each for each in choices], name
            assert options.get("min", value) <= value <= options.get("max", value), name
        missing = {
            name for name in object_info[entry["class_type"]]["input_order"]["required"] if name not in entry["inputs"]
        }
        assert all(known[name][0] == "COMFY_AUTOGROW_V3" for name in missing), missing


def test_no_node_covers_another(saved, object_info):
    boxes = {}
    for node in saved["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[f"{node['id']} {node['type']}"] = (
            x,
            y - TITLE,
            x + width,
            y + max(height, needed_height(node, object_info)),
        )
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        apart = a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
        assert apart, f"{one} covers {other}"


def test_a_model_says_where_it_is_from(saved):
    for node in saved["nodes"]:
        if node["type"] in LOADERS:
            files = [each for each in node["widgets_values"] if str(each).endswith(".safetensors")]
            models = {each["name"]: each for each in node["properties"]["models"]}
            assert set(files) == set(models)
            assert all(each["url"].endswith(f"/{name}") and each["directory"] for name, each in models.items())


def test_app_mode_shows_widgets_that_are_there(saved):
    nodes = {str(node["id"]): node for node in saved["nodes"]}
    linear = saved["extra"]["linearData"]
    assert linear["inputs"] and linear["outputs"]
    for id_, name, *_ in linear["inputs"]:
        if VIEWS.get(nodes[id_]["type"]) == name:
            continue
        (slot,) = (each for each in nodes[id_]["inputs"] if each["name"] == name)
        assert "widget" in slot and slot["link"] is None
    assert {nodes[id_]["type"] for id_ in linear["outputs"]} <= {"SaveImage", "PreviewImage", "PreviewAny"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_has_a_square_thumbnail(file):
    with Image.open(file.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and picture.width == picture.height
    assert file.with_suffix(".jpg").stat().st_size < 60_000


def test_the_blueprint_is_served(server):
    (about,) = (each for each in server.get("/global_subgraphs").values() if each["name"] == "Train a subject")
    assert about["source"] == "custom_node"
    saved = json.loads((SUBGRAPHS / "Train a subject.json").read_text(encoding="utf-8"))
    (subgraph,) = saved["definitions"]["subgraphs"]
    assert [node["type"] for node in saved["nodes"]] == [subgraph["id"]]
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    for link in subgraph["links"]:
        if link["origin_id"] == -10:
            assert link["id"] in subgraph["inputs"][link["origin_slot"]]["linkIds"]
        if link["target_id"] == -20:
            assert link["id"] in subgraph["outputs"][link["target_slot"]]["linkIds"]
        else:
            assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
    assert all(each["linkIds"] for each in (*subgraph["inputs"], *subgraph["outputs"]))


def run(server, object_info, name: str, **files: str) -> list[bytes]:
    """The pictures that a short run of the workflow saves."""
    prompt = comfy_server.to_api(workflow(name), object_info)
    short = {"steps": 3, "preview_every": 0, "batch_size": 1, "timesteps": 2, "preset": "manual", "count": 1}
    for entry in prompt.values():
        entry["inputs"] |= {key: value for key, value in short.items() if key in entry["inputs"]}
        entry["inputs"] |= {key: value for key, value in files.items() if key in entry["inputs"]}
    outputs = server.run(prompt)
    assert set(outputs) >= {key for key, entry in prompt.items() if entry["class_type"] in ("SaveImage", "PreviewAny")}
    return [server.picture(outputs[key]) for key, entry in prompt.items() if entry["class_type"] == "SaveImage"]


def test_the_quickstart_and_the_check_of_its_lora_run(server, object_info):
    before, plain, guided = (pixels(each).astype(int) for each in run(server, object_info, "Quickstart (no download)"))
    assert plain.shape == (64, 64, 3) and numpy.abs(plain - before).max() > 1 and numpy.abs(plain - guided).max() > 1
    file = loras(server)[-1].relative_to(server.base / "output/loras").as_posix()
    assert len(run(server, object_info, "Check a LoRA (no download)", file=file, values="0, 1", preset="auto")) == 2


def test_textual_inversion_and_the_adjustment_of_its_file_run(server, object_info):
    run(server, object_info, "Textual inversion (no download)")
    trained, adjusted, prompt = run(server, object_info, "Embedding adjusted (no download)")
    assert trained != adjusted and trained != prompt


def test_the_self_test_passes(server, object_info):
    assert run(server, object_info, "Training self test (no download)") == []


def test_guidance_compared_runs(server, object_info):
    assert len({*run(server, object_info, "Guidance compared (no download)")}) == 4


def test_w_sweep_runs(server, object_info):
    assert run(server, object_info, "w sweep (no download)", sweep="steps", values="1, 2", preset="quick try") == []
