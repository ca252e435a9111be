"""The templates as forms: app mode shows the training live, and a sweep to choose from."""

from __future__ import annotations

import json
import uuid

import pytest

from tests.comfyui import comfy_server

pytestmark = pytest.mark.browser

LOAD = "async (graph) => { await app.loadGraphData(graph) }"


def template(title: str, **values) -> dict:
    """A template that opens as an app, with other values of its widgets by the value they have.

    Its id is another, as ComfyUI shows what ran under the same.
    """
    graph = json.loads((comfy_server.ROOT / "example_workflows" / f"{title}.json").read_text(encoding="utf-8"))
    graph["extra"]["linearMode"], graph["id"] = True, str(uuid.uuid4())
    for node in graph["nodes"]:
        node["widgets_values"] = [
            values.get(each, each) if isinstance(each, str) else each for each in node["widgets_values"]
        ]
    return graph


def test_the_form_trains_and_shows_it(window):
    here = window()
    here.page.evaluate(LOAD, template("Quickstart (no download)", auto="quick try"))
    run = here.page.locator(".sa-run:visible")
    run.first.wait_for()
    here.queue()
    run.locator(".sa-head", has_text="step ").first.wait_for()
    run.locator(".sa-head", has_text="Finished").first.wait_for()
    assert "quick try (sandbox)" in run.locator(".sa-chosen").first.inner_text()


def test_the_form_shows_a_sweep_to_choose_from(window):
    here = window()
    here.page.evaluate(
        LOAD, template("w sweep (no download)", **{"auto": "quick try", "w": "steps", "0, 0.5, 1": "2, 4"})
    )
    here.queue()
    here.page.locator(".sa-column:visible").nth(1).wait_for()
    # ComfyUI's welcome to its apps lies above.
    here.page.locator(".sa-column:visible button").first.evaluate("(button) => button.click()")
    assert here.page.locator(".sa-taken").first.inner_text().startswith("steps 2 → ")
