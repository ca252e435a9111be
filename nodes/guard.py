"""Who is answered by our routes: pages of ComfyUI's own origin, and what is no browser."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any


def refused(status: int, why: str):
    """An answer that says why there is no other."""
    from server import web

    return web.json_response({"error": why}, status=status)


def own_pages(handler: Callable[[Any], Awaitable[Any]]):
    """A handler that a page of another origin does not reach."""

    @wraps(handler)
    async def checked(request):
        return await handler(request) if _same_origin(request) else refused(403, "the page is of another origin")

    return checked


def not_json(request):
    """The refusal of a body that is no JSON by its type, as forms of other origins are; else None."""
    if request.content_type == "application/json":
        return None
    return refused(415, f"the body is {request.content_type}, but it takes application/json")


def _same_origin(request) -> bool:
    """Browsers say it in Sec-Fetch-Site, or, where that is missing, by an Origin; what is no browser says neither."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None:
        return site in ("same-origin", "none")
    return origin is None or origin.partition("://")[2].lower() == request.headers.get("Host", "").lower()
