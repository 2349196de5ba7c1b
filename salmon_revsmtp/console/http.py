"""HTTP, by uvicorn, for few browsers that may be slow, and strangers who mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from salmon_revsmtp.console.accepting import CONNECTIONS
from salmon_revsmtp.console.settings import ConsoleSettings

__all__ = ["HttpServer"]

# Seconds until a request has to be there whole, from the connection or its first octet.
REQUEST_TIMEOUT = 15.0
# Seconds that a connection may be kept without a request.
KEEP_ALIVE = 20
# Octets of a request's header.
MOST_HEADER = 32 * 1024
# Seconds that a stop waits for answers under way.
GRACE = 0.4
# Seconds between two looks whether the certificate has changed.
CERTIFICATE_EVERY = 60.0

log = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """Serves ``app`` until ``over``, and calls ``ending`` then."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ConsoleSettings,
        over: asyncio.Event,
        ending: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=MOST_HEADER,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
        super().__init__(config)
        self._settings, self._over, self._ending = settings, over, ending

    async def main_loop(self) -> None:
        """Wait; uvicorn's own looks ten times a second."""
        await self.on_tick(0)
        watching = asyncio.ensure_future(self._watch_certificate())
        try:
            await self._over.wait()
        finally:
            watching.cancel()
            self._ending()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but who has not gone soon is not waited for."""
        ending = asyncio.ensure_future(super().shutdown(sockets))
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(asyncio.shield(ending), GRACE)
        for connection in list(self.server_state.connections):
            if (transport := getattr(connection, "transport", None)) is not None:
                transport.abort()
        self.force_exit = True
        await asyncio.wait([ending], timeout=GRACE)

    async def _watch_certificate(self) -> None:
        context = self.config.ssl
        if context is None or self._settings.tls_cert is None:
            return
        paths = [one for one in (self._settings.tls_cert, self._settings.tls_key) if one]
        seen = _stamps(paths)
        while True:
            await asyncio.sleep(CERTIFICATE_EVERY)
            if (now := _stamps(paths)) != seen:
                try:
                    context.load_cert_chain(paths[0], paths[-1] if len(paths) > 1 else None)
                    seen = now
                    log.info("console: it has a new certificate")
                except (OSError, ssl.SSLError) as error:
                    log.warning("console: the new certificate cannot be used: %s", error)


def _stamps(paths: list[Path]) -> list[tuple[int, int, int]]:
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            one = path.stat()
            found.append((one.st_mtime_ns, one.st_ino, one.st_size))
    return found


class _Protocol(H11Protocol):
    """A connection that may not be slow."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begin_request()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._begin_request()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.more_body:
            self._end_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_request()
        super().connection_lost(exc)

    def _begin_request(self) -> None:
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT, self._too_slow)

    def _end_request(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if self.transport is not None:
            self.transport.abort()
