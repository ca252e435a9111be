"""The training node's settings in a browser: what a preset shows, what is folded, and mistakes before a run."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser

DECIDED = ["steps", "learning_rate", "batch_size", "rank", "layers"]
TAKEN = [150, 0.001, 4, 8, "all_linear_conv"]
WIDGETS = """([id, names]) => names.map((name) => {
  const { value, disabled, label } = app.graph.getNodeById(id).widgets.find((each) => each.name === name)
  return { value, disabled: Boolean(disabled), label: label ?? name }
})"""
SET = """([id, name, value]) => {
  app.graph.getNodeById(id).widgets.find((each) => each.name === name).value = value
}"""
VISIBLE = """([id, names]) => {
  const node = app.graph.getNodeById(id)
  return names.filter((name) => node.isWidgetVisible(node.widgets.find((each) => each.name === name)))
}"""


def widgets(here, names: list[str], node: int = 4) -> list[dict]:
    return here.page.evaluate(WIDGETS, [node, names])


def put(here, name: str, value, node: int = 4) -> None:
    here.page.evaluate(SET, [node, name, value])


def until_taken(here, values: list) -> None:
    here.until(
        """([values, names]) => names.every((name, i) =>
          app.graph.getNodeById(4).widgets.find((each) => each.name === name).value === values[i])""",
        [values, DECIDED],
    )


def test_a_preset_shows_what_it_takes_and_manual_gives_back_what_was(window):
    here = window()
    here.build({"preset": "auto", "rank": 3})
    until_taken(here, TAKEN)
    assert all(each["disabled"] for each in widgets(here, DECIDED))
    prompt = here.page.evaluate("app.graphToPrompt().then(({ output }) => output['4'].inputs)")
    # So that coming to know it trains nothing again.
    assert (prompt["preset"], prompt["steps"], prompt["layers"]) == ("auto", 300, "attention")
    here.page.wait_for_timeout(700)  # for the picture that the test leaves

    put(here, "preset", "manual")
    until_taken(here, [4, 0.001, 1, 3, "attention"])
    here.until("() => !app.graph.getNodeById(4).widgets.some((each) => each.disabled)")
    put(here, "preset", "quick try")
    until_taken(here, [37, *TAKEN[1:]])
    put(here, "w", 1.0)
    here.until("() => app.graph.getNodeById(4).widgets.find((each) => each.name === 'w').label.includes('keeps')")


def test_a_new_node_has_auto_and_a_workflow_that_was_saved_without_it_manual(window):
    here = window()
    here.build({"preset": "subject"})
    of_new = "LiteGraph.createNode('AnchorTrainLoRA').widgets.find(({ name }) => name === 'preset').value"
    assert here.page.evaluate(of_new) == "auto"
    kept = here.page.evaluate("app.graph.serialize().nodes.find(({ id }) => id === 4).widgets_values")
    assert kept[-1] == "subject"
    reload = """(cut) => {
      const graph = app.graph.serialize()
      const node = graph.nodes.find(({ id }) => id === 4)
      node.widgets_values = node.widgets_values.slice(0, node.widgets_values.length - cut)
      if (cut) delete node.widgets_values_named?.preset
      return app.loadGraphData(graph).then(() =>
        app.graph.getNodeById(4).widgets.find(({ name }) => name === "preset").value)
    }"""
    assert here.page.evaluate(reload, 0) == "subject"
    assert here.page.evaluate(reload, 1) == "manual"


def test_what_a_first_run_does_not_need_is_folded(window):
    here = window()
    here.build({})
    names = ["w", "steps", "preset", "objective", "learning_rate", "rank", "probe_every", "class_count"]
    classic = not here.page.evaluate("Boolean(LiteGraph.vueNodesMode)")
    if classic:
        assert here.page.evaluate(VISIBLE, [4, names]) == names[:3]
        here.page.evaluate("app.graph.getNodeById(4).widgets.find(({ name }) => name === 'more').callback()")
        assert here.page.evaluate(VISIBLE, [4, names]) == names
    else:
        node = here.page.locator('[data-node-id="4"]')
        assert node.get_by_text("class_count").count() == 0 and node.get_by_text("More settings").count() == 0
        node.get_by_text("advanced", exact=False).first.click()
        node.get_by_text("class_count").first.wait_for()


def test_a_mistake_shows_on_the_node_before_the_run(window):
    here = window()
    here.build({"preset": "auto"})
    here.view().line("shows itself here")
    warned = here.page.locator(".sa-mistakes")
    assert warned.inner_text() == ""
    put(here, "class_word", " ", node=3)
    warned.get_by_text("class_word is ' ', but it takes a word or two").wait_for()
    put(here, "class_word", "star", node=3)
    here.until("() => !document.querySelector('.sa-mistakes').textContent")
    put(here, "preset", "manual")
    put(here, "rank", 5000)
    warned.get_by_text("wide; take a rank of at most").wait_for()
    put(here, "rank", 4)
    here.page.evaluate("""() => {
      const node = app.graph.getNodeById(4)
      node.disconnectInput(node.inputs.findIndex(({ name }) => name === "images"))
    }""")
    warned.get_by_text("Connect pictures of the subject").wait_for()
