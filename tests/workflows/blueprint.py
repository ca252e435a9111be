"""The subgraph blueprint "Train a subject": concept, training and guidance in one node."""

from __future__ import annotations

import uuid
from typing import Any

from tests.workflows.graph import Graph, Out

NAME = "Train a subject"
ABOUT = (
    "Teaches a model a subject from a few pictures, held to what the model knows of its class, and gives the model "
    "under personalization guidance, ready for KSampler."
)
FACE = (
    ("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE"), ("references", "ANCHOR_REFERENCES"),
    ("token", "STRING"), ("class_word", "STRING"), ("w", "FLOAT"), ("steps", "INT"), ("learning_rate", "FLOAT"),
    ("rank", "INT"), ("name", "STRING"),
)  # fmt: skip
SETTINGS = {"steps": 500, "learning_rate": 1e-4, "rank": 16, "batch_size": 1, "name": "subject", "preview_every": 100}


def blueprint(object_info: dict[str, Any], version: str) -> dict[str, Any]:
    """The file of the blueprint: a workflow of one node, and the subgraph that it stands for."""
    inside = Graph(object_info, version)
    concept = inside.add("AnchorConcept")
    inside.column(380)
    trained = inside.add("AnchorTrainLoRA", concept=concept[0], **SETTINGS)
    inside.column()
    guided = inside.add("AnchorGuidance", lora=trained[1], rule="personalization")
    results = (
        ("model", trained[0]), ("guided model", guided[0]), ("clip", trained[5]), ("lora", trained[1]),
        ("history", trained[3]), ("file", trained[4]), ("subject_prompt", concept[1]), ("class_prompt", concept[2]),
    )  # fmt: skip
    links = [
        dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link)) for link in inside.links
    ]

    def link(origin: Out, target: Out, kind: str) -> int:
        links.append(
            {
                "id": len(links) + 1,
                "origin_id": origin.node,
                "origin_slot": origin.slot,
                "target_id": target.node,
                "target_slot": target.slot,
                "type": kind,
            }
        )
        return len(links)

    inputs, outputs = [], []
    for number, (name, kind) in enumerate(FACE):
        ids = []
        for node in inside.nodes:
            for place, slot in enumerate(node["inputs"]):
                if slot["name"] == name and slot["link"] is None:
                    slot["link"] = link(Out(-10, number), Out(node["id"], place), kind)
                    ids.append(slot["link"])
        about = {"id": _id(f"input {name}"), "name": name, "type": kind}
        inputs.append(about | {"linkIds": ids, "pos": [-120, 20 * number]})
    for number, (name, out) in enumerate(results):
        kind = inside.nodes[out.node - 1]["outputs"][out.slot]["type"]
        ids = [link(out, Out(-20, number), kind)]
        inside.nodes[out.node - 1]["outputs"][out.slot]["links"] += ids
        about = {"id": _id(f"output {name}"), "name": name, "type": kind}
        outputs.append(about | {"linkIds": ids, "pos": [1600, 20 * number]})
    widgets = [name for name, kind in FACE if kind in ("STRING", "INT", "FLOAT")]
    subgraph = {
        "id": _id("subgraph"),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(inside.nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": NAME,
        "inputNode": {"id": -10, "bounding": [-240, -20, 120, 20 * len(FACE) + 40]},
        "outputNode": {"id": -20, "bounding": [1580, -20, 120, 20 * len(results) + 40]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": inside.nodes,
        "groups": [],
        "links": links,
        "extra": {},
        "category": "Training",
        "description": ABOUT,
    }
    node = {
        "id": 1,
        "type": subgraph["id"],
        "pos": [0, 0],
        "size": [400, 420],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {"name": name, "type": kind, "link": None} | ({"widget": {"name": name}} if name in widgets else {})
            for name, kind in FACE
        ],
        "outputs": [{"name": each["name"], "type": each["type"], "links": []} for each in outputs],
        "title": NAME,
        "properties": {
            "proxyWidgets": [["-1", name] for name in widgets],
            "cnr_id": "semantic-anchor",
            "ver": version,
        },
        "widgets_values": [
            {"token": "sks", "class_word": "dog", "w": 0.5}.get(name, SETTINGS.get(name)) for name in widgets
        ],
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {
            "BlueprintDescription": ABOUT,
            "BlueprintSearchAliases": ["dreambooth", "train lora", "personalization", "semantic anchor"],
        },
    }


def _id(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"semantic-anchor/{NAME}/{name}"))
