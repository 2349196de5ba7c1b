"""The pages: what each asks of the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from salmon_revsmtp.console.render import render

if TYPE_CHECKING:
    from salmon_revsmtp import Server

__all__ = ["PAGES", "View"]

#: Answers a request, in a thread of its own.
View = Callable[[Request, "Server"], Response]


def overview(request: Request, server: Server) -> Response:
    return render(
        request,
        "overview.html",
        rows=server.agents(),
        troubles=server.troubles(),
        lines=request.app.state.hub.lines.since(),
    )


def enable(request: Request, server: Server) -> Response:
    server.set_enabled(request.path_params["agent"], request.state.form.get("enabled") == "yes")
    return RedirectResponse(f"{request.scope['root_path']}/", 303)


PAGES: list[tuple[str, tuple[str, ...], View]] = [
    ("/", ("GET",), overview),
    ("/agents/{agent}/enable", ("POST",), enable),
]
