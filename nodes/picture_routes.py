"""The routes of the picked pictures: what there is of a list, and small pictures to show.

A list names files of the input folder as ComfyUI does, and small pictures are asked for by what is in the file.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ..anchor_core.data.folder import MAX_PICTURES
from ..anchor_core.data.picked import PickedFile, parse_file
from . import pictures
from .guard import not_json, own_pages, refused

ROOT = "/semantic_anchor/pictures"
VIEWS = {"picture": False, "mask": True}
MOST = 4
"""Files that are read at once: a photograph of 24 megapixels takes 70 MB meanwhile."""


def register(routes) -> None:
    """Add them to a table of aiohttp."""
    from server import web

    reading = asyncio.Semaphore(MOST)

    async def aside(work, *arguments):
        async with reading:
            return await asyncio.to_thread(work, *arguments)

    @routes.post(ROOT)
    @own_pages
    async def look(request):
        if (form := not_json(request)) is not None:
            return form
        try:
            files = asked(await request.json())
        except ValueError as error:
            return refused(400, str(error))
        return web.json_response({"files": await asyncio.gather(*(aside(pictures.look, *each) for each in files))})

    @routes.get(ROOT + r"/{sha256:[0-9a-f]{64}}/{view}")
    @own_pages
    async def small(request):
        sha256, view = request.match_info["sha256"], request.match_info["view"]
        shown = await aside(pictures.shown, sha256, VIEWS[view]) if view in VIEWS else None
        if shown is None:
            return refused(404, f"there is no {view[:40]!r} of that sha256 in the input folder")
        headers = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=shown, content_type="image/jpeg", headers=headers)


def asked(said: Any) -> list[tuple[PickedFile, str]]:
    """The files that a body asks about, `{"files": [{"name": ..., "sha256": ..., "as": "picture" or "mask"}]}`.

    Raises:
        ValueError: if it is none.
    """
    entries = said.get("files") if isinstance(said, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_PICTURES:
        raise ValueError(f"files is {type(entries).__name__}, but it takes a list of at most {MAX_PICTURES} objects")
    files = []
    for number, entry in enumerate(entries, 1):
        file = parse_file(entry, f"files entry {number}", {"as": str})
        view = entry.get("as") or "picture"
        if view not in VIEWS:
            raise ValueError(f"files entry {number}: as is {view[:40]!r}, but it takes {' or '.join(VIEWS)}")
        files.append((file, view))
    return files
