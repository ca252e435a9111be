"""LoRA Check-up in a real ComfyUI: what it writes, and that the command line says the same of the same file."""

from __future__ import annotations

import json

import pytest
import torch

from anchor_core import cli
from anchor_core.adapters.config import AdapterConfig
from anchor_core.adapters.file import save_adapter, to_file_keys
from tests.comfyui import comfy_server
from tests.evaluation.test_checkup_backends import same
from tests.nodes.graphs import node, pixels

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

METADATA = {"anchor.subject_prompt": "a photo of a sks star", "anchor.class_prompt": "a photo of a star"}
KOHYA = {"ss_tag_frequency": json.dumps({"10_sks star": {}})}
KINDS = {"lora": METADATA, "dora": METADATA, "lokr": KOHYA, "text": METADATA, "silent": {}}


@pytest.fixture(scope="module")
def files(server, weights):
    """LoRA files at random weights in output/loras, by name."""
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser

    denoiser, made = DiffusersDenoiser.from_pretrained(weights), {}
    for name, metadata in KINDS.items():
        kind = name if name in ("dora", "lokr") else "lora"
        adapter = denoiser.attach(AdapterConfig(kind=kind, rank=2, text_encoder=name == "text"))
        generator = torch.Generator().manual_seed(len(made))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        made[name] = server.base / f"output/loras/checked/{name}.safetensors"
        save_adapter(made[name], to_file_keys(adapter, denoiser.file_keys()), metadata)
        denoiser.detach()
    return made


def checked(file: str, **changes) -> dict:
    """The sandbox model (1), references (2), a file (3) and its check-up (4)."""
    inputs = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "lora": ["3", 0], "subject_prompt": "",
        "class_prompt": "", "budget": 0.7, "timesteps": 2, "noises": 1, "count": 1, "steps": 2, "resolution": 64,
        "seed": 0, "name": file,
    }  # fmt: skip
    return {
        "1": node("AnchorSandboxModel"),
        "2": node("AnchorLoadReferences", references="sandbox/pip", size=64),
        "3": node("AnchorLoadAdapter", file=f"checked/{file}.safetensors"),
        "4": node("AnchorCheckup", **inputs | changes),
        "5": node("PreviewAny", source=["4", 1]),
        "6": node("SaveImage", images=["4", 0], filename_prefix="checkup"),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pip")
    assert cli.main(["sandbox", "subject", "pip", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", ["lora", "dora", "lokr", "text"])
def test_the_node_and_the_command_line_say_the_same(server, files, pictures, weights, tmp_path, name):
    server.run(checked(name, images=["2", 0]))
    theirs = json.loads((server.base / f"output/checkups/{name}_00001_.json").read_text())
    given = ["--model", str(weights), "--references", str(pictures), "--timesteps", "2", "--out", str(tmp_path)]
    assert cli.main(["checkup", str(files[name]), *given]) == 0
    ours = json.loads((tmp_path / "report.json").read_text())
    for report in (ours, theirs):
        del report["adapter"]
        report["measured_on"] = {key: report["measured_on"][key] for key in ("latents", "pictures", "timesteps")}
    same(ours, theirs)
    assert ours["prompts"]["class_prompt"] == "a photo of a star" and ours["with_trigger"]["change"] > 0
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_it_shows_a_page_and_writes_it(server, files):
    output = server.run(checked("lora", name="my page"))
    assert pixels(server.picture(output["6"])).shape[1] > 1000
    (page,) = (server.base / "output/checkups").glob("my page_*.html")
    assert "made by the untouched model" in page.read_text(encoding="utf-8")
    told = output["4"]["text"][0]
    assert told.splitlines()[0] in output["5"]["text"][0] and "strength" in told


def test_a_lora_that_tells_no_class_is_asked_for_it(server, files):
    before = sorted((server.base / "output").rglob("silent*"))
    with pytest.raises(RuntimeError, match="class_prompt is empty and the file does not tell it"):
        server.run(checked("silent"))
    assert sorted((server.base / "output").rglob("silent*")) == before
    output = server.run(checked("silent", class_prompt="a photo of a star"))
    assert "No prompt with its trigger word is known" in output["4"]["text"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"name": "../out"}, "name is '../out'"), ({"resolution": 62}, "resolution is 62x62")],
)
def test_wrong_input_is_one_line(server, files, changes, message):
    with pytest.raises(RuntimeError, match=message):
        server.run(checked("lora", **changes))
