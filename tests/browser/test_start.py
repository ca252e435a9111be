"""What of the pack a page loads, and when: little before its first graph, and a node never waits for the rest."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser

AT_ONCE = {"anchor.js", "fold.mjs", "presets.mjs", "words.mjs"}
LIST = '[{"name": "a.png", "caption": "one"}]'
PARTS = "**/{training,sweep,references}.mjs"
MADE = """(type) => {
  const node = LiteGraph.createNode(type)
  node.pos = [0, 700]
  app.graph.add(node)
  const { id, widgets_values, widgets_values_named, size } = node.serialize()
  return { id, widgets_values, widgets_values_named, size, names: node.widgets.map(({ name }) => name) }
}"""


class Held:
    """Requests for the parts, answered when the test says so."""

    def __init__(self):
        self.routes = []

    def hold(self, route) -> None:
        self.routes.append(route)

    def go_on(self, here) -> None:
        for route in self.routes:
            route.continue_()
        here.page.unroute(PARTS)


def test_a_page_starts_with_four_files_and_has_the_rest_when_it_is_idle(window):
    here = window()
    while "sweep_view.mjs" not in here.scripts:
        here.page.wait_for_timeout(100)
    assert set(here.scripts[: len(AT_ONCE)]) == AT_ONCE
    assert {"training.mjs", "sweep.mjs", "references.mjs"} <= set(here.scripts)


def test_a_node_that_is_made_before_its_part_is_there_has_it_later_and_keeps_what_was_set(window):
    held = Held()
    here = window(routed={PARTS: held.hold})
    here.build({"preset": "manual", "rank": 3})
    sweep = here.page.evaluate(MADE, "AnchorSweep")
    here.page.evaluate(
        """(list) => {
          app.graph.getNodeById(2).widgets.find(({ name }) => name === "pictures").value = list
          app.graph.getNodeById(2).widgets.find(({ name }) => name === "references").value = "[pictures on the node]"
        }""",
        LIST,
    )
    before = here.page.evaluate("app.graphToPrompt().then(({ output }) => output)")
    assert here.page.locator(".sa-run, .sa-picker").count() == 0 and held.routes
    held.go_on(here)
    here.page.locator(".sa-run").wait_for()
    here.page.locator(".sa-picker .sa-pic").first.wait_for()
    here.until("(id) => app.graph.getNodeById(id).widgets.some(({ name }) => name === 'grid')", sweep["id"])
    assert here.page.evaluate("app.graphToPrompt().then(({ output }) => output)") == before
    assert before["2"]["inputs"]["pictures"] == LIST and before["4"]["inputs"]["rank"] == 3

    again = here.page.evaluate(MADE, "AnchorSweep")  # its part is there
    assert again["names"][-1] == "grid" and again["widgets_values"] == sweep["widgets_values"]


def test_a_graph_with_a_node_waits_for_its_part(window):
    """So that what a workflow has saved finds the widgets that it was saved from."""
    held = Held()
    here = window(routed={PARTS: held.hold})
    workflow = here.build({})
    saved = here.page.evaluate("app.graph.serialize()")
    held.go_on(here)
    here.page.locator(".sa-run").wait_for()

    late = Held()
    there = window(routed={PARTS: late.hold})
    there.page.evaluate("(graph) => { window.loaded = app.loadGraphData(graph).then(() => true) }", saved)
    there.page.wait_for_timeout(1000)
    assert there.page.evaluate("app.graph.nodes.every(({ type }) => type !== 'AnchorTrainLoRA')")
    late.go_on(there)
    there.until("window.loaded")
    names = "app.graph.nodes.find(({ type }) => type === 'AnchorTrainLoRA').widgets.map(({ name }) => name)"
    assert there.page.evaluate(names)[-1] == "run"
    assert there.page.evaluate("app.graph.id") == workflow
