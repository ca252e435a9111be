"""The look at a training before its run: what the route says of it, and of what it is not told."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from anchor_core.training.purposes import purpose_options
from tests.comfyui import comfy_server
from tests.comfyui.comfy_server import ROOT, run_script
from tests.nodes.graphs import node, training

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

SANDBOX = {"type": "AnchorSandboxModel"}
CONCEPT = {"token": "sks", "class_word": "star", "template": "a photo of a {}"}
PICTURES = {"type": "AnchorLoadReferences", "references": "sandbox/pip"}


def look(server, **said) -> dict:
    status, answer = server.post("/semantic_anchor/look", said)
    assert status == 200, answer
    return answer


def mistakes(server, **said) -> list[tuple[str, str]]:
    return [(each["about"], each["text"]) for each in look(server, **said)["mistakes"]]


def test_a_training_without_a_mistake_is_told_what_its_preset_takes(server):
    said = {"concept": CONCEPT, "pictures": PICTURES, "model": SANDBOX, "options": {}, "loras": []}
    for preset in ("auto", "subject"):
        told = look(server, training={"preset": preset, "w": 0.5, "steps": 9, "name": "x"}, **said)
        assert told == {"family": "sandbox", "chosen": purpose_options(preset, "sandbox", 5), "mistakes": []}
    assert look(server, training={"preset": "manual"}, **said)["chosen"] == {}
    # What is not known is not guessed: another loader, the pictures of other nodes.
    assert look(server, training={"preset": "auto"})["chosen"] == {}
    assert look(server, training={"preset": "subject"}, model=SANDBOX, pictures={"type": "LoadImage"})["chosen"] == {}


def test_each_mistake_is_said_of_the_node_that_has_it(server):
    (server.base / "input/nothing").mkdir(exist_ok=True)
    manual = {"preset": "manual"}
    cases = {
        ("concept", "class_word is ''"): {"concept": CONCEPT | {"class_word": ""}},
        ("concept", "template is 'a photo'"): {"concept": CONCEPT | {"template": "a photo"}},
        ("pictures", "references folder"): {"pictures": PICTURES | {"references": "nothing"}},
        ("pictures", "references is '../output'"): {"pictures": PICTURES | {"references": "../output"}},
        ("options", "schedule is 'cosine'"): {"options": {"optimizer": "schedule_free", "schedule": "cosine"}},
        ("options", "warmup is 50"): {"training": manual | {"steps": 10}, "options": {"warmup": 50}},
        ("training", "rank is 500, but layer"): {"training": manual | {"rank": 500}, "model": SANDBOX},
        ("options", "objective is 'class_diffusion'"): {"training": manual | {"objective": "class_diffusion"}},
    }
    for (about, begins), said in cases.items():
        ((where, text),) = mistakes(server, **({"training": manual} | said))
        assert (where, text[: len(begins)]) == (about, begins) and "\n" not in text
    assert mistakes(server, training=manual | {"rank": 8}, model=SANDBOX) == []


def test_a_model_is_known_by_the_header_of_its_file(server):
    """So is its narrowest layer; and a LoRA that says it is for another family is told."""
    checkpoints, networks = (server.base / "models" / each for each in ("checkpoints", "diffusion_models"))
    for folder in (checkpoints, networks):
        folder.mkdir(parents=True, exist_ok=True)
    run_script(ROOT / "tests/comfyui/headers_of_models.py", checkpoints, folder=ROOT)
    (checkpoints / "flux.safetensors").rename(networks / "flux.safetensors")
    (checkpoints / "broken.safetensors").write_bytes(b"no header")
    told = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    save_file({"x": torch.zeros(1)}, server.base / "models/loras/of-sdxl.safetensors", told)

    for family, type_, widget, width in (
        ("sd1", "CheckpointLoaderSimple", "ckpt_name", 320),
        ("sdxl", "CheckpointLoaderSimple", "ckpt_name", 640),
        ("flux", "UNETLoader", "unet_name", 3072),
    ):
        model = {"type": type_, widget: f"{family}.safetensors"}
        answer = look(
            server, training={"preset": "auto"}, model=model, loras=["of-sdxl.safetensors", "none.safetensors"]
        )
        assert answer["family"] == family and answer["chosen"] == purpose_options("auto", family, 1)
        wrong = f"of-sdxl.safetensors is a LoRA for sdxl, but the model is of {family}; take another model or LoRA"
        assert [each["text"] for each in answer["mistakes"]] == ([] if family == "sdxl" else [wrong])
        manual = {"preset": "manual", "rank": width + 1, "layers": "attention"}
        ((_, text),) = mistakes(server, training=manual, model=model)
        assert text.startswith(f"rank is {width + 1}, but layer ") and f"is {width} wide" in text
        assert mistakes(server, training=manual | {"rank": width}, model=model) == []
    for name in ("broken.safetensors", "../sd1.safetensors", "none.safetensors"):
        assert look(server, model={"type": "CheckpointLoaderSimple", "ckpt_name": name})["family"] == ""


def test_it_takes_no_other_body_method_or_origin(server):
    for body in ([], {"training": "text"}, {"options": 3}):
        assert server.post("/semantic_anchor/look", body)[0] == 400
    for said in ({"pictures": PICTURES | {"references": 3}}, {"concept": {"token": 3}}, {"loras": [3]}):
        assert look(server, **said)["mistakes"] == []


def test_a_concept_that_says_nothing_is_refused_before_the_run(server):
    prompt = training() | {"5": node("PreviewAny", source=["4", 4])}
    prompt["3"]["inputs"]["class_word"] = " "
    with pytest.raises(ValueError, match="class_word is ' ', but it takes a word or two"):
        server.queue(prompt)


def test_pictures_that_the_node_holds_are_counted(server):
    held = PICTURES | {"references": "[pictures on the node]"}
    for pictures, said in (('[{"name": "a.png"}, {"name": "b.png"}]', 60), ("{", None), ("3", None)):
        told = look(server, training={"preset": "subject"}, model=SANDBOX, pictures=held | {"pictures": pictures})
        assert told["chosen"].get("steps") == said and told["mistakes"] == []
    ((about, text),) = mistakes(server, pictures=held | {"pictures": "[]"})
    assert about == "pictures" and text.startswith("pictures is empty; drop some")


def test_a_folder_of_pictures_is_counted(server):
    folder = server.base / "input/three"
    folder.mkdir(exist_ok=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
    told = look(server, training={"preset": "subject"}, model=SANDBOX, pictures=PICTURES | {"references": "three"})
    assert told["chosen"]["steps"] == 90
