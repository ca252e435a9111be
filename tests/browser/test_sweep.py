"""A sweep in a browser: looked through, taken from, and found again after a reload."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser

GRAPH = """() => {
  const node = (id) => app.graph.getNodeById(id)
  const make = (type, x, y, values) => {
    const made = LiteGraph.createNode(type)
    made.pos = [x, y]
    app.graph.add(made)
    for (const [name, value] of Object.entries(values)) made.widgets.find((each) => each.name === name).value = value
    return made
  }
  const link = (from, output, to, name) => from.connect(output, to, to.inputs.findIndex((each) => each.name === name))
  const sweep = make("AnchorSweep", 340, 700, {
    values: "0, 1", prompt: "a photo of a sks star on grass", count: 2, size: 64, sampling_steps: 3, judge: "sandbox",
    control_after_generate: "fixed",
  })
  const applied = make("AnchorApplyAdapter", -300, 700, { strength: 0.5 })
  const shown = make("PreviewImage", 1000, 700, {})
  const model = node(1)
  ;["model", "clip", "vae"].forEach((name, output) => link(model, output, sweep, name))
  link(node(2), 1, sweep, "references")
  link(node(3), 0, sweep, "concept")
  link(node(4), 1, sweep, "lora")
  link(node(4), 1, applied, "lora")
  link(sweep, 0, shown, "images")
  return [sweep.id, applied.id]
}"""
STRENGTH = "(id) => app.graph.getNodeById(id).widgets.find(({ name }) => name === 'strength').value"


def test_a_sweep_is_looked_through_taken_from_and_found_again(window):
    here = window()
    here.build({"steps": 6, "learning_rate": 2e-2})
    _, applied = here.page.evaluate(GRAPH)
    here.page.keyboard.press(".")
    here.keep()
    here.queue()
    grid = here.page.locator(".sa-sweep")
    grid.locator(".sa-column").nth(1).wait_for()
    assert grid.locator(".sa-column").count() == 2 and grid.locator("img[alt]").count() == 4
    assert "DINO" in grid.locator("figcaption").first.inner_text() and "First place" in grid.inner_text()
    assert grid.locator(".sa-column[data-best]").count() == 1
    loaded = "() => [...document.querySelectorAll('.sa-column img')].every((each) => each.naturalWidth === 64)"
    here.until(loaded)

    grid.locator(".sa-column img").first.evaluate("(image) => image.click()")
    caption = grid.locator("dialog > div").last
    assert caption.inner_text().startswith("strength 0 ")
    for key, begins in (("ArrowRight", "strength 1 "), ("ArrowRight", "strength 1 "), ("ArrowDown", "strength 1 ")):
        here.page.keyboard.press(key)
        assert caption.inner_text().startswith(begins)
    box = grid.locator(".sa-frame").bounding_box()
    here.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    assert "50%" in grid.locator(".sa-frame img").last.evaluate("(image) => image.style.clipPath")
    here.page.keyboard.press("Escape")

    assert here.page.evaluate(STRENGTH, applied) == 0.5
    grid.locator(".sa-column button").nth(1).evaluate("(button) => button.click()")
    assert here.page.evaluate(STRENGTH, applied) == 1
    assert grid.locator(".sa-taken").inner_text() == "strength 1 → Apply Adapter"

    here.keep()
    here.open()
    grid.locator(".sa-column").nth(1).wait_for()
    here.until(loaded)
