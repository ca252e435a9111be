"""Workflow values by the hundred, sent to every node of a real ComfyUI: each runs, or is refused in one sentence.

ComfyUI checks types and ranges itself and says what is wrong; what it lets through reaches the nodes. Nothing is
written outside of the server's folder, and a prompt that goes on for longer can be cancelled.
"""

from __future__ import annotations

import random
import re
import time

import pytest

from tests.comfyui import comfy_server
from tests.nodes.graphs import node, training, with_options
from tests.nodes.test_odd_inputs import prompts
from tests.reliability.comfy import install, outside
from tests.reliability.trainings import Tally, check_sentence

found = comfy_server.find()
pytestmark = [pytest.mark.long, pytest.mark.skipif(isinstance(found, str), reason=str(found))]

SECONDS = 10
ODD = (
    None, True, False, 0, 1, -1, 2, 3.5, 1e-9, 1e300, -1e300, 10**18, 2**63, 2**64, 10**30, float("nan"), float("inf"),
    "", " ", "0", "1e5", "nan", "None", "sks", "a star", "two words", "../../outside", "/etc/passwd", "/outside", "..",
    "C:\\Windows", "\\\\server\\share", "a/b/c", "a\0b", "\x1b[2J", "\u202e", "🐕" * 50, "x" * 300, "x" * 100_000, "{}",
    "(" * 500, "(a+)+$", "[", "a photo of a {}", "{0}{1}", "%s%n", "embedding:pip", "<lora:x:1>", "sandbox/pip",
    "../input", ".", "con", [], {}, [None], [[]], ["1"], ["1", 0], ["2", 0], ["3", 0], ["9", 0], ["4", 0], ["999", 0],
    ["1", 99], ["1", -1], ["1", "0"], {"a": 1}, {"__value__": [1, 2]}, [1, 2, 3],
)  # fmt: skip
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
LINKS = tuple(value for value in ODD if value is None or (isinstance(value, list) and len(value) == 2))
"""What is sent to sockets: ComfyUI hands constants for them on unseen, to its own nodes too; no canvas makes any."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = comfy_server.ComfyServer(*found, install(tmp_path_factory.mktemp("comfyui")))
    yield server
    server.stop()


def all_prompts(server) -> dict[str, dict]:
    """Prompts in which every node of the pack stands once or more."""
    found = prompts() | {"options": with_options(server, {"steps": 1, "preview_every": 0})}
    images = {**training(steps=1, preview_every=0), "5": node("PreviewAny", source=["4", 4])}
    images["6"] = node("AnchorImageReferences", images=["2", 0], size=64)
    images["4"]["inputs"]["references"] = ["6", 0]
    del images["4"]["inputs"]["images"]
    found["images"] = images
    for prompt in found.values():  # a LoRA that all take
        prompt |= {"9": node("AnchorLoadAdapter", file="plain.safetensors")} if "9" in prompt else {}
    found["load"]["4"]["inputs"]["file"] = "plain.safetensors"
    return found


def changed(prompt: dict, infos: dict, draw: random.Random) -> tuple[dict, str]:
    """One input of one of our nodes has another value, or none; gives the input's name too."""
    prompt = {number: {**each, "inputs": dict(each["inputs"])} for number, each in prompt.items()}
    ours = [each for each in prompt.values() if each["class_type"].startswith("Anchor")]
    ours = [each for each in ours if each["class_type"] != "AnchorSandboxModel"]  # which has no input
    chosen = draw.choice(ours)
    known = infos[chosen["class_type"]]["input"]
    name = draw.choice(sorted({*chosen["inputs"], *known.get("required", {}), *known.get("optional", {})}))
    (kind, *_) = {**known.get("required", {}), **known.get("optional", {})}.get(name, ("",))
    values = ODD if isinstance(kind, list) or kind in WIDGETS else LINKS
    if draw.random() < 0.05:
        chosen["inputs"].pop(name, None)
    else:
        chosen["inputs"][name] = draw.choice(values)
    return prompt, f"{chosen['class_type']}.{name}"


def test_values(server, tmp_path):
    sent, infos = all_prompts(server), server.get("/object_info")
    server.run(sent["train"])  # so that the model is loaded
    nodes: set[str] = set()

    def one(draw: random.Random, folder) -> str:
        prompt, where = changed(sent[draw.choice(sorted(sent))], infos, draw)
        nodes.add(where.split(".")[0])
        status, answer = server.post("/prompt", {"prompt": prompt})
        if status != 200:
            assert status == 400 and answer["error"]["message"], f"{where}: {status} {answer}"
            return "refused by ComfyUI"
        ident, end = answer["prompt_id"], time.monotonic() + SECONDS
        while time.monotonic() < end and not (history := server.get(f"/history/{ident}")):
            time.sleep(0.05)
        if not history:
            server.post("/interrupt", {})
        entry = server.wait(ident, 120)
        message = comfy_server.failure(entry)
        if message is None or message == "interrupted":
            return "ran" if message is None else "went on, and was cancelled"
        (said,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
        if not any("semantic-anchor" in line for line in said["traceback"]):
            return "refused by another node"
        name = where.split(".")[1]
        words = "|".join(re.split(r"[_. ]", name))
        try:
            check_sentence(ValueError(message))
            assert re.search(rf"{words}", message), f"names no input: {message}"
        except AssertionError as error:
            raise AssertionError(f"{where}: {said['exception_type']}: {error}") from error
        return "refused in one sentence"

    tally = Tally("workflow values", 300)
    try:
        tally.run(one, tmp_path)
    finally:
        print(f"nodes: {len(nodes)}, {', '.join(sorted(nodes))}; outside of the folder: {len(outside(server.base))}")
    assert not outside(server.base), outside(server.base)[:20]
