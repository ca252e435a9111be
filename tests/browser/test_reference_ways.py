"""Pictures on the node that loads references: from the computer's disk, turned, undone, inside a subgraph."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from tests.browser.picker import PASTE, png

pytestmark = pytest.mark.browser

BESIDE_THE_LIST = """() => {
  const { pos, size } = app.graph.getNodeById(1)
  const [x, y] = app.canvas.ds.convertOffsetToCanvas([pos[0] + size[0] / 2, pos[1] + 20])
  const box = app.canvas.canvas.getBoundingClientRect()
  return [box.left + x, box.top + y]
}"""


def test_files_and_folders_of_the_computer_are_dropped(node, tmp_path):
    (tmp_path / "pets").mkdir()
    (tmp_path / "dog.png").write_bytes(png("red"))
    (tmp_path / "pets/cat.png").write_bytes(png("blue"))
    (tmp_path / "pets/cat.txt").write_text("a sks cat")
    node.root.hover(trial=True)  # the view stands still
    node.drop_from_disk(*node.page.evaluate(BESIDE_THE_LIST), tmp_path / "dog.png")
    node.cards(1)
    node.root.hover(trial=True)
    box = node.root.bounding_box()
    node.drop_from_disk(box["x"] + 30, box["y"] + 8, tmp_path / "pets")
    node.cards(2)
    assert node.names() == ["dog.png", "cat.png"] and node.entries()[1]["caption"] == "a sks cat"
    assert node.page.evaluate("app.graph.nodes.length") == 2  # ComfyUI made none of its own


def test_undo_and_redo_reach_the_list(node):
    page = node.page
    node.window.keep()
    node.drop(dog__png=png("red"), cat__png=png("blue"))
    node.cards(2).first.focus()
    page.keyboard.press("Delete")
    node.cards(1)
    assert node.names() == ["cat.png"]
    for key, names in (
        ("z", ["dog.png", "cat.png"]), ("z", []), ("y", ["dog.png", "cat.png"]), ("y", ["cat.png"]),
    ):  # fmt: skip
        page.keyboard.press(f"Control+{key}")
        node.cards(len(names))
        assert node.names() == names
        assert page.evaluate("app.graph.nodes.length") == 2


SEEN = """(image) => image.decode().then(() => {
  const { naturalWidth: width, naturalHeight: height } = image
  const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d")
  context.drawImage(image, 0, 0)
  const isRed = (y) => context.getImageData(width / 2, y, 1, 1).data[0] > 128
  return [width < height, isRed(height / 8), isRed(height - height / 8)]
})"""


def test_a_picture_that_its_exif_turns_is_upright_here_and_in_the_mask_editor(node):
    lying = Image.new("RGB", (256, 160), "blue")
    lying.paste("red", (0, 0, 128, 160))
    exif = Image.Exif()
    exif[0x0112] = 6  # its left is above
    stream = io.BytesIO()
    lying.save(stream, "JPEG", exif=exif)
    node.drop(turned__jpeg=stream.getvalue())
    card = node.cards(1).first
    assert card.locator(".sa-whole img").first.evaluate(SEEN) == [True, True, False]
    node.paint(card)
    (entry,) = node.entries()
    painted = Image.open(node.window.server.base / f"input/semantic_anchor/upright/{entry['sha256'][:16]}.png")
    assert painted.size == (160, 256) and painted.convert("RGB").getpixel((80, 20))[0] > 200
    _, answer = node.window.server.post("/semantic_anchor/pictures", {"files": [entry["mask"] | {"as": "mask"}]})
    assert (answer["files"][0]["width"], answer["files"][0]["height"]) == (160, 256)
    assert not card.locator(".sa-fault").is_visible()


CONVERT = "() => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(1)])) }"
ENTER = "app.canvas.setGraph((app.rootGraph ?? app.graph).nodes.find((each) => each.subgraph).subgraph)"
PASTE_INSIDE = PASTE.replace("app.graph.getNodeById(1)", "app.canvas.graph.nodes[0]")
SHOWN = "() => Object.values(app.nodeOutputs ?? {}).find((each) => each.images)?.images.length === 3"


def test_a_node_in_a_subgraph_does_the_same(node):
    page = node.page
    node.drop(dog__png=png("red"))
    node.cards(1)
    page.evaluate(CONVERT)
    node.root.wait_for(state="hidden")
    page.evaluate(ENTER)
    node.root.hover(trial=True)
    assert node.cards(1).first.is_visible() and node.names() == ["dog.png"]
    node.drop(cat__png=png("blue"))
    node.cards(2)
    page.evaluate(PASTE_INSIDE, node.transfer(hen__png=png("green")))
    node.cards(3).last.focus()
    page.keyboard.press("Alt+Home")
    assert node.names() == ["hen.png", "dog.png", "cat.png"]
    page.evaluate("app.canvas.setGraph(app.rootGraph ?? app.graph)")
    node.window.keep()
    node.window.open()
    assert node.names() == ["hen.png", "dog.png", "cat.png"]
    node.window.queue()
    node.window.until(SHOWN)
    page.evaluate(ENTER)
    assert node.cards(3).first.locator(".sa-caption").is_visible()
