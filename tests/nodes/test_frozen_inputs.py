"""What saved workflows rely on: each node's inputs and outputs in order, as `frozen_inputs.json` has them.

A workflow restores widgets by their position, links by their slot. So a later version may append inputs and outputs,
but never removes, renames, re-orders or re-types those in the list. To extend the list once a version is out, append
what it added to the end of the node's lists, or a node to the end of the file; nothing else in it changes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfyui import comfy_server

found = comfy_server.find()
needs_comfyui = pytest.mark.skipif(isinstance(found, str), reason=str(found))

FROZEN = json.loads(Path(__file__).with_name("frozen_inputs.json").read_text())
WIDGETS = ("INT", "INT (control_after_generate)", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
"""Types that have a widget; COMFY_DYNAMICCOMBO_V3 has those of the chosen option after its own."""


def inputs(sections: dict) -> list[list]:
    """[name, type, optional] of each input, in order; of a dynamic one its parts too, by option or prefix."""
    entries = []
    for section in ("required", "optional"):
        for name, (kind, options) in sections.get(section, {}).items():
            told = [flag for flag in ("control_after_generate", "forceInput") if options.get(flag)]
            entry = [name, f"{kind} ({told[0]})" if told else kind, section == "optional"]
            if kind == "COMFY_DYNAMICCOMBO_V3":
                entry.append({option["key"]: inputs(option["inputs"]) for option in options["options"]})
            elif kind == "COMFY_AUTOGROW_V3":
                entry.append({options["template"]["prefix"]: inputs(options["template"]["input"])})
            entries.append(entry)
    return entries


def declared(info: dict) -> dict[str, list]:
    """A node of `/object_info` as the list has it."""
    outputs = [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)]
    return {"inputs": inputs(info["input"]), "outputs": outputs}


def changes(frozen: list[list], now: list[list], path: str = "") -> Iterator[str]:
    """What is not as it was, of inputs in order."""
    names = [entry[0] for entry in frozen]
    kept = {entry[0]: entry for entry in now if entry[0] in names}
    if list(kept) != names:
        yield f"{path or 'inputs'}: {names} became {list(kept)}"
    for name, kind, optional, *parts in frozen:
        entry = kept.get(name, [name, kind, optional, *parts])
        if entry[1:3] != [kind, optional]:
            yield f"{path}{name}: {[kind, optional]} became {entry[1:3]}"
        for option, own in parts[0].items() if parts else ():
            if option not in entry[3]:
                yield f"{path}{name}: {option} is gone"
            else:
                yield from changes(own, entry[3][option], f"{path}{name}.{option}.")


def widgets(entries: list[list], chosen: str) -> list[str]:
    """Names by the position of their values in a saved workflow, with `chosen` in dynamic combos."""
    names = []
    for name, kind, _, *parts in entries:
        if kind in WIDGETS:
            names.append(name)
            names += [f"{name}.{part}" for part in widgets(parts[0].get(chosen, []), chosen)] if parts else []
    return names


def broken(frozen: dict[str, list], now: dict[str, list]) -> list[str]:
    """What of saved workflows a node would misread."""
    told = list(changes(frozen["inputs"], now["inputs"]))
    for chosen in {"", *(option for entry in frozen["inputs"] for part in entry[3:] for option in part)}:
        ours, theirs = (widgets(node["inputs"], chosen) for node in (frozen, now))
        if theirs[: len(ours)] != ours:
            told.append(f"widgets {chosen}: {ours} became {theirs}")
    if now["outputs"][: len(frozen["outputs"])] != frozen["outputs"]:
        told.append(f"outputs: {frozen['outputs']} became {now['outputs']}")
    return told


@needs_comfyui
@pytest.mark.parametrize("name", FROZEN)
def test_saved_workflows_fit_the_node(server, name):
    told = broken(FROZEN[name], declared(server.get(f"/object_info/{name}")[name]))
    assert not told, "\n".join(told)


PARTS = {"cfg": [["start", "FLOAT", True]], "mixed": [["share", "FLOAT", True], ["start", "FLOAT", True]]}
NODE = {
    "inputs": [
        ["model", "MODEL", False],
        ["seed", "INT (control_after_generate)", False],
        ["rule", "COMFY_DYNAMICCOMBO_V3", False, PARTS],
        ["lora", "LORA_MODEL", True],
        ["flip", "BOOLEAN", True],
    ],
    "outputs": [["model", "MODEL"], ["file", "STRING"]],
}


CHANGES = {
    "nothing": (lambda i, o: None, ""),
    "appended": (lambda i, o: (i.append(["new", "INT", True]), o.append(["new", "INT"])), ""),
    "a socket in between": (lambda i, o: i.insert(1, ["clip", "CLIP", False]), ""),
    "an option": (lambda i, o: i[2][3].update(new=[]), ""),
    "a widget in between": (lambda i, o: i.insert(4, ["new", "INT", False]), "widgets"),
    "a widget of an option": (lambda i, o: i[2][3]["cfg"].append(["stop", "FLOAT", True]), "widgets cfg"),
    "removed": (lambda i, o: i.pop(3), "inputs"),
    "renamed": (lambda i, o: i[3].__setitem__(0, "adapter"), "inputs"),
    "re-ordered": (lambda i, o: i.insert(0, i.pop(3)), "inputs"),
    "re-typed": (lambda i, o: i[3].__setitem__(1, "STRING"), "lora: "),
    "required": (lambda i, o: i[3].__setitem__(2, False), "lora: "),
    "without its control": (lambda i, o: i[1].__setitem__(1, "INT"), "seed: "),
    "an option removed": (lambda i, o: i[2][3].pop("cfg"), "rule: cfg is gone"),
    "an option's input renamed": (lambda i, o: i[2][3]["mixed"][0].__setitem__(0, "part"), "rule.mixed."),
    "an output in between": (lambda i, o: o.insert(0, ["new", "INT"]), "outputs"),
    "an output removed": (lambda i, o: o.pop(), "outputs"),
}
"""Of a node's inputs and outputs, with how what is said of them begins; "" for what is allowed."""


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_later_version_may_change(name):
    change, message = CHANGES[name]
    now = copy.deepcopy(NODE)
    change(now["inputs"], now["outputs"])
    told = broken(NODE, now)
    assert any(text.startswith(message) for text in told) if message else not told
