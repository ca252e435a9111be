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
from tests.nodes.every_node import all_prompts, declared
from tests.nodes.graphs import node
from tests.reliability.comfy import install, outside
from tests.reliability.trainings import Tally, check_sentence

found = comfy_server.find()
pytestmark = [pytest.mark.long, pytest.mark.skipif(isinstance(found, str), reason=str(found))]

SECONDS = 10
CASES = 8  # of each input
ODD = (
    None, True, False, 0, 1, -1, 2, 3.5, 1e-9, 1e300, -1e300, 10**18, 2**63, 2**64, 10**30, float("nan"), float("inf"),
    "", " ", "0", "1e5", "nan", "None", "sks", "a star", "two words", "../../outside", "/etc/passwd", "/outside", "..",
    "C:\\Windows", "\\\\server\\share", "a/b/c", "a\0b", "\x1b[2J", "\u202e", "🐕" * 50, "x" * 300, "x" * 100_000, "{}",
    "(" * 500, "(a+)+$", "[", "a photo of a {}", "{0}{1}", "%s%n", "embedding:pip", "<lora:x:1>", "sandbox/pip",
    "../input", ".", "con", [], {}, [None], [[]], ["1"], ["1", 0], ["2", 0], ["3", 0], ["9", 0], ["4", 0], ["999", 0],
    ["1", 99], ["1", -1], ["1", "0"], {"a": 1}, {"__value__": [1, 2]}, [1, 2, 3],
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = comfy_server.ComfyServer(*found, install(tmp_path_factory.mktemp("comfyui")))
    yield server
    server.stop()


def is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2


def targets(prompts: dict[str, dict], infos: dict) -> list[tuple[str, str, str]]:
    """Each input of each node of ours once: the prompt, the node in it and the input."""
    found = {}
    for name, prompt in prompts.items():
        for number, each in prompt.items():
            # A LoRA that is loaded beside is not asked for by every prompt.
            if each["class_type"].startswith("Anchor") and number != "9":
                for input_ in declared(infos, each["class_type"], each["inputs"]):
                    found.setdefault((each["class_type"], input_), (name, number, input_))
    without = {each for each in infos if each.startswith("Anchor")} - {ours for ours, _ in found}
    assert without == {"AnchorSandboxModel"}, without  # which has no input
    return sorted(found.values())


def changed(prompt: dict, number: str, name: str, draw: random.Random) -> dict:
    """The input has another value, none, or one that a node of any type hands on."""
    prompt = {key: {**each, "inputs": dict(each["inputs"])} for key, each in prompt.items()}
    inputs, value = prompt[number]["inputs"], draw.choice(ODD)
    if name == "rule" and is_link(value):
        # ComfyUI compares no link with a dynamic combo, and its worker ends for good at one to an output that is not
        # there (IndexError in add_strong_link), as it does with any input that a node does not declare.
        value = "1"
    how = draw.choices(("constant", "handed on", "left out"), (12, 7, 1))[0]
    if how == "left out":
        inputs.pop(name, None)
    elif how == "constant":
        inputs[name] = value
    else:
        prompt["50"] = node("OddAny", value=value)
        inputs[name] = ["50", 0]
    return prompt


def test_values(server, tmp_path):
    sent, infos = all_prompts(server), server.get("/object_info")
    for name, prompt in sent.items():  # they run, and the model is loaded
        if name not in infos:
            server.run(prompt)
    places = targets(sent, infos)
    tally = Tally("workflow values", CASES * len(places))

    def one(draw: random.Random, folder) -> str:
        target, number, name = places[tally.seed % len(places)]
        where = f"{sent[target][number]['class_type']}.{name}"
        prompt = changed(sent[target], number, name, draw)
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
        # Of the node that refused it: pictures of a small size, say, are refused by the training.
        known = infos[said["node_type"]]["input"]
        names = [name, *known.get("required", {}), *known.get("optional", {}), *infos[said["node_type"]]["output_name"]]
        words = "|".join(re.escape(word) for each in names for word in re.split(r"[_. ]", each))
        try:
            check_sentence(ValueError(message))
            assert re.search(words, message, re.IGNORECASE), f"names no input: {message}"
        except AssertionError as error:
            raise AssertionError(f"{where}: {said['exception_type']}: {error}") from error
        return "refused in one sentence"

    try:
        tally.run(one, tmp_path)
    finally:
        nodes = {sent[target][number]["class_type"] for target, number, _ in places}
        print(f"{len(places)} inputs of {len(nodes)} nodes; outside of the folder: {len(outside(server.base))}")
    assert not outside(server.base), outside(server.base)[:20]
