"""What the scripts cost a page, measured in Chromium on a real ComfyUI: python -m tests.browser.measure [ROUNDS].

Prints medians and ranges over the rounds, in milliseconds: what the pack's scripts compute while a page starts, by
Chromium's profiler; the loading of those of its files that a start waits for; the page's start on a ComfyUI with the
scripts and on one without, in the same round; and the redraw of a chart of 300 steps, the script alone, and until its
pixels are there without a GPU (`getImageData`).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.browser.page import chromium_path
from tests.comfyui import comfy_server

SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.UseNewMenu": "Top", "Comfy.Locale": "en"}
OURS = f"/extensions/{comfy_server.PACK}/"
POINTS, REDRAWS = 300, 200
READY = "window.app?.graph && window.app.extensionManager?.workflow?.activeWorkflow?.changeTracker && performance.now()"
ROOM = "performance.setResourceTimingBufferSize(2000)"  # the page asks for more files than the 250 that are kept
ASKED = """(ours) => {
  const files = performance.getEntriesByType("resource").filter(({ name }) => name.includes(ours))
  const eager = files.filter(({ name }) => /(anchor\\.js|(fold|presets|words)\\.mjs)$/.test(name))
  return Math.max(...eager.map((each) => each.responseEnd)) - Math.min(...eager.map((each) => each.startTime))
}"""
REDRAW = """async ([ours, points, redraws]) => {
  const { prepare, draw } = await import(ours + "chart.mjs")
  const step = Array.from({ length: points }, (_, i) => i + 1)
  const curve = (names) => {
    return { every: 1, step, values: Object.fromEntries(names.map((name) => [name, step.map(() => Math.random())])) }
  }
  const record = {
    how: null, step: points, steps: 2 * points, losses: curve(["reconstruction", "anchor"]), probes: curve(["drift"]),
    distances: curve(["drift"]), saved: [], samples: [], kept: null, best: null, checkpoints: [],
  }
  const canvas = document.createElement("canvas")
  canvas.width = 560
  canvas.height = 240
  const context = canvas.getContext("2d")
  context.scale(2, 2)
  const once = (pixels) => {
    const began = performance.now()
    draw(context, 280, 120, record, prepare(record), { text: "#ddd", words: (name) => name })
    if (pixels) context.getImageData(0, 0, 1, 1)
    return performance.now() - began
  }
  const rounds = (pixels) => Array.from({ length: redraws }, () => once(pixels)).sort((a, b) => a - b)
  return [false, true].map((pixels) => (once(pixels), rounds(pixels)[redraws >> 1]))
}"""


def computed(profile: dict) -> float:
    """Milliseconds in which a function of the pack's scripts, or one that it had called, was on the stack."""
    nodes = {node["id"]: node for node in profile["nodes"]}
    inside: set[int] = set()

    def walk(number: int, ours: bool) -> None:
        ours = ours or OURS in nodes[number]["callFrame"]["url"]
        if ours:
            inside.add(number)
        for child in nodes[number].get("children", ()):
            walk(child, ours)

    walk(profile["nodes"][0]["id"], False)
    return sum(time for number, time in zip(profile["samples"], profile["timeDeltas"]) if number in inside) / 1000


def started(browser, server) -> tuple[float, float]:
    """Milliseconds until a page has its first graph, for a browser that has been there before, and ours among them.

    The second are from asking for the first file that a start loads until the last is there, whatever else goes on.
    """
    context = browser.new_context()
    context.add_init_script(ROOM)
    for _ in range(2):
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.port}", wait_until="commit")
        moment = page.wait_for_function(READY, polling="raf", timeout=60_000).json_value()
        ours = page.evaluate(ASKED, OURS)
        page.close()
    context.close()
    return moment, ours


def looked_into(browser, server) -> tuple[float, list[float]]:
    """Milliseconds that the scripts compute in a page's start, and those of redraws."""
    context = browser.new_context()
    page = context.new_page()
    devtools = context.new_cdp_session(page)
    devtools.send("Profiler.enable")
    devtools.send("Profiler.setSamplingInterval", {"interval": 200})
    devtools.send("Profiler.start")
    page.goto(f"http://127.0.0.1:{server.port}")
    page.wait_for_function(READY, timeout=60_000)
    spent = computed(devtools.send("Profiler.stop")["profile"])
    redraws = page.evaluate(REDRAW, [OURS, POINTS, REDRAWS])
    context.close()
    return spent, redraws


def told(name: str, values: list[float]) -> str:
    return f"{name}: {statistics.median(values):.2f} ms ({min(values):.2f} to {max(values):.2f})"


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as base, sync_playwright() as playwright, ExitStack() as stack:
        servers = {}
        for name in ("with", "without"):
            pack = comfy_server.install_pack(Path(base) / name / "custom_nodes" / comfy_server.PACK)
            for script in pack.glob("web/*js") if name == "without" else ():
                script.unlink()
            servers[name] = comfy_server.ComfyServer(*comfy_server.find(), Path(base) / name)
            stack.callback(servers[name].stop)
            servers[name].post("/settings", SETTINGS)
        browser = playwright.chromium.launch(executable_path=chromium_path(playwright), args=["--no-sandbox"])
        stack.callback(browser.close)
        inside = [looked_into(browser, servers["with"]) for _ in range(3)]
        started(browser, servers["without"])
        pairs = []
        for number in range(rounds):
            turn = sorted(servers, reverse=bool(number % 2))
            found = {name: started(browser, servers[name]) for name in turn}
            pairs.append((*found["with"], found["without"][0]))
    print(told("computed by the scripts while a page starts", [spent for spent, _ in inside]))
    print(told("from asking for the first file of a start until the last is there", [files for _, files, _ in pairs]))
    print(told("start of a page with them", [ours for ours, _, _ in pairs]))
    print(told("start of a page without them", [bare for _, _, bare in pairs]))
    print(told("difference, round by round", [ours - bare for ours, _, bare in pairs]))
    print(told(f"redraw of {POINTS} points, script", [script for _, (script, _) in inside]))
    print(told(f"redraw of {POINTS} points, until its pixels are there", [pixels for _, (_, pixels) in inside]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
