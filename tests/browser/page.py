"""A page of ComfyUI in Chromium, and what the tests do in it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NODE = "AnchorTrainLoRA"
SECONDS = 180

GRAPH = """async ([id, trainings]) => {
  const empty = { version: 0.4, revision: 0, last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [] }
  await app.loadGraphData({ ...empty, id, config: {}, extra: {} })
  const make = (type, x, y, values) => {
    const node = LiteGraph.createNode(type)
    node.pos = [x, y]
    app.graph.add(node)
    for (const [name, value] of Object.entries(values)) node.widgets.find((each) => each.name === name).value = value
    return node
  }
  const link = (from, output, to, name) => from.connect(output, to, to.inputs.findIndex((each) => each.name === name))
  const model = make("AnchorSandboxModel", 0, 0, {})
  const pictures = make("AnchorLoadReferences", 0, 150, { references: "sandbox/pip", size: 64 })
  const concept = make("AnchorConcept", 0, 420, { token: "sks", class_word: "star" })
  trainings.forEach(({ options, ...values }, i) => {
    const train = make("AnchorTrainLoRA", 340 + 720 * i, 0, values)
    const shown = make("PreviewAny", 740 + 720 * i, 0, {})
    if (options) link(make("AnchorTrainOptions", -400, 0, options), 0, train, "options")
    ;["model", "clip", "vae"].forEach((name, output) => link(model, output, train, name))
    link(pictures, 0, train, "images")
    link(concept, 0, train, "concept")
    link(train, 4, shown, "source")
  })
}"""

# A page stores its graph for a reload where it notices a change, which it does not where a script makes it.
KEEP = """() => {
  const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker
  ;(tracker.captureCanvasState ?? tracker.checkState).call(tracker)
}"""

COLUMNS = """(canvas) => {
  const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
  const columns = new Set()
  for (let i = 0; i < width * height; i++) {
    const [r, g, b, a] = data.subarray(4 * i, 4 * i + 4)
    if (a > 200 && Math.abs(r - 0x4a) < 30 && Math.abs(g - 0x9e) < 30 && Math.abs(b - 0xda) < 30) columns.add(i % width)
  }
  return columns.size / width
}"""


def chromium_path(playwright) -> Path:
    """The Chromium that CHROMIUM names, the system's, or where Playwright puts its own; it need not be there."""
    named = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    return Path(named or playwright.chromium.executable_path)


class Window:
    """A browser of its own, with its own storage, on a server's page."""

    def __init__(self, chromium, server, routed: Mapping[str, Callable] | None = None):
        self.server, self.errors, self.scripts = server, [], []
        self.page = chromium.new_context(viewport={"width": 1500, "height": 1400}).new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("request", self._request)
        for pattern, handler in (routed or {}).items():
            self.page.route(pattern, handler)
        self.open()

    def _console(self, message) -> None:
        """Errors that our files or routes are in; ComfyUI's own page has others."""
        where = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and "semantic" in where:
            self.errors.append(where)

    def _request(self, request) -> None:
        """The pack's scripts, in the order in which the page asks for them."""
        if "/extensions/semantic" in request.url:
            self.scripts.append(request.url.split("/")[-1])

    def open(self) -> None:
        self.page.goto(f"http://127.0.0.1:{self.server.port}")
        self.until(f"!!(window.app?.extensionManager && app.graph && window.LiteGraph?.registered_node_types.{NODE})")
        self.until("!!app.extensionManager.workflow.activeWorkflow?.changeTracker")  # its own first graph is there

    def until(self, script: str, argument: Any = None) -> Any:
        """The value of a script once it is true."""
        return self.page.wait_for_function(script, arg=argument).json_value()

    def build(self, *trainings: dict, workflow: str | None = None) -> str:
        """A graph with these trainings, nodes 4, 6, ..., each with `options` if it has some; gives the graph's id."""
        workflow = workflow or str(uuid.uuid4())
        usual = {"steps": 4, "probe_every": 2, "preview_every": 0, "batch_size": 1, "seed": 1, "name": "browser"}
        usual |= {"control_after_generate": "fixed", "preset": "manual"}
        self.page.evaluate(GRAPH, [workflow, [{**usual, **each} for each in trainings]])
        self.until("(id) => (app.rootGraph ?? app.graph).id === id", workflow)
        self.page.keyboard.press(".")  # fit the graph into the view
        return workflow

    def keep(self) -> None:
        """Let the page store its graph for a reload."""
        self.page.evaluate(KEEP)
        self.page.wait_for_timeout(1500)  # it writes a while after a change, and tells nobody

    def queue(self) -> None:
        self.page.evaluate("app.queuePrompt(0, 1)")

    def runs(self, **query: str) -> list[dict]:
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        return self.server.get(f"/semantic_anchor/runs?{asked}")["runs"]

    def record(self, workflow: str, node: str = "4") -> dict:
        """The server's record of the newest run of a node."""
        return self.server.get(f"/semantic_anchor/runs/{self.runs(workflow=workflow, node=node)[0]['id']}")

    def view(self) -> View:
        return View(self.page.locator(".sa-run").first)


class View:
    """What a training node shows."""

    def __init__(self, root):
        self.root = root

    def line(self, text: str) -> str:
        """The line, once `text` is in it."""
        self.root.locator(".sa-head", has_text=text).wait_for()
        return self.root.locator(".sa-head").inner_text()

    def order(self, name: str) -> None:
        self.root.locator(f'button[data-order="{name}"]').click()

    def drawn(self) -> str:
        """The chart's pixels."""
        return self.root.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")

    def columns(self) -> float:
        """The share of the chart's columns in which there is a point of the picture term."""
        return self.root.locator("canvas").evaluate(COLUMNS)

    def legend(self) -> str:
        return self.root.locator(".sa-legend").inner_text()

    def pictures(self) -> list[int]:
        script = "(images) => images.map((image) => Number(image.dataset.step))"
        return self.root.locator(".sa-strip img").evaluate_all(script)
