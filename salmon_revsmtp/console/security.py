"""What stands before every page: who may come in, and what a page may do.

In this order: the path below the reverse proxy, the name by which the browser reaches us (a web
site that has its name point here hears nothing), the method, the session, and for a form its
origin, its size and its token.  Only then a view is called.  Each answer has the headers that keep
a browser from doing with it what it is not for.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from starlette.datastructures import Headers, ImmutableMultiDict, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from salmon_revsmtp.console.sessions import Session, Sessions
from salmon_revsmtp.console.settings import ConsoleSettings

__all__ = ["Cookies", "Guard", "Visit"]

# Octets of a form, and how many fields: a thousand keys of messages.
MOST_FORM = 256 * 1024
MOST_FIELDS = 2000
# Seconds that a browser may take none of an answer.
SEND_TIMEOUT = 30.0

POLICY = "; ".join(
    (
        "default-src 'none'",
        "style-src 'self'",
        "script-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # A form of this page has to say where it comes from, and no other site hears of it.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
# Where anyone may ask, by whatever name: a program that looks whether we are there.
PROBES = ("/healthz", "/readyz")
# Without a session: what leads to one, and what has its own.
OPEN = ("/login", "/enter", "/metrics")
# What a program asks for begins no session.
SESSIONLESS = ("/metrics", ".css", ".js", ".svg")

log = logging.getLogger(__name__)


class TooSlow(Exception):
    """A browser takes too long over an answer; its connection is closed."""


@dataclass(frozen=True)
class Visit:
    """Who asks, and how he reaches us, as far as we believe it.

    ``address``  his; ``host``: the name and port that the browser has; ``secure``: by https.
    ``user``     who has logged in at the reverse proxy; empty: no one.
    """

    address: str
    host: str
    secure: bool
    user: str = ""

    @property
    def origin(self) -> str:
        """That of our pages, as a browser says it."""
        return f"{'https' if self.secure else 'http'}://{self.host}".lower()


class Cookies:
    """The cookies that a browser has of us.  Each console of a host has its own."""

    def __init__(self, settings: ConsoleSettings) -> None:
        self.session = f"salmon-revsmtp-{settings.address.port}"
        self.login = f"{self.session}-login"
        self._path = settings.base_path or "/"

    def put(self, headers: MutableHeaders, name: str, value: str, visit: Visit) -> None:
        """Until the browser ends; for no script, and not where another site leads here."""
        headers.append("set-cookie", f"{name}={value}; {self._rules(visit)}")

    def remove(self, headers: MutableHeaders, name: str, visit: Visit) -> None:
        headers.append("set-cookie", f"{name}=; Max-Age=0; {self._rules(visit)}")

    def _rules(self, visit: Visit) -> str:
        secure = "; Secure" if visit.secure else ""
        return f"Path={self._path}; HttpOnly; SameSite=Strict{secure}"


class Guard:
    """Stands before the application."""

    def __init__(
        self, app: ASGIApp, settings: ConsoleSettings, sessions: Sessions, cookies: Cookies
    ) -> None:
        self._app, self._settings = app, settings
        self._sessions, self._cookies = sessions, cookies
        self._proxies = settings.networks
        self._names = {"localhost", settings.address.host.lower(), *settings.hosts}
        if settings.address.loopback:
            self._names |= {"127.0.0.1", "::1"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope = {**scope, "state": dict(scope.get("state") or {})}
        path = self._below(scope)
        headers = Headers(scope=scope)
        visit = self._visit(scope, headers)
        scope["state"]["visit"] = visit
        send = self._guarded(send, scope["state"], visit)
        try:
            answer = await self._refusal(scope, receive, headers, path, visit)
            await (answer or self._app)(scope, receive, send)
        except TooSlow as error:
            log.info("console: %s for %g s", error, SEND_TIMEOUT)
            raise
        except Exception:
            log.exception("console: %r: a bug", path)
            raise

    def _guarded(self, send: Send, state: dict[str, Any], visit: Visit) -> Send:
        """The same for an answer that has all that each of ours has."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
                if identity := state.pop("new_session", None):
                    self._cookies.put(headers, self._cookies.session, identity, visit)
            try:
                await asyncio.wait_for(send(message), SEND_TIMEOUT)
            except (asyncio.TimeoutError, TimeoutError):
                raise TooSlow(f"{visit.address} took none of an answer") from None

        return guarded

    def _below(self, scope: Scope) -> str:
        """The path below the reverse proxy's, whether that leaves its own on or not."""
        base, path = self._settings.base_path, scope["path"]
        if base and (path == base or path.startswith(f"{base}/")):
            path = path[len(base) :] or "/"
        scope["path"], scope["root_path"] = base + path, base
        scope["raw_path"] = scope["path"].encode("utf-8", "surrogateescape")
        return str(path)

    # -- who asks -------------------------------------------------------------------------------

    def _visit(self, scope: Scope, headers: Headers) -> Visit:
        peer = (scope.get("client") or ("", 0))[0]
        host, secure = headers.get("host", ""), scope.get("scheme") == "https"
        if not self._is_proxy(peer):
            return Visit(peer, host, secure)
        forwarded = [one.strip() for one in _said(headers, "x-forwarded-for").split(",")]
        # The last that none of our proxies has is the one that reached the first of them.
        others = [one for one in forwarded if one and not self._is_proxy(one)]
        name = self._settings.user_header
        return Visit(
            others[-1] if others else peer,
            _last(headers, "x-forwarded-host") or host,
            secure or _last(headers, "x-forwarded-proto").lower() == "https",
            _last(headers, name) if name is not None else "",
        )

    def _is_proxy(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
            parsed = parsed.ipv4_mapped
        return any(parsed in network for network in self._proxies)

    def _knows(self, host: str) -> bool:
        """Whether a browser that says this reaches us by a name of ours."""
        name = urlsplit(f"//{host}").hostname if host else None
        if name is None:
            return False
        if name in self._names:
            return True
        # No one's name points to an address that is written out.
        return self._settings.address.anywhere and _is_address(name)

    # -- who may come in ------------------------------------------------------------------------

    async def _refusal(
        self, scope: Scope, receive: Receive, headers: Headers, path: str, visit: Visit
    ) -> Response | None:
        """What is answered instead of the page."""
        method = scope["method"]
        if path in PROBES:
            return None if method in ("GET", "HEAD") else _text(405, "no such method")
        try:
            known = self._knows(visit.host)
        except ValueError:
            known = False
        if not known:
            return _text(
                421,
                "This console does not know the name by which you reach it. If it is one of its "
                "own, add it to 'hosts' in the settings of the console.",
            )
        if method not in ("GET", "HEAD", "POST"):
            return _text(405, "no such method")
        live = headers.get("x-live") is not None or path == "/events"
        session = self._session(scope, headers, visit, use=not live)
        scope["state"]["session"] = session
        if method == "POST":
            return await self._refused_form(scope, receive, headers, path, visit, session)
        if session is None and not (path in OPEN or path.startswith("/static/")):
            return self._to_the_login(scope, path, live)
        return None

    def _session(
        self, scope: Scope, headers: Headers, visit: Visit, *, use: bool
    ) -> Session | None:
        jar = _cookies(headers)
        scope["state"]["cookies"] = jar
        session = self._sessions.find(jar.get(self._cookies.session, ""), use=use)
        if session is not None and session.user != visit.user:
            session = None  # who has logged out there, or is someone else
        if session is None and visit.user and use and not scope["path"].endswith(SESSIONLESS):
            identity, session = self._sessions.begin(visit.user)
            scope["state"]["new_session"] = identity
        return session

    def _to_the_login(self, scope: Scope, path: str, live: bool) -> Response:
        if path == "/events":
            return _text(401, "log in")
        root, query = scope["root_path"], scope.get("query_string", b"").decode("latin-1")
        wanted = path + (f"?{query}" if query else "")
        to = f"{root}/login" + (f"?next={quote(wanted, safe='')}" if wanted != "/" else "")
        return RedirectResponse(to, 303)

    async def _refused_form(
        self,
        scope: Scope,
        receive: Receive,
        headers: Headers,
        path: str,
        visit: Visit,
        session: Session | None,
    ) -> Response | None:
        if not self._ours(headers, visit):
            return _text(403, "This form is none of this console's pages.")
        if session is None and path != "/login":
            return RedirectResponse(f"{scope['root_path']}/login", 303)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/x-www-form-urlencoded":
            return _text(415, "Only forms are taken.")
        body = await _body(receive, headers)
        if body is None:
            return _text(413, "The form is too large.")
        form = _form(body)
        if form is None:
            return _text(400, "The form cannot be read.")
        jar: Mapping[str, str] = scope["state"]["cookies"]
        token = session.csrf if session is not None else jar.get(self._cookies.login, "")
        given = form.get("csrf", "")
        if not token or not hmac.compare_digest(_ascii(given), _ascii(token)):
            return _text(403, "This form is too old. Go back, load the page again, and repeat it.")
        scope["state"]["form"] = form
        return None

    def _ours(self, headers: Headers, visit: Visit) -> bool:
        """Whether a form comes from one of our pages; a browser says where it comes from."""
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site", "same-origin") == "same-origin"
        if origin.lower() == visit.origin:
            return True
        # A reverse proxy may say another name than the browser does.
        try:
            name = urlsplit(origin).hostname
        except ValueError:
            return False
        return name in self._settings.hosts


def _cookies(headers: Headers) -> dict[str, str]:
    """Each apart, for a browser sends those of other programs on this host, too, which may be none
    that the standard has; http.cookies gives up at these.  Of two, the first is the one whose path
    is nearer."""
    jar: dict[str, str] = {}
    for one in headers.get("cookie", "").split(";"):
        name, _, value = one.partition("=")
        jar.setdefault(name.strip(), value.strip())
    return jar


async def _body(receive: Receive, headers: Headers) -> bytes | None:
    """What is sent with a request; ``None`` if that is too much.  How long it takes is bounded
    before us."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 9 or int(length) > MOST_FORM:
        return None
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += bytes(message.get("body", b""))
        if len(body) > MOST_FORM:
            return None
        if not message.get("more_body"):
            return body


def _form(body: bytes) -> ImmutableMultiDict[str, str] | None:
    try:
        text = body.decode("ascii")
        return ImmutableMultiDict(
            parse_qsl(text, keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="replace")
        )
    except ValueError:
        return None


def _text(status: int, text: str) -> Response:
    return PlainTextResponse(f"{text}\n", status)


def _said(headers: Headers, name: str) -> str:
    """All that is said under a name, in order; a browser may have said some of it."""
    return ",".join(headers.getlist(name))


def _last(headers: Headers, name: str) -> str:
    """What the nearest proxy said, which came last."""
    return _said(headers, name).rpartition(",")[2].strip()


def _ascii(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
