"""The application: which path is answered by what.

The pages are views (:mod:`salmon_revsmtp.console.views`): each gets the request and the server, and
runs in a thread, for the server's methods block.  In ``request.state`` it finds the ``session``,
the ``visit`` and, of a POST, the ``form``, all of which the guard has seen to; the log's last lines
are ``request.app.state.hub.lines.since()``.  What is here is for those who are not logged in yet,
and for programs.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import importlib
import logging
import mimetypes
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from salmon_revsmtp.console.attempts import Attempts
from salmon_revsmtp.console.events import Hub
from salmon_revsmtp.console.links import Links
from salmon_revsmtp.console.passwords import Password
from salmon_revsmtp.console.render import STATIC, hash_of, render
from salmon_revsmtp.console.security import Cookies, Guard, Visit
from salmon_revsmtp.console.sessions import Sessions
from salmon_revsmtp.console.settings import ConsoleSettings
from salmon_revsmtp.console.views import PAGES

if TYPE_CHECKING:
    from salmon_revsmtp import Server
    from salmon_revsmtp.console.views import View

__all__ = ["Door", "make_app"]

# Passwords that are checked at a time: each takes 16 MiB and a processor for a while.
CHECKS = 2
# Letters of a password that is looked at.
LONGEST = 1024
# Seconds in which a server that is well answers whether it is ready.
READY = 2.0
# Seconds that a browser may keep a static file, whose address changes when it does.
STATIC_AGE = 365 * 86400
# Of a page that only follows what happens: how many times as long as it took no other is made, and
# seconds that this is at most.
REST, LONGEST_REST = 60.0, 10.0
# Octets of a random token.
RANDOM = 32

log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass
class Door:
    """Who may come in: what of that lasts from one request to the next."""

    settings: ConsoleSettings
    links: Links = field(default_factory=Links)
    attempts: Attempts = field(default_factory=Attempts)

    def __post_init__(self) -> None:
        setting = self.settings.password
        self.password = Password(setting.get_secret_value()) if setting is not None else None
        self.sessions = Sessions(60.0 * self.settings.idle_minutes)
        self.cookies = Cookies(self.settings)
        self._checks = asyncio.Semaphore(CHECKS)

    async def try_password(self, given: str, address: str) -> str:
        """Empty if it is right, else why one may not come in."""
        if self.password is None:
            return "There is no password. Run salmon-revsmtp console, which prints a link."
        # Before any look at what is given: who hears that a guess was wrong goes on guessing.
        if wait := self.attempts.wait(address):
            minutes = max(1, round(wait / 60))
            return (
                f"There were too many wrong passwords. Try again in {minutes} minutes, or run "
                "salmon-revsmtp console, which prints a link."
            )
        if len(given) <= LONGEST and self.password.known(given):
            self.attempts.right(address)
            return ""
        self.attempts.begin(address)
        async with self._checks:
            right = len(given) <= LONGEST and await run_in_threadpool(self.password.check, given)
        if right:
            self.attempts.right(address)
            return ""
        log.warning("console: a login from %s failed", address)
        return "That is not the password."


def make_app(server: Server, door: Door, hub: Hub) -> Guard:
    """The application, behind its guard.  On the event loop that serves it."""
    gate, pace = _Gate(server, door, hub), _Pace()
    routes = [
        Route("/healthz", gate.healthz, methods=["GET"]),
        Route("/readyz", gate.readyz, methods=["GET"]),
        Route("/metrics", gate.metrics, methods=["GET"]),
        Route("/static/{hash}/{name:path}", gate.static, methods=["GET"]),
        Route("/login", gate.login, methods=["GET", "POST"]),
        Route("/enter", gate.enter, methods=["GET"]),
        Route("/logout", gate.logout, methods=["POST"]),
        Route("/events", gate.events, methods=["GET"]),
        *(
            Route(path, _in_a_thread(view, server, pace), methods=list(methods))
            for path, methods, view in PAGES
        ),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: _wrong,
            Exception: _broken,
            LookupError: _missing,
            RuntimeError: _stopping,
            OSError: _unreadable,
        },
    )
    app.router.redirect_slashes = False
    app.state.hub = hub
    return Guard(app, door.settings, door.sessions, door.cookies)


def _in_a_thread(view: View, server: Server, pace: _Pace) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        if request.headers.get("x-live") is None:
            return await run_in_threadpool(view, request, server)
        async with pace:
            if await request.is_disconnected():  # it was a long rest
                return Response(status_code=204)
            return await run_in_threadpool(view, request, server)

    return endpoint


class _Pace:
    """How fast pages are made again that only follow what happens: one at a time, and after each a
    rest, so that all browsers together take no more than a part of the time.  What a person asks
    for is made at once."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._began = self._next = 0.0

    async def __aenter__(self) -> None:
        await self._turn.acquire()
        try:
            await asyncio.sleep(max(0.0, self._next - time.monotonic()))
        except BaseException:
            self._turn.release()
            raise
        self._began = time.monotonic()

    async def __aexit__(self, *_: object) -> None:
        now = time.monotonic()
        self._next = now + min(REST * (now - self._began), LONGEST_REST)
        self._turn.release()


class _Events(Response):
    """The events, until the browser has gone, or ``alive`` says no more."""

    media_type = "text/event-stream"

    def __init__(self, hub: Hub, alive: Callable[[], bool]) -> None:
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._hub, self._alive = hub, alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_gone(receive))
        stream = self._hub.stream(lambda: not gone.done() and self._alive())
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for piece in stream:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            await stream.aclose()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Gate:
    """What is no page."""

    def __init__(self, server: Server, door: Door, hub: Hub) -> None:
        self._server, self._door, self._hub = server, door, hub
        self._static = {path.name for path in STATIC.iterdir()}

    # -- coming in, and going -------------------------------------------------------------------

    async def login(self, request: Request) -> Response:
        visit: Visit = request.state.visit
        if request.method != "POST":
            if request.state.session is not None:
                return self._to(request, "/")
            return self._login_page(request, request.query_params.get("next", ""))
        form = request.state.form
        error = await self._door.try_password(form.get("password", ""), visit.address)
        if error:
            return self._login_page(request, form.get("next", ""), error)
        return self._come_in(request, _path(form.get("next", "")))

    def _login_page(self, request: Request, wanted: str, error: str = "") -> Response:
        visit: Visit = request.state.visit
        token = request.state.cookies.get(self._door.cookies.login, "")
        fresh = (
            "" if len(token) >= RANDOM and token.isprintable() else secrets.token_urlsafe(RANDOM)
        )
        request.state.csrf = fresh or token
        response = render(
            request,
            "login.html",
            403 if error else 200,
            error=error,
            next=_path(wanted) if wanted else "",
            has_password=self._door.password is not None,
        )
        if fresh:
            self._door.cookies.put(response.headers, self._door.cookies.login, fresh, visit)
        return response

    async def enter(self, request: Request) -> Response:
        """Someone has followed a link of ``salmon-revsmtp console``."""
        if self._door.links.take(request.query_params.get("token", "")):
            self._door.attempts.right(request.state.visit.address)
            return self._come_in(request, "/")
        if request.state.session is not None:
            return self._to(request, "/")
        return self._login_page(
            request,
            "",
            "This link lets no one in any more: it is good once, and for 5 minutes. Run "
            "salmon-revsmtp console for another.",
        )

    def _come_in(self, request: Request, path: str) -> Response:
        door, visit = self._door, request.state.visit
        door.sessions.end(request.state.cookies.get(door.cookies.session, ""))
        identity, _ = door.sessions.begin(visit.user)
        response = self._to(request, path)
        door.cookies.put(response.headers, door.cookies.session, identity, visit)
        door.cookies.remove(response.headers, door.cookies.login, visit)
        log.info("console: someone has logged in from %s", visit.address)
        return response

    async def logout(self, request: Request) -> Response:
        door = self._door
        door.sessions.end(request.state.cookies.get(door.cookies.session, ""))
        response = self._to(request, "/login")
        door.cookies.remove(response.headers, door.cookies.session, request.state.visit)
        return response

    def _to(self, request: Request, path: str) -> Response:
        return RedirectResponse(f"{request.scope['root_path']}{path}", 303)

    # -- live -----------------------------------------------------------------------------------

    async def events(self, request: Request) -> Response:
        session = request.state.session
        if self._hub.full:
            return PlainTextResponse("too many browsers listen\n", 503)
        return _Events(self._hub, lambda: self._door.sessions.alive(session))

    # -- for programs ---------------------------------------------------------------------------

    async def healthz(self, request: Request) -> Response:
        """We are there."""
        return PlainTextResponse("ok\n")

    async def readyz(self, request: Request) -> Response:
        """The server does its work."""
        if await run_in_threadpool(self._server.answers, READY):
            return PlainTextResponse("ok\n")
        return PlainTextResponse("not ok\n", 503)

    async def metrics(self, request: Request) -> Response:
        if not await self._may_read(request):
            headers = {"www-authenticate": 'Basic realm="salmon-revsmtp", charset="UTF-8"'}
            return PlainTextResponse("log in\n", 401, headers)
        found = await run_in_threadpool(_exposition)
        if found is None:
            return PlainTextResponse("there are no metrics; see the setting metrics\n", 404)
        text, kind = found
        return Response(text, media_type=kind)

    async def _may_read(self, request: Request) -> bool:
        if request.state.session is not None:
            return True
        way, _, given = request.headers.get("authorization", "").partition(" ")
        token = self._door.settings.metrics_token
        if way.lower() == "bearer" and token is not None:
            return hmac.compare_digest(given.strip().encode(), token.get_secret_value().encode())
        if way.lower() != "basic":
            return False
        with contextlib.suppress(ValueError, binascii.Error):
            _, _, password = base64.b64decode(given, validate=True).decode().partition(":")
            return not await self._door.try_password(password, request.state.visit.address)
        return False

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        # No file is looked for by a name that a stranger has made up.
        if name not in self._static:
            raise HTTPException(404)
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        response = Response((STATIC / name).read_bytes(), media_type=kind)
        if request.path_params["hash"] == hash_of(name):
            response.headers["cache-control"] = f"private, max-age={STATIC_AGE}, immutable"
        return response


def _path(wanted: str) -> str:
    """Where someone wanted to go: a path of ours, and nothing that a browser takes for a host."""
    if wanted.startswith("/") and not wanted.startswith(("//", "/\\")) and wanted.isprintable():
        return wanted
    return "/"


def _exposition() -> tuple[bytes, str] | None:
    """The metrics, if there are any."""
    try:
        metrics = importlib.import_module("salmon_revsmtp.metrics")
        found: tuple[bytes, str] = metrics.exposition()
    except (ImportError, RuntimeError):  # not installed, or not at work
        return None
    return found


# -- what goes wrong ------------------------------------------------------------------------------

TEXTS = {
    404: "There is no such page.",
    405: "That cannot be done here.",
}


def _page(request: Request, status: int, text: str) -> Response:
    return render(request, "error.html", status, number=status, text=text)


async def _wrong(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = TEXTS.get(error.status_code, error.detail)
    return _page(request, error.status_code, text)


async def _missing(request: Request, error: Exception) -> Response:
    if type(error) is not LookupError:  # a KeyError is no answer of the server's
        raise error
    return _page(request, 404, str(error.args[0]) if error.args else TEXTS[404])


async def _stopping(request: Request, error: Exception) -> Response:
    if isinstance(error, RuntimeError) and str(error).startswith(("the server", "no answer")):
        return _page(request, 503, f"There is no answer: {error}.")
    raise error


async def _unreadable(request: Request, error: Exception) -> Response:
    log.warning("console: %r: %s", request.url.path, error)
    return _page(request, 503, f"That cannot be read or written now: {error}.")


async def _broken(request: Request, error: Exception) -> Response:
    """The guard logs it."""
    return _page(request, 500, "There is a bug in this page; the log has it.")
