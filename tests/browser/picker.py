"""The node that loads references in a page of ComfyUI, and what the tests do with it."""

from __future__ import annotations

import base64
import io
import json
import re
import uuid
from pathlib import Path

from PIL import Image, ImageDraw

GRAPH = """async (id) => {
  const empty = { version: 0.4, revision: 0, last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [] }
  await app.loadGraphData({ ...empty, id, config: {}, extra: {} })
  const make = (type, x) => {
    const node = LiteGraph.createNode(type)
    node.pos = [x, 0]
    app.graph.add(node)
    return node
  }
  const loader = make("AnchorLoadReferences", 0)
  const preview = make("PreviewImage", 500)
  loader.connect(0, preview, 0)
  loader.widgets.find(({ name }) => name === "size").value = 64
}"""
VALUE = """() => {
  const graphs = [app.rootGraph ?? app.graph]
  for (const graph of graphs) {
    const loader = graph.nodes.find(({ type }) => type === "AnchorLoadReferences")
    if (loader) return loader.widgets.find(({ name }) => name === "pictures").value
    graphs.push(...graph.nodes.map(({ subgraph }) => subgraph).filter(Boolean))
  }
}"""  # wherever the node is
TRANSFER = """(files) => {
  const transfer = new DataTransfer()
  for (const [name, type, data] of files) {
    transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }))
  }
  return transfer
}"""
PASTE = """(transfer) => {
  const node = app.graph.getNodeById(1)
  app.canvas.selectNode(node)
  app.canvas.current_node = node
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }))
}"""


def png(color: str, size: tuple[int, int] = (96, 64)) -> bytes:
    stream = io.BytesIO()
    picture = Image.new("RGB", size, color)
    ImageDraw.Draw(picture).ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill="white")
    picture.save(stream, "PNG")
    return stream.getvalue()


class Node:
    """The node in a page."""

    def __init__(self, window):
        self.window, self.page = window, window.page
        self.page.set_default_timeout(20_000)  # no training here
        self.root = self.page.locator(".sa-picker").first

    def open(self) -> Node:
        workflow = str(uuid.uuid4())
        self.page.evaluate(GRAPH, workflow)
        self.window.until("(id) => (app.rootGraph ?? app.graph).id === id", workflow)
        self.page.keyboard.press(".")
        self.root.wait_for()
        return self

    def transfer(self, **files: bytes | str):
        entries = []
        for name, data in files.items():
            name = name.replace("__", ".")
            data = data.encode() if isinstance(data, str) else data
            kind = "text/plain" if name.endswith(".txt") else f"image/{name.rsplit('.')[-1]}"
            entries.append([name, kind, base64.b64encode(data).decode()])
        return self.page.evaluate_handle(TRANSFER, entries)

    def drop(self, **files: bytes | str) -> None:
        self.root.dispatch_event("drop", {"dataTransfer": self.transfer(**files)})

    def drop_from_disk(self, x: float, y: float, *places: Path) -> None:
        """As from the computer's file manager, at a point of the page."""
        browser = self.page.context.new_cdp_session(self.page)
        data = {"items": [], "files": [str(place) for place in places], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            browser.send("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": data})

    def paint(self, card) -> None:
        """A stroke in the middle of a picture in ComfyUI's mask editor, and its Save."""
        card.hover()
        card.locator('[data-act="mask"]').click()
        zone = self.page.get_by_test_id("pointer-zone")  # there once the picture is
        zone.wait_for()
        self.page.wait_for_timeout(500)  # it fits the picture into its window, and tells nobody
        box = zone.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        for step in range(8):
            self.page.mouse.move(x + 6 * step, y + 3 * step)
        self.page.mouse.up()
        self.page.locator("button:visible", has_text=re.compile(r"^\s*Save\s*$")).click()
        self.window.until(f"() => ({VALUE})().includes('mask')")

    def entries(self) -> list[dict]:
        return json.loads(self.page.evaluate(VALUE) or "[]")

    def names(self) -> list[str]:
        return [entry["name"].rsplit("/")[-1] for entry in self.entries()]

    def cards(self, count: int):
        """The pictures, once there are that many."""
        self.window.until("(count) => document.querySelectorAll('.sa-pic').length === count", count)
        return self.root.locator(".sa-pic")

    def note(self, text: str) -> str:
        self.root.locator(".sa-note", has_text=text).wait_for()
        return self.root.locator(".sa-note").inner_text()

    def widget(self, name: str):
        return self.page.evaluate(f"app.graph.getNodeById(1).widgets.find((each) => each.name === '{name}').value")
