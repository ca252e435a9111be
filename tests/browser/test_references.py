"""Pictures on the node that loads references: dropped, pasted, masked, ordered, captioned, lost and found again."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from anchor_core.sandbox import subjects
from tests.browser.picker import PASTE, VALUE, Node, png
from tests.browser.test_training import CONTRAST

pytestmark = pytest.mark.browser


def test_pictures_are_dropped_pasted_ordered_captioned_and_removed(node):
    page = node.page
    assert "Drop, paste or add pictures" in node.root.inner_text()
    node.drop(dog__png=png("red"), cat__png=png("blue", (64, 96)), cat__txt="a sks  dog\nat night", x__heic="no")
    cards = node.cards(2)
    assert "x.heic is of no format that is read" in node.note("x.heic")
    page.evaluate(PASTE, node.transfer(hen__png=png("green", (40, 40))))
    node.cards(3)
    assert node.names() == ["dog.png", "cat.png", "hen.png"] and page.evaluate("app.graph.nodes.length") == 2
    assert [entry.get("caption") for entry in node.entries()] == [None, "a sks dog at night", None]
    assert cards.nth(2).locator(".sa-fault").inner_text() == "small: 40 × 40, is enlarged"
    # The middle 64 of 96.
    cut = cards.nth(0).locator(".sa-cut").evaluate("({ style }) => [style.left, style.top, style.width, style.height]")
    assert [round(float(each.rstrip("%")), 2) for each in cut] == [16.67, 0, 66.67, 100]
    node.drop(again__png=png("red"))
    assert node.note("already") == "dog.png is on the list already" and len(node.entries()) == 3

    cards.nth(0).locator(".sa-caption").fill("a sks dog on grass")
    cards.nth(0).locator(".sa-caption").press("Enter")
    assert node.entries()[0]["caption"] == "a sks dog on grass"
    cards.nth(2).locator(".sa-thumb").drag_to(cards.nth(0).locator(".sa-thumb"), target_position={"x": 8, "y": 40})
    node.window.until(f"({VALUE})().includes('hen') && JSON.parse(({VALUE})())[0].name.endsWith('hen.png')")
    assert node.names() == ["hen.png", "dog.png", "cat.png"]
    page.keyboard.press("Alt+ArrowRight")  # the one that was moved has the focus
    assert node.names() == ["dog.png", "hen.png", "cat.png"]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Delete")
    node.cards(2)
    assert node.names() == ["dog.png", "hen.png"] and page.evaluate("app.graph.nodes.length") == 2
    text = page.evaluate(VALUE)
    assert page.evaluate("app.graphToPrompt().then(({ output }) => output['1'].inputs.pictures)") == text

    node.window.keep()
    node.window.open()
    node.cards(2)
    assert page.evaluate(VALUE) == text and node.widget("references") == "[pictures on the node]"
    assert node.root.locator(".sa-caption").first.input_value() == "a sks dog on grass"
    page.locator(".sa-whole img").first.evaluate("(image) => image.decode()")
    node.window.queue()
    page.wait_for_function("() => app.nodeOutputs && Object.values(app.nodeOutputs).some((each) => each.images)")
    shown = page.evaluate("Object.values(app.nodeOutputs).find((each) => each.images).images.length")
    assert shown == 2


def test_a_mask_is_painted_in_comfyuis_editor(node):
    page = node.page
    node.drop(dog__png=png("red", (256, 256)))
    card = node.cards(1).first
    node.paint(card)
    (entry,) = node.entries()
    assert entry["mask"]["name"].startswith("clipspace-painted-masked-") and len(entry["mask"]["sha256"]) == 64
    card.locator(".sa-counts").evaluate("(image) => image.decode()")
    about = {"files": [entry["mask"] | {"as": "mask"}]}
    status, answer = node.window.server.post("/semantic_anchor/pictures", about)
    assert status == 200 and 0 < answer["files"][0]["share"] < 0.9
    assert (answer["files"][0]["width"], answer["files"][0]["height"]) == (256, 256)
    card.locator(".sa-thumb").hover()
    card.locator('[data-act="invert"]').click()
    assert node.entries()[0]["invert_mask"] is True
    assert card.locator(".sa-counts").get_attribute("data-inverted") is not None
    node.window.keep()
    node.window.open()
    assert node.cards(1).first.locator(".sa-counts").is_visible() and node.entries()[0]["mask"] == entry["mask"]
    card = node.cards(1).first
    card.focus()
    page.keyboard.press("u")
    assert "mask" not in node.entries()[0] and "invert_mask" not in node.entries()[0]


def test_a_picture_that_is_gone_is_named_and_found_by_what_is_in_it(node):
    base = node.window.server.base / "input"
    unique = png("#123456" if node.window.server.front_end == "newest" else "#654321", (90, 90 + len(node.names())))
    node.drop(owl__png=unique)
    node.cards(1)
    (entry,) = node.entries()
    file = base / entry["name"]
    other = file.with_name("renamed.png")
    file.rename(other)
    node.window.keep()
    node.window.open()
    card = node.cards(1).first
    card.locator(".sa-whole img").first.evaluate("(image) => image.decode()")
    assert "renamed.png" in card.locator(".sa-thumb").get_attribute("title")
    assert node.entries() == [entry]  # opening changes nothing
    other.unlink()
    node.window.open()
    assert node.note("Not in this") == f"Not in this ComfyUI: {file.name}. Drop them here, under any name."
    assert node.cards(1).first.locator(".sa-fault").inner_text() == "not in this ComfyUI"
    node.drop(found__png=unique)
    assert node.note("again") == f"{file.name} is here again"
    (now,) = node.entries()
    assert now["name"].endswith("found.png") and now["sha256"] == entry["sha256"]
    (base / now["name"]).unlink()


def test_a_folder_that_is_chosen_leaves_the_pictures_aside(node):
    assert node.widget("references") == "[pictures on the node]"
    node.drop(dog__png=png("red"))
    node.cards(1)
    node.page.evaluate("""() => {
      const widget = app.graph.getNodeById(1).widgets.find(({ name }) => name === "references")
      widget.value = "sandbox/pip"
      widget.callback?.(widget.value)
    }""")
    assert "Not used: references is sandbox/pip" in node.root.inner_text()
    node.root.get_by_role("button", name="Use these").click()
    assert node.widget("references") == "[pictures on the node]" and "Pictures: 1" in node.root.inner_text()


DRAG = """([kind, text]) => {
  const transfer = new DataTransfer()
  transfer.setData(kind, text)
  return transfer
}"""


def test_pictures_of_comfyui_are_taken_from_where_they_are(node):
    base = node.window.server.base
    (base / "input/pets").mkdir(exist_ok=True)
    (base / "input/pets/fox.png").write_bytes(png("orange"))
    (base / "output/made.png").write_bytes(png("purple"))
    here = f"http://127.0.0.1:{node.window.server.port}"
    asset = json.dumps({"filename": "fox.png", "subfolder": "pets", "type": "input"})
    seen = f"{here}/api/view?filename=made.png&type=output&subfolder=&rand=0.5"
    dragged = [("application/x-comfy-asset-info", asset), ("text/uri-list", seen)]
    for number, (kind, text) in enumerate(dragged, 1):
        transfer = node.page.evaluate_handle(DRAG, [kind, text])
        node.root.dispatch_event("drop", {"dataTransfer": transfer})
        node.cards(number)
    assert [entry["name"] for entry in node.entries()] == ["pets/fox.png", "semantic_anchor/made.png"]
    elsewhere = node.page.evaluate_handle(DRAG, ["text/uri-list", "http://127.0.0.1:1/view?filename=made.png"])
    node.root.dispatch_event("drop", {"dataTransfer": elsewhere})
    node.page.wait_for_timeout(300)
    assert len(node.entries()) == 2


def test_the_form_takes_pictures_too(node):
    node.page.evaluate("""() => {
      const data = app.graph.serialize()
      data.extra = { ...data.extra, linearMode: true, linearData: { inputs: [["1", "pictures"]], outputs: ["2"] } }
      return app.loadGraphData(data)
    }""")
    skip = node.page.get_by_role("button", name="Skip")
    node.page.wait_for_timeout(1500)
    if skip.count():  # a welcome on the first time
        skip.first.click()
    item = node.page.locator("[data-testid=app-mode-widget-item] .sa-picker, [data-testid=linear-widgets] .sa-picker")
    item.first.wait_for()
    node.root = item.first
    node.drop(dog__png=png("red"))
    node.cards(1)
    assert node.names() == ["dog.png"] and item.first.locator(".sa-pic").is_visible()


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_captions_are_readable_in_both_themes(window, palette):
    node = Node(window(settings={"Comfy.ColorPalette": palette})).open()
    shapes = ((0, 0, 64, 64), (0, 8, 64, 56), (10, 0, 54, 64), (0, 0, 64, 36), (8, 8, 56, 64))
    drawn = subjects.get("pip").references()
    assert len(drawn) == len(shapes)
    for number, (picture, box) in enumerate(zip(drawn, shapes), 1):
        stream = io.BytesIO()
        cut = picture.convert("RGB").crop(box)
        cut.resize((4 * cut.width, 4 * cut.height), Image.Resampling.NEAREST).save(stream, "PNG")
        node.drop(**{f"star{number}__png": stream.getvalue(), f"star{number}__txt": f"a sks star, {number}"})
        node.cards(number)
    assert node.page.evaluate(CONTRAST, [".sa-caption", ".sa-pic"]) >= 3
