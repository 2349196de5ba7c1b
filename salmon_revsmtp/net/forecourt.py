"""Where a connection from a load balancer is until it has said for whom it stands.

Its PROXY header comes before the greeting, and before TLS where the connection begins with that.
From then on the connection has the client's address: whatever looks at one sees that (access
control, places, failed logins, the log, ``Received:``, hooks).  Whoever is no balancer of ours goes
through at once, and what it says is SMTP.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Container

from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.net.proxyheader import ProxyHeaderError, read_header
from salmon_revsmtp.net.vestibule import Vestibule
from salmon_revsmtp.safelog import LogBudget

__all__ = ["Forecourt", "Forecourts"]

log = logging.getLogger(__name__)

# Seconds in which the header has to be there.  A balancer sends it at once, and the specification
# wants three at least, so that a packet may be lost.
HEADER = 10.0
# Connections that wait for theirs at a time.  They have no place yet, for no one knows whose it
# would be; this is for descriptors.
WAITING = 1000


class Forecourts:
    """Those of one listener.

    ``name``      for the log.
    ``balancers`` the addresses whose connections begin with a header, and have to.
    """

    def __init__(self, name: str, balancers: Container[str]) -> None:
        self.name, self.balancers = name, balancers
        self.waiting: set[Forecourt] = set()
        self.lines = LogBudget()

    def close(self) -> None:
        """Drop all that wait."""
        for one in list(self.waiting):
            one.drop()


class Forecourt(asyncio.Protocol):
    """One connection whose client is not known yet.

    ``among``  those of its listener.
    ``enter``  makes the protocol that it goes on with.
    """

    def __init__(self, among: Forecourts, enter: Callable[[], Driver | Vestibule]) -> None:
        self._all, self._enter = among, enter
        self._transport: asyncio.Transport | None = None
        self._balancer = ("", 0)
        self._came = b""
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._balancer = (transport.get_extra_info("peername") or ("", 0))[:2]
        if self._balancer[0] not in self._all.balancers:
            self._go_on(self._balancer, b"")
            return
        self._all.waiting.add(self)
        loop = asyncio.get_running_loop()
        self._clock = loop.call_later(HEADER, self._too_slow)
        if len(self._all.waiting) > WAITING:
            self._refuse(f"more than {WAITING} connections wait for a PROXY header")

    def data_received(self, data: bytes) -> None:
        if self._clock is None:  # it was dropped
            return
        self._came += data
        try:
            header = read_header(self._came)
        except ProxyHeaderError as error:
            self._refuse(str(error))
            return
        if header is not None:
            self._leave()
            self._go_on(header.client or self._balancer, self._came[header.octets :])

    def connection_lost(self, exc: Exception | None) -> None:
        if self._clock is None:
            return
        # A balancer that only wants to see whether someone listens says nothing.
        level = logging.WARNING if self._came else logging.DEBUG
        self._say(level, "it ended before its PROXY header was whole")
        self._leave()

    def _go_on(self, client: tuple[str, int], early: bytes) -> None:
        """``early``: what came after the header, which is the client's."""
        assert self._transport is not None
        try:
            entered = self._enter()
            entered.peer = client
            self._transport.set_protocol(entered)
            entered.connection_made(self._transport)
            if early:
                entered.data_received(early)
        except BaseException:  # no certificate, say; the event loop tells of it
            self._transport.abort()
            raise

    def _too_slow(self) -> None:
        self._refuse(f"no PROXY header came in {HEADER:g} seconds")

    def _refuse(self, why: str) -> None:
        self._say(logging.WARNING, why)
        self.drop()

    def _say(self, level: int, why: str) -> None:
        self._all.lines.log(
            log, level, "%s peer=%s proxy_from: %s", self._all.name, self._balancer[0], why
        )

    def drop(self) -> None:
        """End the connection with a reset."""
        self._leave()
        assert self._transport is not None
        if (connection := self._transport.get_extra_info("socket")) is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _leave(self) -> None:
        self._all.waiting.discard(self)
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
