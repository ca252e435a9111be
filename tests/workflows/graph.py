"""Workflows in ComfyUI's UI format (0.4): nodes in columns, with the widgets and sockets of `/object_info`."""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
TITLE, SLOT, WIDGET, GAP, MARGIN = 30, 20, 24, 60, 80
GROWS = {
    "PreviewImage": 300, "SaveImage": 280, "PreviewAny": 180, "LoadImage": 300,
    "AnchorTrainLoRA": 420, "AnchorDriftReport": 100, "AnchorCompare": 100, "AnchorLoadReferences": 160,
    "AnchorSaveAdapter": 60, "AnchorAdjustEmbedding": 60, "AnchorAdjustConditioning": 80,
    "AnchorSelfTest": 100, "AnchorCheckup": 100, "AnchorSweep": 450,
}  # fmt: skip
"""What a node is higher than its rows: its picture, text or chart."""


class Out(NamedTuple):
    """An output of a node."""

    node: int
    slot: int


def specs(info: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> (type, options) of a node's inputs, in the order in which the front end makes them."""
    found = {}
    for section in ("required", "optional"):
        for name in info["input_order"].get(section, []):
            kind, *options = info["input"][section][name]
            found[name] = kind, (options[0] if options else {})
    return found


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return isinstance(kind, list) or (kind in WIDGETS and not options.get("forceInput"))


def needed_height(node: dict[str, Any], object_info: dict[str, Any]) -> int:
    """Pixels below its title that the front end gives a node at least."""
    if node["type"] not in object_info:
        return node["size"][1]
    sockets = [slot for slot in node["inputs"] if "widget" not in slot]
    height = 20 + SLOT * max(len(sockets), len(node["outputs"])) + GROWS.get(node["type"], 0)
    known = specs(object_info[node["type"]])
    for slot in node["inputs"]:
        if "widget" in slot:
            options = known.get(slot["name"], (None, {}))[1]
            height += 90 if options.get("multiline") else WIDGET
            height += WIDGET if options.get("control_after_generate") else 0
    return height


class Graph:
    """A workflow that is written node by node, column by column."""

    def __init__(self, object_info: dict[str, Any], version: str):
        self.object_info, self.version = object_info, version
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.inputs: list[list[Any]] = []
        self.outputs: list[str] = []
        self._x, self._y, self._width = 0, 0, 0
        self.column()

    def column(self, width: int = 340) -> None:
        """The nodes that follow stand right of those before."""
        self._x, self._y, self._width = self._x + self._width + MARGIN, 0, width

    def note(self, text: str, height: int, title: str = "Start here") -> None:
        node = {"inputs": [], "outputs": [], "properties": {}, "widgets_values": [text]}
        self._place("MarkdownNote", node, title, height)

    def add(self, type_: str, title: str | None = None, models: list | None = None, **values: Any) -> list[Out]:
        """A node's outputs. `values`: of its widgets by name, or an `Out`, which is linked; `a__b` for `a.b`.

        Raises:
            ValueError: a value that the node has no input for.
        """
        values = {name.replace("__", "."): value for name, value in values.items()}
        sockets, widgets, written = [], [], []
        known = self._rows(type_, values)
        if set(values) - set(known):
            raise ValueError(f"{type_} has no {', '.join(sorted(set(values) - set(known)))}")
        for name, (kind, options) in known.items():
            given = values.get(name, options.get("default", ""))
            slot = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "link": None}
            if is_widget(kind, options):
                widgets.append(slot | {"widget": {"name": name}})
                choices = kind if isinstance(kind, list) else [_key(each) for each in options.get("options", [])]
                written.append(choices[0] if choices and name not in values and given not in choices else given)
                if isinstance(given, Out):
                    written[-1] = options.get("default", "")
                if options.get("control_after_generate"):
                    written.append("fixed")
            else:
                sockets.append(slot)
        about = {"Node name for S&R": type_, "cnr_id": "comfy-core", "ver": "0.33.0"}
        if type_.startswith("Anchor"):
            about |= {"cnr_id": "semantic-anchor", "ver": self.version}
        node = {
            "inputs": sockets + widgets,
            "outputs": [
                {"name": name, "type": kind if isinstance(kind, str) else "COMBO", "links": []}
                for name, kind in zip(self.object_info[type_]["output_name"], self.object_info[type_]["output"])
            ],
            "properties": about | ({"models": models} if models else {}),
            "widgets_values": written,
        }
        id_ = self._place(type_, node, title)
        for number, slot in enumerate(node["inputs"]):
            if isinstance(values.get(slot["name"]), Out):
                self._link(values[slot["name"]], id_, number, slot)
        return [Out(id_, number) for number in range(len(node["outputs"]))]

    def app(self, *shown: tuple[list[Out], str] | tuple[int, str], outputs: list[int]) -> None:
        """What app mode shows: inputs by (node, name), and the nodes whose pictures are the results."""
        self.inputs = [[str(node[0].node if isinstance(node, list) else node), name] for node, name in shown]
        self.outputs = [str(each) for each in outputs]

    @property
    def last(self) -> int:
        """The id of the node that was added last."""
        return self.nodes[-1]["id"]

    def json(self, title: str, as_app: bool = False) -> dict[str, Any]:
        linear = {"linearMode": as_app, "linearData": {"inputs": self.inputs, "outputs": self.outputs}}
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"semantic-anchor/{title}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": linear,
            "version": 0.4,
        }

    def _rows(self, type_: str, values: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
        """`specs`, with the inputs that a dynamic one opens under the given values."""
        rows = {}
        for name, (kind, options) in specs(self.object_info[type_]).items():
            if kind == "COMFY_AUTOGROW_V3":
                template = options["template"]
                ((inner, *_),) = template["input"]["required"].values()
                taken = [each for each in values if each.startswith(f"{name}.")]
                count = min(len(taken) + 1, template["max"])
                rows |= {f"{name}.{template['prefix']}{number}": (inner, {}) for number in range(count)}
                continue
            rows[name] = kind, options
            if kind == "COMFY_DYNAMICCOMBO_V3":
                key = values.get(name, options["options"][0]["key"])
                (option,) = (each for each in options["options"] if each["key"] == key)
                for part in option["inputs"].values():
                    rows |= {f"{name}.{each}": (spec[0], (spec + [{}])[1]) for each, spec in part.items()}
        return rows

    def _link(self, source: Out, target: int, number: int, slot: dict[str, Any]) -> None:
        out = self.nodes[source.node - 1]["outputs"][source.slot]
        self.links.append([len(self.links) + 1, source.node, source.slot, target, number, out["type"]])
        out["links"].append(len(self.links))
        slot["link"] = len(self.links)

    def _place(self, type_: str, node: dict[str, Any], title: str | None, height: int = 0) -> int:
        id_ = len(self.nodes) + 1
        node = {"id": id_, "type": type_, "pos": [self._x, self._y], "size": [self._width, height], **node}
        node |= {"flags": {}, "order": id_ - 1, "mode": 0} | ({"title": title} if title else {})
        node["size"][1] = needed_height(node, self.object_info)
        self.nodes.append(node)
        self._y += node["size"][1] + TITLE + GAP
        return id_


def _key(option: Any) -> Any:
    return option["key"] if isinstance(option, dict) else option
