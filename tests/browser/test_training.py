"""The training node in a browser: watched, steered, left and found again."""

from __future__ import annotations

import math
import re

import pytest

pytestmark = pytest.mark.browser

MANY = 100_000
SCRIPTS = "**/extensions/semantic-anchor/**"


def soon(record: dict) -> int:
    """The most steps that may be made before an order given now is answered, with those that are not yet told."""
    return 2 + math.ceil(0.5 / record["seconds_per_step"])


def test_a_training_is_watched_steered_left_and_found_again(window):
    here = window()
    workflow = here.build({"steps": MANY})
    view = here.view()
    assert "shows itself here" in view.line("training")
    here.keep()
    here.queue()
    view.line(re.compile("step [2-9] "))
    before = view.drawn()
    view.line(re.compile(r"step ([6-9]|\d\d+) "))
    here.until("() => document.querySelector('.sa-legend').textContent.includes('drift')")
    here.until("(before) => document.querySelector('.sa-run canvas').toDataURL() !== before", before)  # it moves
    assert "pictures" in view.legend() and "anchor" in view.legend()

    told = here.record(workflow)
    view.order("pause")
    view.line("Paused")
    paused = here.record(workflow)
    assert paused["phase"] == "paused" and paused["step"] - told["step"] <= soon(told)
    step = paused["step"]
    view.order("picture_now")
    view.root.locator(".sa-strip img").wait_for()
    assert view.pictures() == [step]
    view.order("save_now")
    view.root.locator("select:enabled").wait_for()
    assert view.root.locator("select option").all_inner_texts()[1].split()[0] == str(step)
    assert here.record(workflow)["step"] == step  # both without another step

    # A reload half-way, an undo, which makes the nodes anew, a second window on the same graph, and one on another.
    width = view.columns()
    here.open()
    view.line("Paused")
    here.page.evaluate("app.graph.getNodeById(2).widgets.find(({ name }) => name === 'size').value = 128")
    here.keep()
    here.page.keyboard.press("Control+z")
    here.until("() => app.graph.getNodeById(2).widgets.find(({ name }) => name === 'size').value === 64")
    view.line("Paused")
    view.root.locator(".sa-strip img").wait_for()
    assert abs(view.columns() - width) < 0.1 and f"step {step}" in view.legend()
    second, other = window(), window()
    second.build({}, workflow=workflow)
    second.page.evaluate("app.loadGraphData(app.graph.serialize())")  # as from a file
    second.view().line("Paused")
    other.build({})

    second.view().order("go_on")
    second.view().line(" left")
    view.line(" left")
    view.root.locator("input").fill("7")
    view.order("extend")
    view.line(f"/ {MANY + 7}")
    told = here.record(workflow)
    view.order("stop")
    view.line("Stopped")
    second.view().line("Stopped")
    ended = here.record(workflow)
    assert ended["how"] == "stopped" and ended["step"] - told["step"] <= soon(told)
    entry = here.server.wait(ended["prompt"])
    assert entry["status"]["status_str"] == "success" and entry["outputs"]["5"]  # the graph went on
    assert "shows itself here" in other.view().line("training")

    # A reload after the end.
    here.open()
    view.line("Stopped")
    view.root.locator(".sa-strip img").wait_for()
    assert view.columns() > 0.5 and f"step {ended['step']}" in view.legend()
    assert not view.root.locator(".sa-buttons").is_visible()


def test_samples_are_looked_through_with_the_arrow_keys(window):
    here = window()
    workflow = here.build({"steps": 6, "preview_every": 2})
    here.queue()
    view = here.view()
    view.line("Finished")
    here.until("() => document.querySelectorAll('.sa-strip img').length === 3")
    assert view.pictures() == [2, 4, 6]
    view.root.locator(".sa-strip img").first.click()
    caption = view.root.locator("dialog div")
    assert caption.inner_text() == "Sample after step 2: a photo of a sks star"
    for key, step in (("ArrowRight", 4), ("ArrowRight", 6), ("ArrowRight", 6), ("ArrowLeft", 4), ("Home", 2)):
        here.page.keyboard.press(key)
        assert caption.inner_text().startswith(f"Sample after step {step}:")
    width = view.root.locator("dialog img").evaluate("(image) => image.decode().then(() => image.naturalWidth)")
    assert width == 512
    here.page.keyboard.press("Escape")
    assert not view.root.locator("dialog").is_visible()
    # The values under the pointer.
    box = view.root.locator("canvas").bounding_box()
    here.page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + box["height"] / 2)
    here.until("() => document.querySelector('.sa-strip img[data-pointed]')")
    pointed = int(re.search(r"step (\d+)", view.legend())[1])
    value = here.record(workflow)["losses"]["values"]["reconstruction"][pointed - 1]
    assert 1 < pointed < 6 and f"pictures {float(f'{value:.3g}'):g}" in view.legend()


def test_a_saved_step_is_kept_in_the_end(window):
    here = window()
    workflow = here.build({"steps": MANY})
    here.queue()
    view = here.view()
    view.line("step ")
    here.until("() => document.querySelector('.sa-legend').textContent.includes('drift')")  # it has its size
    view.order("save_now")
    view.root.locator("select:enabled").wait_for()
    step = int(view.root.locator("select option").all_inner_texts()[1].split()[0])
    here.until(
        "(step) => Number(document.querySelector('.sa-head').textContent.match(/step ([0-9]+)/)?.[1]) > step", step
    )
    view.root.locator("select").select_option(str(step))
    assert f"kept step {step}" in view.line("kept step")
    ended = here.record(workflow)
    assert ended["how"] == "stopped" and ended["kept"] == step < ended["step"]


def test_two_trainings_in_one_graph_each_show_their_own(window):
    here = window()
    workflow = here.build({"steps": 3}, {"steps": 5, "seed": 2})
    here.queue()
    lines = """() => {
      const all = [4, 6].map((id) => app.graph.getNodeById(id).widgets.find((each) => each.name === "run"))
      const texts = all.map((widget) => widget?.element.querySelector(".sa-head").textContent ?? "")
      return texts.every((text) => text.startsWith("Finished")) && texts
    }"""
    assert here.until(lines) == ["Finished · step 3 / 3", "Finished · step 5 / 5"]
    ids = here.page.evaluate("[4, 6].map((id) => app.graph.getNodeById(id).properties.anchor_run)")
    assert ids == [here.record(workflow, node)["id"] for node in ("4", "6")]
    assert len(here.runs(workflow=workflow)) == 2


def test_prompts_queued_from_two_windows_each_show_in_their_own(window):
    one, other = window(), window()
    first, second = one.build({"steps": MANY}), other.build({"steps": 3, "seed": 2})
    one.queue()
    one.view().line(re.compile("step [1-9]"))
    one.page.evaluate("app.graph.getNodeById(4).widgets.find(({ name }) => name === 'steps').value = 5")
    one.queue()
    one.until("() => fetch('/queue').then((answer) => answer.json()).then((said) => said.queue_pending.length === 1)")
    other.queue()
    other.until("() => fetch('/queue').then((answer) => answer.json()).then((said) => said.queue_pending.length === 2)")
    assert f"/ {MANY}" in one.view().line("step ") and "shows itself here" in other.view().line("training")
    one.view().order("stop")
    one.view().line("Finished · step 5 / 5")
    other.view().line("Finished · step 3 / 3")
    assert [each["how"] for each in one.runs(workflow=first)] == ["finished", "stopped"]
    assert len(one.runs(workflow=second)) == 1
    for here, workflow in ((one, first), (other, second)):
        here.view().line("Finished")
        assert here.page.evaluate("app.graph.getNodeById(4).properties.anchor_run") == here.record(workflow)["id"]


def test_a_node_in_a_subgraph_does_the_same(window):
    here = window()
    workflow = here.build({"steps": MANY})
    here.page.evaluate("() => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(4)])) }")
    here.queue()
    node = here.until("""() => {
      const outer = app.graph.nodes.find((each) => each.subgraph)
      const inner = outer.subgraph.nodes.find((each) => each.type === "AnchorTrainLoRA")
      const text = inner.widgets.find((each) => each.name === "run")?.element.querySelector(".sa-head").textContent
      return /step [1-9]/.test(text) && `${outer.id}:${inner.id}`
    }""")
    here.page.evaluate("app.canvas.setGraph(app.graph.nodes.find((each) => each.subgraph).subgraph)")
    view = here.view()
    view.line("step ")
    view.order("stop")
    view.line("Stopped")
    assert here.record(workflow, node)["how"] == "stopped"


def test_what_has_ended_is_trained_on_from_its_checkpoints(window):
    here = window()
    workflow = here.build({"steps": 3, "options": {"checkpoint_every": 1}})
    here.queue()
    view = here.view()
    view.line("Finished")
    view.root.locator("input").fill("2")
    view.order("extend")
    view.line("Finished · step 5 / 5")
    record = here.record(workflow)
    assert record["losses"]["step"] == [1, 2, 3, 4, 5]  # the whole curve
    assert [each["step"] for each in here.runs(workflow=workflow)] == [5, 3]
    values = """() => [4, 6].flatMap((id) => app.graph.getNodeById(id).widgets ?? [])
      .filter(({ name }) => ["steps", "resume"].includes(name)).map(({ value }) => value)"""
    assert here.page.evaluate(values) == [3, "[new training]"]


CONTRAST = """([text, ground]) => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map((each) => {
      const share = each / 255
      return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4
    })
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const style = (name) => getComputedStyle(document.querySelector(name))
  const [low, high] = [light(style(text).color), light(style(ground).backgroundColor)].sort((a, b) => a - b)
  return (high + 0.05) / (low + 0.05)
}"""  # of WCAG 2


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_the_text_is_readable_in_both_themes(window, palette):
    here = window(settings={"Comfy.ColorPalette": palette})
    here.build({})
    here.view().line("shows itself here")
    assert here.page.evaluate(CONTRAST, [".sa-head", ".sa-chart"]) >= 3


def test_the_node_speaks_the_language_of_the_page(window):
    here = window(settings={"Comfy.Locale": "zh"})
    here.build({"preset": "quick try"})
    assert here.view().line("训练开始后会显示在这里")
    if here.page.evaluate("Boolean(LiteGraph.vueNodesMode)"):
        here.page.locator('[data-node-id="4"]').get_by_text("快速尝试 (quick try)").first.wait_for()
    else:
        shown = "app.graph.getNodeById(4).widgets.find(({ name }) => name === 'preset')._displayValue"
        assert here.page.evaluate(shown) == "快速尝试 (quick try)"
    prompt = here.page.evaluate("app.graphToPrompt().then(({ output }) => output['4'].inputs)")
    assert prompt["preset"] == "quick try"


def test_without_the_script_there_is_a_line_and_a_preview(window):
    here = window(routed={SCRIPTS: lambda route: route.abort()})
    here.build({"steps": MANY, "preview_every": 3})
    assert here.page.locator(".sa-run").count() == 0
    here.queue()
    line = "app.graph.getNodeById(4).widgets.find((each) => each.name === '$$node-text-preview')?.value ?? ''"
    here.until(f"() => /^step [0-9]+ of {MANY}, .* left, drift/.test({line})")
    here.until("() => Object.keys(app.nodePreviewImages ?? {}).length > 0")
    here.errors.clear()  # the page says that it could not load the script
