"""What is not of an input's type is refused at the door of every node, whoever hands it on, in one sentence."""

from __future__ import annotations

import shutil
import time

import pytest
from safetensors.torch import save_file

from tests.comfyui import comfy_server, odd_nodes
from tests.nodes.every_node import all_prompts, declared
from tests.nodes.graphs import node

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    comfy_server.install_pack(base / "custom_nodes" / comfy_server.PACK)
    (base / "custom_nodes/odd").mkdir()
    shutil.copy(odd_nodes.__file__, base / "custom_nodes/odd/__init__.py")
    (base / "models/loras").mkdir(parents=True)
    (base / "models/embeddings").mkdir(parents=True)
    save_file(odd_nodes.lora(), base / "models/loras/plain.safetensors")
    save_file({"emb_params": odd_nodes.torch.ones(1, 128)}, base / "models/embeddings/pip.safetensors")
    server = comfy_server.ComfyServer(*found, base)
    yield server
    server.stop()


def sent(server):
    """Prompts with one input of another type, by whether it is a constant, and what the message has to begin with."""
    infos = server.get("/object_info")
    seen = set()
    for prompt in all_prompts(server).values():
        for number, each in prompt.items():
            ours = each["class_type"]
            if not ours.startswith("Anchor") or number == "9":  # which not every prompt asks for
                continue
            for name, (kind, *_) in declared(infos, ours, each["inputs"]).items():
                if (ours, name) in seen:
                    continue
                seen.add((ours, name))
                constants = [] if isinstance(kind, list) or kind in WIDGETS else ["text", {"__value__": [{}, {}]}]
                for value in [*constants, ["50", 0]]:
                    changed = {**prompt, number: node(ours, **each["inputs"] | {name: value})}
                    changed["50"] = node("OddAny", value={"a": 1})
                    yield ours, name, value, changed
    missing = {each for each in infos if each.startswith("Anchor") and infos[each]["input"].get("required")}
    assert not missing - {ours for ours, _ in seen}


def test_every_input_of_every_node(server):
    cases = [(ours, name, value, server.queue(prompt)) for ours, name, value, prompt in sent(server)]
    wrong = []
    for ours, name, value, ident in cases:
        message = comfy_server.failure(server.wait(ident)) or "it ran"
        if not message.startswith(f"{name} is ") or "but it takes" not in message or "\n" in message:
            wrong.append(f"{ours}.{name}, {value!r}: {message}")
    assert not wrong, "\n".join(wrong)
    assert len(cases) > 150


def test_long_texts_and_control_characters_do_not_reach_messages(server):
    prompt = all_prompts(server)["embedding"]
    for text in ("x" * 100_000, "\x1b[2J\u202e\n" * 2000):
        prompt["4"]["inputs"]["class_word"] = text
        with pytest.raises(RuntimeError, match="^class_word is ") as caught:
            server.run(prompt)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1300


@pytest.mark.parametrize(
    ("target", "much"),
    [("drift", {"timesteps": 100, "noises": 64}), ("selftest", {"resolution": 128, "batch_size": 8, "steps": 100})],
)
def test_what_takes_long_can_be_cancelled(server, target, much):
    prompt = all_prompts(server)[target]
    prompt["4"]["inputs"] |= much
    ident = server.queue(prompt)
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(2)
    server.post("/interrupt", {})
    assert comfy_server.failure(server.wait(ident, 60)) == "interrupted"
    assert server.run(all_prompts(server)["drift"])
