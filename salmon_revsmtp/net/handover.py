"""A transport changes hands: the last reply on it, then another protocol (RFC 2645 5.2.2)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

from salmon_revsmtp.net.outcome import Failed
from salmon_revsmtp.smtp.replies import Reply, ReplyError, ReplyParser

__all__ = ["GLUED", "Handover", "StartTlsWatch"]

GLUED = (
    "more bytes came with the answer, before anyone may speak; either the server is broken, or "
    "someone on the way injects commands"
)


class Handover(asyncio.Protocol):
    """Waits for one reply on a transport, and hands the transport to the next protocol.

    Whatever comes after the reply before the hand-over is a protocol error, not a command
    (the reversal's form of CVE-2011-0411).
    """

    def __init__(self, transport: asyncio.Transport, doing: str) -> None:
        self.peer: tuple[str, int] = transport.get_extra_info("peername")[:2]
        self.tls = transport.get_extra_info("ssl_object") is not None
        self._reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._transport = transport
        self._doing = doing
        self._parser = ReplyParser()
        self._lost = False
        self._glued = False
        transport.set_protocol(self)

    async def ask(self, command: bytes) -> Reply:
        """Send a command line with its CRLF and wait for its reply."""
        if self._lost:
            raise Failed(f"{self._doing}: the server closed the connection")
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(command)
        return await self._reply

    def data_received(self, data: bytes) -> None:
        if self._reply.done():
            self._glued = True  # that it came is enough: no one wants it, however much it is
            return
        self._parser.receive_bytes(data)
        try:
            reply = self._parser.next_reply()
        except ReplyError as error:
            self._fail(f"{self._doing}: {error}")
        else:
            if reply:
                self._reply.set_result(reply)

    def eof_received(self) -> None:
        self._lost = True
        self._fail(f"{self._doing}: the server closed the connection")

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        reason = f": {exc}" if exc else ""
        self._fail(f"{self._doing}: the connection was lost{reason}")

    def _fail(self, message: str) -> None:
        if not self._reply.done():
            self._reply.set_exception(Failed(message))

    def hand_over(self, protocol: asyncio.Protocol) -> None:
        """Give the transport to ``protocol``, whose ``connection_made`` is called.

        Raises :class:`~salmon_revsmtp.net.outcome.Failed` if bytes came after the reply, or the
        connection is gone.
        """
        if self._glued or not self._parser.idle:
            raise Failed(f"{self._doing}: {GLUED}")
        if self._lost or self._transport.is_closing():
            raise Failed(f"{self._doing}: the server closed the connection after it")
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)


class StartTlsWatch(asyncio.Protocol):
    """Stands before aiosmtplib's protocol during STARTTLS and drops the connection when anything
    comes after the reply (RFC 3207 4.2, CVE-2011-0411).  TLS takes its place."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.glued = False
        self._transport = transport
        self._inner = cast(Any, transport.get_protocol())
        self._parser = ReplyParser()
        self._answered = False

    def data_received(self, data: bytes) -> None:
        self._parser.receive_bytes(data)
        if not self._answered:
            with contextlib.suppress(ReplyError):  # aiosmtplib has its own words for it
                self._answered = self._parser.next_reply() is not None
        if self._answered and not self._parser.idle:
            self.glued = True
            self._transport.abort()
            return
        self._inner.data_received(data)

    def step_aside(self) -> None:
        """There will be no TLS: aiosmtplib's protocol gets its place back."""
        self._transport.set_protocol(self._inner)

    def eof_received(self) -> bool | None:
        return cast("bool | None", self._inner.eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)
