"""Draws pictures of the README, the help pages and the workflows anew.

    python docs/pictures.py [workflows] [subjects] [checkup]

workflows: from one run of each workflow without download (COMFYUI_PATH as for the tests; needs Playwright and
Chromium). subjects: what the workflows that need a download show, from a training of the embedded model each. checkup:
the page of a LoRA that was trained too long. Those that show a page alone are left as they are.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from anchor_core import cli  # noqa: E402
from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser  # noqa: E402
from anchor_core.bench.case import Case  # noqa: E402
from anchor_core.bench.config import parse  # noqa: E402
from anchor_core.bench.subjects import SandboxSubject  # noqa: E402
from anchor_core.data.pictures import as_picture  # noqa: E402
from anchor_core.sandbox import model, subjects  # noqa: E402
from anchor_core.sandbox.judge import Judge  # noqa: E402
from anchor_core.training.saving import Files  # noqa: E402
from tests.browser.page import Window, chromium_path  # noqa: E402
from tests.browser.test_templates import OPENED, QUICKSTART, RESULTS  # noqa: E402
from tests.comfyui import comfy_server  # noqa: E402

PICTURES, HELP, WORKFLOWS = ROOT / "docs" / "pictures", ROOT / "web" / "docs", ROOT / "example_workflows"
GAP = 6
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
Rows = list[list[Image.Image]]


SUBJECTS = {
    "Train a subject (SD 1.5)": ("momo", "train on SD 1.5"),
    "Train a subject (SDXL)": ("loop", "train on SDXL"),
    "Train a subject (SD 3.5)": ("bolt", "train on SD 3.5"),
    "Train a subject (Flux)": ("luna", "train on Flux"),
    "Train a subject (Z-Image)": ("dot", "train on Z-Image"),
    "Train a subject as an app (SD 1.5)": ("plus", "as a form (app mode)"),
}
"""Workflow -> a subject of the embedded model, which stands for the one that needs a download, and the words below."""
SHOWN = (3, 10, 15)
"""Of the subject's prompts."""
TOO_LONG = {"steps": 300, "learning_rate": 3e-3, "probe_every": 300}


def draw_workflows() -> None:
    with tempfile.TemporaryDirectory() as base, sync_playwright() as playwright:
        comfy_server.install_pack(Path(base) / "custom_nodes" / comfy_server.PACK)
        server = comfy_server.ComfyServer(*comfy_server.find(), Path(base))
        browser = playwright.chromium.launch(executable_path=chromium_path(playwright), args=["--no-sandbox"])
        try:
            server.post("/settings", SETTINGS)
            draw_graph(Window(browser, server))
            # In this order: the later ones read what the earlier ones have trained.
            draw_quickstart(made(server, QUICKSTART))
            draw_word(made(server, "Textual inversion (no download)"))
            draw_adjusted(made(server, "Embedding adjusted (no download)"))
            draw_rules(made(server, "Guidance compared (no download)"))
            draw_strengths(made(server, "Check a LoRA (no download)"))
            draw_w(made(server, "w sweep (no download)"))
        finally:
            browser.close()
            server.stop()


def draw_subjects() -> None:
    for title, (name, text) in SUBJECTS.items():
        case = case_of(name, {"w": 0.5})
        (training,) = case.config.trainings.values()
        case.train(training, lambda event: None)
        drawn = [picture for _, batch in case.pictures(None, case.config.token) for picture in batch]
        rows = [case.subject.references.pixels[: len(SHOWN)], [drawn[i] for i in SHOWN]]
        thumbnail(title, [[Image.fromarray(as_picture(each)) for each in row] for row in rows], text)


def draw_checkup() -> None:
    with tempfile.TemporaryDirectory() as folder:
        case, file = case_of("pip", {"objective": "reconstruction"}, **TOO_LONG), Path(folder) / "adapter.safetensors"
        (training,) = case.config.trainings.values()
        case.train(training, lambda event: None, Files(file, Path(folder) / "embedding.safetensors"))
        if cli.main(["checkup", str(file), "--model", "sandbox", "--out", folder]):
            raise RuntimeError("the check-up failed; what it said is above")
        page = Image.open(Path(folder) / "report.png").convert("RGB")
        save(narrower(page, 720), HELP / "AnchorCheckup.jpg")


def case_of(name: str, training: dict, **settings: float) -> Case:
    """A subject of the embedded model, and one training of it."""
    config = parse({"name": "pictures", "trainings": {"one": training}, "training": settings})
    return Case(DiffusersDenoiser.from_pretrained(model.WEIGHTS), SandboxSubject(name, Judge()), 0, config)


def draw_graph(here: Window) -> None:
    page = here.page
    page.evaluate(OPENED, json.loads((WORKFLOWS / f"{QUICKSTART}.json").read_text(encoding="utf-8")))
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
    narrower(shot, 1500).save(PICTURES / "graph.jpg", quality=85)


def made(server: comfy_server.ComfyServer, title: str) -> dict[str, list[Image.Image]]:
    """The pictures that a run of the workflow makes, by the title of their node."""
    graph = json.loads((WORKFLOWS / f"{title}.json").read_text(encoding="utf-8"))
    # Which lists the files that the workflows before it have made.
    outputs = server.run(comfy_server.to_api(graph, server.get("/object_info")), 600)
    titles = {str(node["id"]): node.get("title") or node["type"] for node in graph["nodes"]}
    return {
        titles[node]: [
            Image.open(server.base / each["type"] / each["subfolder"] / each["filename"]).convert("RGB")
            for values in output.values()
            for each in values
            if isinstance(each, dict) and "filename" in each
        ]
        for node, output in outputs.items()
    }


def sheet(rows: Rows, edge: int = 128, apart: int = 0) -> Image.Image:
    """The pictures in rows, the last `apart` of which stand off."""
    step = edge + GAP
    drawn = Image.new("RGB", (step * max(map(len, rows)) - GAP, step * len(rows) - GAP + 3 * GAP * apart), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top = y * step + 3 * GAP * (y >= len(rows) - apart)
            drawn.paste(picture.convert("RGB").resize((edge, edge), Image.Resampling.BICUBIC), (x * step, top))
    return drawn


def thumbnail(title: str, rows: Rows, text: str) -> None:
    pictures = sheet(rows, (512 - GAP * (len(rows[0]) - 1)) // len(rows[0]))
    drawn = Image.new("RGB", (512, 512), "#14192b")
    drawn.paste(pictures, (0, max(0, (452 - pictures.height) // 2)))
    pen = ImageDraw.Draw(drawn)
    pen.rectangle((0, 452, 512, 512), "#14192b")
    pen.text((256, 482), text, "white", ImageFont.load_default(34), anchor="mm")
    drawn.save(WORKFLOWS / f"{title}.jpg", quality=88)


def narrower(drawn: Image.Image, width: int) -> Image.Image:
    return drawn.resize((width, round(width * drawn.height / drawn.width)), Image.Resampling.LANCZOS)


def save(drawn: Image.Image, *files: Path) -> None:
    for file in files:
        drawn.save(file, quality=78)


def draw_quickstart(of: dict[str, list[Image.Image]]) -> None:
    rows = [of["Before"], of["The LoRA, sampled plainly"], of["With guidance"]]
    before, plain, _ = rows
    save(sheet([*rows, subjects.get("pip").references()], apart=1), PICTURES / "quickstart.jpg")
    save(sheet(rows), HELP / "AnchorTrainLoRA.jpg")
    save(sheet([before]), HELP / "AnchorSandboxModel.jpg")
    save(sheet([[*before[:2], *plain[:2]]]), HELP / "AnchorConcept.jpg")
    (report,) = of["What the training changed"]
    save(narrower(report, 900), HELP / "AnchorTrainOptions.jpg", HELP / "AnchorDriftReport.jpg")
    thumbnail(QUICKSTART, list(zip(*rows)), "before   plain   guided")


def draw_word(of: dict[str, list[Image.Image]]) -> None:
    thumbnail("Textual inversion (no download)", [of["The class"][:2], of["The subject"][:2]], "class / the new word")


def draw_adjusted(of: dict[str, list[Image.Image]]) -> None:
    rows = [of["As trained"], of["Adjusted file"], of["Adjusted prompt"]]
    save(sheet(rows), HELP / "AnchorAdjustConditioning.jpg")
    save(sheet(rows[:2]), HELP / "AnchorAdjustEmbedding.jpg")
    thumbnail("Embedding adjusted (no download)", [row[:3] for row in rows], "trained / file / prompt")


def draw_rules(of: dict[str, list[Image.Image]]) -> None:
    rows = [of[name] for name in ("cfg", "personalization", "score_blend", "unconditional_priors")]
    save(sheet(rows), HELP / "AnchorGuidance.jpg")
    save(sheet(rows[-1:]), HELP / "AnchorGuider.jpg")
    (ranks,) = of["References and pictures"]
    save(narrower(ranks, 640), HELP / "AnchorCompare.jpg")
    firsts = [row[0] for row in rows]
    thumbnail("Guidance compared (no download)", [firsts[:2], firsts[2:]], "four rules, one noise")


def draw_strengths(of: dict[str, list[Image.Image]]) -> None:
    (grid,) = of["All strengths"]
    save(narrower(grid, 720), HELP / "AnchorSweep.jpg")
    columns = swept(of["Strengths side by side"])
    rows = [columns[0], columns[1], columns[-1]]  # 0, 0.5 and 1
    save(sheet(rows), HELP / "AnchorApplyAdapter.jpg")
    thumbnail("Check a LoRA (no download)", [list(each) for each in zip(*rows)], "strength 0 / 0.5 / 1")


def draw_w(of: dict[str, list[Image.Image]]) -> None:
    rows = swept(of["w side by side"])
    thumbnail("w sweep (no download)", [list(each) for each in zip(*rows)], "w = 0 / 0.5 / 1")


def swept(pictures: list[Image.Image]) -> Rows:
    """A row for each value of a sweep of two pictures."""
    return [pictures[i : i + 2] for i in range(0, len(pictures), 2)]


DRAWN = {"workflows": draw_workflows, "subjects": draw_subjects, "checkup": draw_checkup}

if __name__ == "__main__":
    for kind in sys.argv[1:] or DRAWN:
        DRAWN[kind]()
