"""The routes of the trainings: records, sample pictures, orders to those that go on, a look at what is not yet run.

Ids come from the list or from an event, never paths. A page of another origin is refused, and so is a form.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from . import looking, picture_routes, runs
from .guard import not_json, own_pages, refused

ROOT = "/semantic_anchor/runs"
LOOK = "/semantic_anchor/look"
WEB = Path(__file__).resolve().parents[1] / "web"
ORDERS = {
    "stop": None, "pause": None, "go_on": None, "picture_now": None, "save_now": None, "keep": "step",
    "extend": "steps",
}  # fmt: skip
"""Orders that can be given, and the number that each takes."""


def register() -> None:
    """Add the routes to ComfyUI's server, if there is one."""
    from server import PromptServer, web

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    server.app.on_response_prepare.append(_asked_for_again)
    routes = server.routes
    picture_routes.register(routes)

    def unknown(request):
        return refused(404, f"there is no run {request.match_info['run'][:40]!r}")

    @routes.get(ROOT)
    @own_pages
    async def list_runs(request):
        node, workflow = (request.query.get(name) for name in ("node", "workflow"))
        return web.json_response({"runs": await asyncio.to_thread(runs.listed, node, workflow)})

    @routes.get(ROOT + "/{run}")
    @own_pages
    async def one_run(request):
        state = await asyncio.to_thread(runs.state, request.match_info["run"])
        return unknown(request) if state is None else web.json_response(state)

    @routes.get(ROOT + r"/{run}/pictures/{step:\d{1,9}}")
    @own_pages
    async def one_picture(request):
        file = await asyncio.to_thread(runs.picture, request.match_info["run"], int(request.match_info["step"]))
        return unknown(request) if file is None else web.FileResponse(file, headers={"Cache-Control": "no-cache"})

    @routes.post(LOOK)
    @own_pages
    async def look(request):
        if (form := not_json(request)) is not None:
            return form
        try:
            return web.json_response(await asyncio.to_thread(looking.look, await request.json()))
        except ValueError as error:
            return refused(400, str(error))

    @routes.post(ROOT + "/{run}/orders")
    @own_pages
    async def order(request):
        if (form := not_json(request)) is not None:
            return form
        run = runs.live(request.match_info["run"])
        if run is None:
            ended = await asyncio.to_thread(runs.state, request.match_info["run"])
            return unknown(request) if ended is None else refused(409, "the training has ended; run it again")
        try:
            give(run.orders, await request.json())
        except ValueError as error:
            return refused(400, str(error))
        return web.json_response({"run": run.id})


async def _asked_for_again(request, response) -> None:
    """The modules of our page are asked for at each start, as ComfyUI has it of `.js` alone.

    By itself a browser keeps a file for a tenth of its age, and after an update a script would meet old modules.
    """
    resource = request.match_info.route.resource
    if request.path.endswith(".mjs") and resource is not None and resource.get_info().get("directory") == WEB:
        response.headers["Cache-Control"] = "no-cache"


def give(orders, said: Any) -> None:
    """Give the order that a body says, `{"order": one of ORDERS}` with its number; ValueError if it is none."""
    name = said.get("order") if isinstance(said, dict) else None
    if not isinstance(name, str) or name not in ORDERS:
        raise ValueError(f"order is {str(name)[:40]!r}, but it takes one of {', '.join(ORDERS)}")
    number = ORDERS[name]
    getattr(orders, name)(*([] if number is None else [said.get(number)]))
