"""The provider's listener, and one connection through both of its halves.

Before the reversal ``smtp.turn`` speaks, after it ``smtp.sender``; a connection moves messages
between them and the hold queue.  What every connection needs is in ``net.driver``.

After the reversal several messages are under way where the customer lets us.  Answers are settled
in the hold queue as they come, those that came meanwhile together; what the customer has answered
is settled also when the connection breaks or is dropped, and what it has not is still held.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any

from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.net.listener import Admit, Listener
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.holdqueue import HoldQueue
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import Broken, Outgoing, Ready, Sender, Sent
from salmon_revsmtp.smtp.turn import AtrnRequest, StartTls, Turn

__all__ = ["Provider"]

log = logging.getLogger(__name__)

# RFC 5321 4.5.3.2: the longest that either half has to wait.
IDLE_TIMEOUT = 600.0
# How long an ATRN waits for mail that another connection is sending: that one may have died without
# our hearing of it.  RFC 2645 5.2.1 lets a customer wait 10 minutes.
RELEASE_TIMEOUT = 60.0
# Customers at a time.
MAX_CONNECTIONS = 10_000
# Seconds that a stop waits for answers that were heard to be settled.
GRACE = 10.0

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
        self._listener: Listener | None = None

    @property
    def port(self) -> int:
        """The TCP port that it listens on."""
        assert self._listener is not None
        return self._listener.port

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
        self._listener = Listener(
            "provider",
            lambda admit: Connection(self, admit),
            host,
            port,
            tls=self.tls if self.implicit_tls else None,
            max_connections=MAX_CONNECTIONS,
            max_per_address=MAX_CONNECTIONS,
        )
        await self._listener.start()

    async def stop(self) -> None:
        """Close the listener and every connection; what was not answered with 250 stays."""
        if self._listener is not None:
            await self._listener.stop(GRACE)

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


class Connection(Driver):
    """A customer's connection."""

    WE, THEY = "provider", "customer"

    def __init__(self, provider: Provider, admit: Admit) -> None:
        self._turn = Turn(
            provider.hostname,
            provider.accounts,
            starttls=provider.tls is not None,
            tls=provider.implicit_tls,
        )
        super().__init__(self._turn, provider.timeout)
        self._provider, self._admit = provider, admit
        self._sender: Sender | None = None
        self._work: set[asyncio.Task[None]] = set()
        self._asking = False  # for mail; the customer waits
        self._news = asyncio.Event()  # there may be room, or an answer, or it is over
        self._answered: list[Sent] = []

    @property
    def busy(self) -> bool:
        return self._asking

    @property
    def unfinished(self) -> bool:
        return bool(self._work)

    def connected(self) -> None:
        if refusal := self._admit(self):
            self._turn.refuse_session(refusal)

    def encrypted(self) -> None:
        self._turn.tls_started()

    def disconnected(self) -> None:
        self._news.set()

    def end_soon(self) -> None:
        """What was answered is settled; what was not is still held."""
        for task in self._work:
            task.cancel()
        self.abort("the provider is shutting down")

    # -- events ---------------------------------------------------------------------------------

    def handle(self, event: object) -> None:
        if isinstance(event, StartTls):
            assert self._provider.tls is not None
            self.start_tls(self._provider.tls)
        elif isinstance(event, AtrnRequest):
            self._asking = True
            self._start(self._atrn(event))
        elif isinstance(event, Ready):
            self._news.set()
        elif isinstance(event, Sent):
            self._answered.append(event)
            self._news.set()
        elif isinstance(event, Broken):
            log.warning("reason=%r the session is broken", event.reason)
            self.broken = self.broken or event.reason
            self._news.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        task.add_done_callback(self._worked)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()):
            if not isinstance(error, ConnectionError):
                log.error("connection failed", exc_info=error)
            self.abort(f"handing over: {error}")
        self.finish()

    # -- the hand-over --------------------------------------------------------------------------

    async def _atrn(self, request: AtrnRequest) -> None:
        try:
            keys = await self._provider.waiting(request.domains)
        finally:
            self._asking = False
        if not keys:
            self._turn.answer(_NO_MAIL if keys is not None else _BUSY)
            self.advance()
            return
        log.info("account=%s messages=%d the connection is reversed", request.account, len(keys))
        self._sender = Sender(self._provider.hostname)
        self._turn.answer(Reply(250, "now reversing the connection", "2.0.0"))
        self.change_roles(self._sender)
        await self._send_all(keys, request)
        self.happened(self._sender.quit())

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
        return self.broken is None and self._sender is not None and self._sender.room

    async def _send(self, key: str, request: AtrnRequest) -> bool:
        """Read a message and send it; ``False`` if it is gone."""
        loaded = await asyncio.to_thread(self._provider.queue.load, key, request.domains)
        if loaded is None or not loaded[0].recipients:
            return False
        assert self._sender is not None
        self.happened(self._sender.send(Outgoing(key, *loaded)))
        return True

    async def _settle_until(
        self, done: Callable[[], bool], request: AtrnRequest, ours: set[str]
    ) -> None:
        """Settle what is answered until something is so.  Raises :class:`ConnectionError` when it
        never will be."""
        while not done():
            if self._answered:
                await self._settle(request, ours)
            elif self.broken is not None:
                raise ConnectionError(self.broken)
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
                request.account,
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
