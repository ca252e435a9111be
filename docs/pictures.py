"""Draws the README's pictures anew from one run of the quickstart: pictures/graph.jpg and pictures/quickstart.jpg.

python docs/pictures.py            (COMFYUI_PATH as for the tests; needs Playwright and Chromium)
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from anchor_core.sandbox import subjects  # noqa: E402
from tests.browser.conftest import BROWSERS  # noqa: E402
from tests.browser.page import Window  # noqa: E402
from tests.browser.test_templates import OPENED, QUICKSTART, RESULTS  # noqa: E402
from tests.comfyui import comfy_server  # noqa: E402

EDGE, GAP = 128, 6
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.UseNewMenu": "Disabled", "Comfy.Locale": "en",
    "Comfy.Graph.CanvasMenu": False, "Comfy.Graph.CanvasInfo": False, "Comfy.Minimap.Visible": False,
}  # fmt: skip
BOX = """() => {
  const nodes = app.graph.nodes
  const [left, top] = [0, 1].map((i) => Math.min(...nodes.map(({ pos }) => pos[i])))
  const [right, bottom] = [0, 1].map((i) => Math.max(...nodes.map(({ pos, size }) => pos[i] + size[i])))
  return [left - 20, top - 50, right + 20, bottom + 20]
}"""


def main() -> None:
    with tempfile.TemporaryDirectory() as base, sync_playwright() as playwright:
        comfy_server.install_pack(Path(base) / "custom_nodes" / comfy_server.PACK)
        server = comfy_server.ComfyServer(*comfy_server.find(), Path(base))
        browser = playwright.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, BROWSERS))), args=["--no-sandbox"]
        )
        try:
            server.post("/settings", SETTINGS)
            here = Window(browser, server)
            draw(here)
        finally:
            browser.close()
            server.stop()


def draw(here: Window) -> None:
    page = here.page
    file = comfy_server.ROOT / "example_workflows" / f"{QUICKSTART}.json"
    page.evaluate(OPENED, json.loads(file.read_text(encoding="utf-8")))
    here.queue()
    page.set_default_timeout(600_000)
    here.until(f"() => {json.dumps(RESULTS)}.every((id) => app.nodeOutputs[id]?.images.length)")
    here.until("() => Object.keys(app.nodeOutputs).some((id) => app.graph.getNodeById(id).type === 'PreviewImage')")
    left, top, right, bottom = page.evaluate(BOX)
    width, height = 2250, round(2250 * (bottom - top) / (right - left))
    page.set_viewport_size({"width": width, "height": height})
    page.evaluate(
        "([scale, x, y]) => { app.canvas.ds.scale = scale; app.canvas.ds.offset = [x, y]; app.canvas.setDirty(true) }",
        [width / (right - left), -left, -top],
    )
    page.wait_for_timeout(3000)  # the pictures on the nodes are loaded anew
    shot = Image.open(io.BytesIO(page.screenshot(style=".comfy-menu { display: none !important }"))).convert("RGB")
    shot.resize((1500, round(1500 * height / width)), Image.Resampling.LANCZOS).save(
        HERE / "pictures" / "graph.jpg", quality=85
    )
    names = page.evaluate(f"{json.dumps(RESULTS)}.map((id) => app.nodeOutputs[id].images)")
    output = here.server.base / "output"
    rows = [[Image.open(output / each["subfolder"] / each["filename"]) for each in row] for row in names]
    rows.append(subjects.get("pip").references())
    step = EDGE + GAP
    sheet = Image.new("RGB", (step * len(rows[-1]) - GAP, step * len(rows) + 3 * GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            big = picture.convert("RGB").resize((EDGE, EDGE), Image.Resampling.BICUBIC)
            sheet.paste(big, (x * step, y * step + (3 * GAP if row is rows[-1] else 0)))
    sheet.save(HERE / "pictures" / "quickstart.jpg", quality=90)


if __name__ == "__main__":
    main()
