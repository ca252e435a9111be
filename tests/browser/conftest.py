"""Chromium on a real ComfyUI, once for each front end and each way that it draws nodes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from anchor_core.sandbox import model as sandbox
from tests.browser.page import Window, chromium_path
from tests.browser.picker import Node
from tests.comfyui import comfy_server

FRONT_ENDS = ("installed", "newest")
SHOTS = os.environ.get("BROWSER_SCREENSHOTS")


def _root(front_end: str) -> list[str]:
    """ComfyUI's option for a front end."""
    if front_end == "installed":
        return []
    root = os.environ.get("COMFYUI_FRONT_END")
    if not root:
        pytest.skip("no second front end: COMFYUI_FRONT_END names the static folder of comfyui-frontend-package")
    return ["--front-end-root", root]


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with playwright.sync_playwright() as running:
        path = chromium_path(running)
        if not path.is_file():
            pytest.skip("no Chromium: install it (or `playwright install chromium`), or name it in CHROMIUM")
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session", params=FRONT_ENDS)
def server(request, chromium, tmp_path_factory, weights):
    found = comfy_server.find()
    if isinstance(found, str):
        pytest.skip(found)
    options = _root(request.param)
    base = tmp_path_factory.mktemp(f"comfyui-{request.param}")
    pack = comfy_server.install_pack(base / "custom_nodes" / comfy_server.PACK)
    if weights != sandbox.WEIGHTS:
        (pack / "anchor_core/sandbox/weights").symlink_to(weights, target_is_directory=True)
    server = comfy_server.ComfyServer(*found, base, *options)
    server.front_end = request.param
    yield server
    server.stop()


@pytest.fixture(params=["classic", "nodes2"])
def window(request, server, chromium):
    """`window(...)`: a page of its own that shows ComfyUI; when the test ends nothing of ours was in the console."""
    usual = {
        "Comfy.TutorialCompleted": True, "Comfy.UseNewMenu": "Top", "Comfy.VueNodes.Enabled": request.param == "nodes2",
        "Comfy.Locale": "en", "Comfy.ColorPalette": "dark",
    }  # fmt: skip
    opened = []

    def open_(settings=None, **options) -> Window:
        server.post("/settings", usual | (settings or {}))
        if not opened:
            server.post("/free", {"free_memory": True})  # of what another test has trained, which it gives for the same
        opened.append(Window(chromium, server, **options))
        return opened[-1]

    yield open_
    for number, each in enumerate(opened):
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            name = f"{request.node.originalname}-{server.front_end}-{request.param}-{number}.png"
            each.page.screenshot(path=Path(SHOTS) / name)
        each.page.context.close()
    server.post("/queue", {"clear": True})
    server.post("/interrupt", {})
    assert [error for each in opened for error in each.errors] == []


@pytest.fixture
def node(window, server):
    """With nothing in ComfyUI's input folder, where a second picture of a name is numbered."""
    shutil.rmtree(server.base / "input")
    (server.base / "input").mkdir()
    return Node(window()).open()
