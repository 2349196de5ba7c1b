"""How a page is made: jinja2, in which everything is text unless a template says that it is markup.

What a stranger wrote is text, always, and what no one can see of it is shown as "?": control
characters, and those that turn the direction of writing.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

__all__ = ["STATIC", "render", "url_for"]

HERE = Path(__file__).parent
STATIC = HERE / "static"

# Letters of the hash in the address of a static file.
HASH = 16


def render(request: Request, template: str, status: int = 200, **context: Any) -> Response:
    """A page of a template, in which there are, beside the ``context``:

    ``url(path)``  the address of a path of ours: ``url('/agents')``; of a static file the one with
                   a hash of its content in it.
    ``csrf``       the token that each form has as ``csrf``.
    ``user``       who is logged in, as the reverse proxy says; empty where there is none.
    """
    root = request.scope.get("root_path", "")
    session = request.scope["state"].get("session")
    context = {
        "url": functools.partial(url_for, root),
        "csrf": session.csrf if session is not None else request.scope["state"].get("csrf", ""),
        "user": session.user if session is not None else "",
        **context,
    }
    text = _environment().get_template(template).render(context)
    return HTMLResponse(text, status)


def url_for(root: str, path: str) -> str:
    """The address of a path below ``root``, under which a reverse proxy has us."""
    if path.startswith("/static/"):
        name = path.removeprefix("/static/")
        return f"{root}/static/{hash_of(name)}/{quote(name)}"
    return f"{root}{path}"


@functools.cache
def hash_of(name: str) -> str:
    """Of the content of a static file."""
    return hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:HASH]


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        auto_reload=False,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible(value: Any) -> Any:
    """What is put into a page."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in value)
