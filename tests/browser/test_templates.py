"""The workflows that come with the pack, in a browser: each opens, and the quickstart runs from two clicks."""

from __future__ import annotations

import json
import time

import pytest

from tests.comfyui import comfy_server

pytestmark = pytest.mark.browser

FILES = sorted((comfy_server.ROOT / "example_workflows").glob("*.json"))
QUICKSTART = "Quickstart (no download)"
RESULTS = ("15", "17", "19")  # its pictures

OPENED = """(graph) => app.loadGraphData(graph).then(() => app.graph.nodes.map((node) => ({
  id: node.id, type: node.type, known: Boolean(LiteGraph.registered_node_types[node.type]),
  linked: node.inputs?.filter((_, i) => node.isInputConnected(i)).length ?? 0,
})))"""
# As they are drawn, in the graph's units; each has a title of 30 above.
COVERED = """() => {
  const boxes = app.graph.nodes.map(({ title, pos: [x, y], size: [width, height] }) => ({
    title, x: [x, x + width], y: [y - 30, y + height],
  }))
  const meet = (one, other) => Math.min(one[1], other[1]) - Math.max(one[0], other[0]) > 1
  return boxes.flatMap((one, i) =>
    boxes.slice(i + 1).filter((other) => meet(one.x, other.x) && meet(one.y, other.y)).map((other) => [one, other]))
}"""


def test_every_workflow_opens(window):
    here, covered = window(), {}
    for file in FILES:
        graph = json.loads(file.read_text(encoding="utf-8"))
        graph["extra"]["linearMode"] = False
        opened = {str(node["id"]): node for node in here.page.evaluate(OPENED, graph)}
        assert [node["type"] for node in opened.values() if not node["known"]] == [], file.stem
        for node in graph["nodes"]:
            there = opened.pop(str(node["id"]))
            linked = sum(each.get("link") is not None for each in node.get("inputs", []))
            assert (there["type"], there["linked"]) == (node["type"], linked), file.stem
        assert not opened
        here.page.wait_for_timeout(1200)  # Nodes 2.0 measures what it draws
        covered[file.stem] = here.page.evaluate(COVERED)
    assert not any(covered.values()), covered


def test_the_quickstart_is_two_clicks(window):
    """As it is in the first of the combinations; with fewer steps in the others."""
    here = window()
    page, server = here.page, here.server
    page.set_default_timeout(540_000)
    page.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    page.get_by_text("Semantic Anchor: train a subject").first.click()
    page.get_by_test_id(f"template-workflow-{QUICKSTART}").click()
    here.until("() => app.graph.nodes.some(({ type }) => type === 'AnchorTrainLoRA')")
    whole = server.front_end == "installed" and not page.evaluate("Boolean(LiteGraph.vueNodesMode)")
    if not whole:
        page.evaluate("""() => {
          const node = app.graph.nodes.find(({ type }) => type === "AnchorTrainLoRA")
          node.widgets.find(({ name }) => name === "preset").value = "quick try"
        }""")
    begun, known = time.monotonic(), [run["id"] for run in here.runs()]
    page.get_by_test_id("queue-button").click()
    here.until(
        "(known) => app.graph.nodes.some(({ properties: { anchor_run: id } }) => id && !known.includes(id))", known
    )
    record = here.record(page.evaluate("(app.rootGraph ?? app.graph).id"), "5")
    entry = server.wait(record["prompt"], 540)
    print(
        f"Quickstart {'as it is' if whole else 'with quick try'}: {time.monotonic() - begun:.0f} s from Run to its end"
    )
    assert comfy_server.failure(entry) is None
    assert all(entry["outputs"][node]["images"] for node in RESULTS)
    assert "Finished" in here.view().line("Finished")
    here.until(f"() => {json.dumps(RESULTS)}.every((id) => app.nodeOutputs[id]?.images.length)")
