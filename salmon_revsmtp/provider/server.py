"""The provider's listener, and one connection through both of its halves.

Before the reversal ``provider.session`` speaks, after it ``smtp.sender``; a connection moves bytes
between them and the transport, and files between them and the hold queue.

After the reversal several messages are under way where the customer lets us.  Answers are settled
in the hold queue as they come, those that came meanwhile together; what the customer has answered
is settled also when the connection breaks or is dropped, and what it has not is still held.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from types import TracebackType

from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.holdqueue import HoldQueue
from salmon_revsmtp.provider.session import AtrnRequest, Goodbye, Session, StartTls
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import Broken, Closed, Outgoing, Ready, Sender, Sent

__all__ = ["Provider"]

log = logging.getLogger(__name__)

# RFC 5321 4.5.3.2: the longest that either half has to wait.
IDLE_TIMEOUT = 600.0
# How long an ATRN waits for mail that another connection is sending: that one may have died without
# our hearing of it.  RFC 2645 5.2.1 lets a customer wait 10 minutes.
RELEASE_TIMEOUT = 60.0
# Octets handed to the transport at a time.
PIECE = 256 * 1024

# RFC 2645 5.2.1.
_NO_MAIL = Reply(453, "you have no mail", "4.2.0")
_BUSY = Reply(451, "another connection of yours is getting the mail, try again later", "4.3.2")


class Provider:
    """Listens for customers.  ``tls`` offers STARTTLS, or TLS from the start with
    ``implicit_tls``.  ``timeout`` in seconds without a byte from the customer."""

    def __init__(
        self,
        accounts: Accounts,
        queue: HoldQueue,
        hostname: str = "localhost",
        tls: ssl.SSLContext | None = None,
        implicit_tls: bool = False,
        timeout: float = IDLE_TIMEOUT,
    ) -> None:
        self.accounts, self.queue, self.hostname = accounts, queue, hostname
        self.tls, self.implicit_tls, self.timeout = tls, implicit_tls, timeout
        self.sending: set[str] = set()  # keys that a connection is sending now
        self._released = asyncio.Event()
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The TCP port that it listens on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def take(self, key: str) -> bool:
        """Whether a connection may send this message; no other may until :meth:`release`."""
        if key in self.sending:
            return False
        self.sending.add(key)
        return True

    def release(self, keys: Iterable[str]) -> None:
        """The connection that took these messages has done with them."""
        self.sending.difference_update(keys)
        self._released.set()

    async def waiting(self, domains: Collection[str]) -> list[str] | None:
        """The keys of what a customer may have now; empty if there is no mail, ``None`` if
        another connection is sending it all."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + RELEASE_TIMEOUT
        while True:
            self._released.clear()
            keys = await asyncio.to_thread(self.queue.waiting, domains)
            free = [key for key in keys if key not in self.sending]
            if free or not keys:
                return free
            try:
                await asyncio.wait_for(self._released.wait(), deadline - loop.time())
            except (asyncio.TimeoutError, TimeoutError):
                return None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 takes a free one."""
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self, self._connections),
            host,
            port,
            ssl=self.tls if self.implicit_tls else None,
        )

    async def stop(self) -> None:
        """Close the listener and every connection; what was not answered with 250 stays."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            await connection.abort()

    async def __aenter__(self) -> Provider:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()


class _Connection(asyncio.Protocol):
    def __init__(self, provider: Provider, everyone: set[_Connection]) -> None:
        self._provider, self._everyone = provider, everyone
        self._session = Session(
            provider.hostname,
            provider.accounts,
            tls_offered=provider.tls is not None,
            tls=provider.implicit_tls,
        )
        self._sender: Sender | None = None
        self._transport: asyncio.Transport | None = None
        self._work: set[asyncio.Task[None]] = set()
        self._outgoing: deque[memoryview] = deque()
        self._congested = False
        self._closing = False
        self._idle: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()  # there may be room, or an answer, or it is over
        self._failure: str | None = None
        self._answered: list[Sent] = []

    # -- asyncio calls these --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._everyone.add(self)
        self._wait()
        self._write([self._session.data_to_send()])

    def data_received(self, data: bytes) -> None:
        self._wait()
        if self._sender is None:
            self._handle(self._session.receive_bytes(data))
            self._write([self._session.data_to_send()])
        else:
            self._handle(self._sender.receive_bytes(data))
            self._write(self._sender.data_to_send())

    def connection_lost(self, exc: Exception | None) -> None:
        self._everyone.discard(self)
        if self._idle:
            self._idle.cancel()
        self._fail("the customer closed the connection")

    def pause_writing(self) -> None:
        self._congested = True

    def resume_writing(self) -> None:
        self._congested = False
        self._pump()

    # -- the two halves -------------------------------------------------------------------------

    def _handle(self, events: Iterable[object]) -> None:
        for event in events:
            if isinstance(event, StartTls):
                self._start(self._starttls())
            elif isinstance(event, AtrnRequest):
                self._start(self._atrn(event))
            elif isinstance(event, Goodbye | Closed):
                self._closing = True
            elif isinstance(event, Ready):
                self._news.set()
            elif isinstance(event, Sent):
                self._answered.append(event)
                self._news.set()
            elif isinstance(event, Broken):
                log.warning("reason=%r the session is broken", event.reason)
                self._fail(event.reason)
                self._closing = True

    def _start(self, work: object) -> None:
        assert asyncio.iscoroutine(work)
        task = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        task.add_done_callback(self._worked)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()):
            if not isinstance(error, ConnectionError | ssl.SSLError):
                log.error("connection failed", exc_info=error)
            if self._transport is not None:
                self._transport.abort()

    async def _starttls(self) -> None:
        assert self._transport is not None and self._provider.tls is not None
        if self._session.pending:
            raise ConnectionError("bytes behind STARTTLS")
        self._transport = await asyncio.get_running_loop().start_tls(
            self._transport, self, self._provider.tls, server_side=True
        )
        self._handle(self._session.tls_started())
        self._write([self._session.data_to_send()])

    async def _atrn(self, request: AtrnRequest) -> None:
        if self._idle:
            self._idle.cancel()  # the customer is silent because it waits for us
        assert self._transport is not None
        self._transport.pause_reading()  # and if it is not, nothing is kept of what it says
        keys = await self._provider.waiting(request.domains)
        if self._failure is None:
            self._transport.resume_reading()
        self._wait()
        if not keys:
            self._handle(self._session.answer(_NO_MAIL if keys is not None else _BUSY))
            self._write([self._session.data_to_send()])
            return
        log.info(
            "account=%s messages=%d the connection is reversed", request.account.name, len(keys)
        )
        self._sender = Sender(self._provider.hostname)
        self._session.answer(Reply(250, "now reversing the connection", "2.0.0"))
        self._write([self._session.data_to_send()])
        await self._send_all(keys, request)
        self._handle(self._sender.quit())
        self._write(self._sender.data_to_send())

    async def _send_all(self, keys: Iterable[str], request: AtrnRequest) -> None:
        """Send these messages, and settle each as the customer answered."""
        ours: set[str] = set()  # under way, or not settled yet
        try:
            for key in keys:
                await self._settle_until(lambda: self._may_send, request, ours)
                if self._provider.take(key):
                    ours.add(key)
                    if not await self._send(key, request):
                        self._release(ours, [key])
            await self._settle_until(lambda: not ours, request, ours)
        finally:
            try:
                await self._settle(request, ours)
            finally:
                self._release(ours, list(ours))

    @property
    def _may_send(self) -> bool:
        return self._failure is None and self._sender is not None and self._sender.room

    async def _send(self, key: str, request: AtrnRequest) -> bool:
        """Read a message and send it; ``False`` if it is gone."""
        loaded = await asyncio.to_thread(self._provider.queue.load, key, request.domains)
        if loaded is None or not loaded[0].recipients:
            return False
        assert self._sender is not None
        self._handle(self._sender.send(Outgoing(key, *loaded)))
        self._write(self._sender.data_to_send())
        return True

    async def _settle_until(
        self, done: Callable[[], bool], request: AtrnRequest, ours: set[str]
    ) -> None:
        """Settle what is answered until something is so.  Raises :class:`ConnectionError` when it
        never will be."""
        while not done():
            if self._answered:
                await self._settle(request, ours)
            elif self._failure is not None:
                raise ConnectionError(self._failure)
            else:
                self._news.clear()
                await self._news.wait()

    async def _settle(self, request: AtrnRequest, ours: set[str]) -> None:
        """Settle all that has been answered."""
        answered, self._answered = self._answered, []
        if not answered:
            return
        answers = []
        for sent in answered:
            log.info(
                "account=%s key=%s replies=%r",
                request.account.name,
                sent.message.key,
                [str(reply) for reply in sent.replies],
            )
            replies = dict(zip(sent.message.envelope.recipients, sent.replies, strict=True))
            answers.append((str(sent.message.key), replies))
        await asyncio.to_thread(self._provider.queue.settle_all, answers)
        self._release(ours, [key for key, _ in answers])

    def _release(self, ours: set[str], keys: Sequence[str]) -> None:
        ours.difference_update(keys)
        self._provider.release(keys)

    # -- the transport --------------------------------------------------------------------------

    def _write(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            view = memoryview(piece)
            self._outgoing.extend(
                view[start : start + PIECE] for start in range(0, len(view), PIECE)
            )
        self._pump()

    def _pump(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        while self._outgoing and not self._congested:
            transport.write(self._outgoing.popleft())
        if self._closing and not self._outgoing:
            transport.close()

    def _wait(self) -> None:
        if self._idle:
            self._idle.cancel()
        if self._transport is None or self._transport.is_closing():
            return
        loop = asyncio.get_running_loop()
        self._idle = loop.call_later(self._provider.timeout, self._idled)

    def _idled(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason
        self._news.set()

    async def abort(self) -> None:
        """Drop the connection and end its work."""
        for task in list(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        if self._transport is not None:
            self._transport.abort()
