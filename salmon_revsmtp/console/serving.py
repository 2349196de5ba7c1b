"""The console's thread: it listens, and serves the application, as long as the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from typing import TYPE_CHECKING

from salmon_revsmtp import Trouble
from salmon_revsmtp.console.accepting import Bounds, Listening
from salmon_revsmtp.console.events import Hub, Lines
from salmon_revsmtp.console.links import Running

if TYPE_CHECKING:
    from salmon_revsmtp import Server
    from salmon_revsmtp.console.settings import ConsoleSettings

__all__ = ["Console"]

# The trouble of a console that cannot listen.
TROUBLE = "console:listen"
# Seconds until an address that is taken is tried again.
AGAIN = 30.0
# Seconds that a stop waits for the thread.
PATIENCE = 2.0
# Of whom its lines are shown.
LOGGER = "salmon_revsmtp"

# What this process listens on.  A child that a handler forks would keep the address after our end,
# and whoever comes would wait for an answer.
_listening_on: set[socket.socket] = set()


def _in_a_child() -> None:
    for one in list(_listening_on):
        with contextlib.suppress(OSError):
            one.close()
    _listening_on.clear()


os.register_at_fork(after_in_child=_in_a_child)

log = logging.getLogger(__name__)


class Console:
    """One console of a server."""

    def __init__(self, server: Server, settings: ConsoleSettings, again: float = AGAIN) -> None:
        self._server, self._settings, self._again = server, settings, again
        self._lines = Lines()
        self._thread = threading.Thread(target=self._live, name="console", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: asyncio.Event | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        """Keep the log's lines from now on, and serve as soon as it can."""
        logging.getLogger(LOGGER).addHandler(self._lines)
        self._thread.start()

    def stop(self) -> None:
        """End, also with browsers that listen; waits for it."""
        self._stopped.set()
        if self._loop is not None and self._over is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(PATIENCE)
        logging.getLogger(LOGGER).removeHandler(self._lines)

    def _live(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception:
            log.exception("console: it has ended, and serves no one any more")

    async def _run(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        if self._stopped.is_set():
            return
        failed = False
        while not self._over.is_set():
            try:
                sockets = _listening(*self._settings.address, Bounds(self._settings.networks))
            except OSError as error:
                self._cannot_listen(error, failed)
                failed = True
                with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                    await asyncio.wait_for(self._over.wait(), self._again)
                continue
            if failed:
                self._server.over(TROUBLE)
            await self._serve(sockets, self._over)

    def _cannot_listen(self, error: OSError, before: bool) -> None:
        text = (
            f"The console cannot listen on {self._settings.address}: "
            f"{error.strerror or error}. Mail goes on. Is there another console? Set 'listen' in "
            "'console' to another port."
        )
        if not before:
            log.warning("console: %s", text)
        self._server.report(Trouble(TROUBLE, text))

    async def _serve(self, sockets: list[socket.socket], over: asyncio.Event) -> None:
        # These take their time and some memory.
        from salmon_revsmtp.console.app import Door, make_app
        from salmon_revsmtp.console.http import HttpServer

        hub, door = Hub(self._server, self._lines), Door(self._settings)
        self._server.register(hub)
        app = make_app(self._server, door, hub)
        server = HttpServer(app, self._settings, over, hub.close)
        running = Running(self._url(sockets), sockets[0].getsockname()[:2], door.links.secret)
        try:
            running.write(self._server.project)
        except OSError as error:
            log.warning("console: no link can be made: %s", error)
        log.info("console: listening on %s", running.url)
        _listening_on.update(sockets)
        try:
            await server.serve(sockets)
        finally:
            _listening_on.difference_update(sockets)
            Running.remove(self._server.project)

    def _url(self, sockets: list[socket.socket]) -> str:
        """Where a browser on this machine finds it; or elsewhere, where that was said."""
        settings, port = self._settings, sockets[0].getsockname()[1]
        secure = settings.tls_cert is not None
        host = settings.address.host
        if settings.address.anywhere:
            host = "localhost"
        if settings.hosts and (secure or settings.proxies):
            host = settings.hosts[0]
            if settings.proxies and not secure:  # the proxy does TLS, on its own port
                return f"https://{host}{settings.base_path}"
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if secure else 'http'}://{shown}:{port}{settings.base_path}"


def _listening(host: str, port: int, bounds: Bounds) -> list[socket.socket]:
    """Sockets that listen on all addresses of a host.  Raises :class:`OSError`."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            one = Listening(family, kind, protocol)
            one.bounds = bounds
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setblocking(False)
            one.bind(address)
            one.listen(100)
    except OSError:
        for each in sockets:
            each.close()
        raise
    return sockets
