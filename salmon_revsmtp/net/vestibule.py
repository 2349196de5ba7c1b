"""Where a connection is while it does the TLS handshake that it begins with (RFC 8314).

asyncio would do the handshake before anyone hears of the connection, for a minute, and for as many
as come.  Here each has a place from its first moment, which it gives to the driver that follows.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable

from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.net.tls import TlsTransport
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Vestibule"]

log = logging.getLogger(__name__)


class Vestibule(asyncio.Protocol):
    """One connection without a protocol yet.

    ``enter``    makes the protocol that it has when the handshake is done, and that begins to read.
    ``arrived``  told that it is here; ``False`` turns it away.
    ``left``     told that it is not here any more.

    For :class:`~salmon_revsmtp.net.places.Places` it is an idle client.
    """

    at_boundary = True

    def __init__(
        self,
        tls: ssl.SSLContext,
        enter: Callable[[], Driver],
        arrived: Callable[[Vestibule], bool],
        left: Callable[[Vestibule], None],
    ) -> None:
        self.peer: tuple[str, int] = ("", 0)
        self.waits_since: float | None = None
        self._tls, self._enter = tls, enter
        self._arrived, self._left = arrived, left
        self._transport: asyncio.Transport | None = None
        self._encrypted: TlsTransport | None = None
        self._handshake: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        loop = asyncio.get_running_loop()
        self._transport = transport
        if not self.peer[0]:  # a load balancer may have said who it is
            self.peer = (transport.get_extra_info("peername") or ("", 0))[:2]
        self.waits_since = loop.time()
        if not self._arrived(self):
            transport.abort()  # there is no TLS in which to say 421
            return
        self._encrypted = encrypted = TlsTransport(transport, self._tls)
        self._handshake = loop.create_task(self._shake_hands(encrypted))
        self._handshake.add_done_callback(self._shaken)

    def data_received(self, data: bytes) -> None:
        """What came before this protocol did; all that comes later TLS itself reads."""
        if self._encrypted is not None:
            self._encrypted.begin_with(data)

    async def _shake_hands(self, encrypted: TlsTransport) -> None:
        await encrypted.shake_hands()
        self._left(self)
        protocol = self._enter()
        protocol.peer = self.peer
        encrypted.set_protocol(protocol)
        protocol.connection_made(encrypted)

    def _shaken(self, task: asyncio.Task[None]) -> None:
        self._handshake = None
        self._left(self)
        if not task.cancelled() and (error := task.exception()):
            if isinstance(error, OSError):  # their doing; ssl.SSLError is one, too
                log.debug("peer=%s the TLS handshake failed", self.peer)
            else:
                log_safely(log, logging.ERROR, "a connection cannot begin: %s", error)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._left(self)

    def slower_than(self, rate: int, after: float) -> bool:
        """Nothing is under way."""
        return False

    def send_away(self, reply: Reply) -> None:
        """It gives way; nothing can be said to it."""
        self.abort()

    def abort(self) -> None:
        """Drop the connection."""
        if self._handshake is not None:
            self._handshake.cancel()
        if self._transport is not None:
            self._transport.abort()
