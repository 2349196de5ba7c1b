"""One message, all its recipients: what is added, what is refused, and how the replies add up.

Every recipient is delivered on its own, and has a reply of its own.  A client that asked for PRDR
hears each; for the others they are put together so that nobody is served twice and nobody is
forgotten (RFC 5321 4.1.1.4 knows one reply only):

- all succeeded: 250;
- a temporary failure among them: that one.  The journal remembers who has been served, so that
  the client's retry serves only the rest;
- permanent failures beside successes: 250, after a delivery status notification for the failed
  ones (RFC 3464) is safe on disk, on its way to the sender;
- only permanent failures: the first of them.

The order for each recipient is: handled, recorded, told to the plugins, answered.  Between the
first two a crash makes a repeat when the client sends the message again, and loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Protocol

from salmon_revsmtp.delivery.batches import BatchWorker
from salmon_revsmtp.delivery.dsn import Notifier
from salmon_revsmtp.delivery.trace import MAX_HOPS, Hop, hops
from salmon_revsmtp.hooks import HookCaller
from salmon_revsmtp.journal.deliveries import DeliveryJournal, DeliveryRecord, MessageKey
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Answer", "Delivery", "Dispatcher", "Errand", "Waiting"]

log = logging.getLogger(__name__)

# Seconds between two looks of the event loop at what has been delivered and not been answered.
LOOK_EVERY = 0.05

BUG = Reply(451, "internal error, try again later", "4.3.0")
LOOP = Reply(554, f"{MAX_HOPS} hops, this message runs in a circle", "5.4.6")


#: A message without its trace, in the form in which Salmon's own receivers give it to handlers: LF
#: line ends, the last line without one.  A view, as a rule, so that a large one is not copied.
Content = bytes | memoryview


class Named(Protocol):
    """An agent, as far as it matters here; hooks get the whole of it."""

    @property
    def name(self) -> str:
        """Its name in the settings."""


@dataclass(frozen=True)
class Answer:
    """What a delivery says of one message.

    ``reply``      for the whole message.
    ``each``       one reply per recipient, in the envelope's order.
    ``delivered``  how many recipients have it now who had it not before.
    ``digest``     the SHA-256 of the message's octets.
    """

    reply: Reply
    each: tuple[Reply, ...]
    delivered: int
    digest: bytes


class Delivery(Protocol):
    """How one message for one recipient is handed to Salmon."""

    def deliver(
        self,
        peer: tuple[str, int],
        envelope: Envelope,
        recipient: str,
        trace: bytes,
        content: Content,
    ) -> Reply:
        """Make ``trace`` and ``content``, the message, safe, then return 2yz; else the reply that
        says why not."""


class Line(NamedTuple):
    """What the log says of one recipient; a repeat: what came of it was known."""

    recipient: str
    reply: Reply
    repeat: bool


@dataclass
class Errand:
    """A message to be delivered, and how far that is.

    ``agent``  for hooks and the log; ``None``: it came to a listening service.
    ``peer``   the client's address and port.
    ``hop``    for the ``Received:`` line.
    ``key``    once its turn has come.
    ``lines``  what the log is still to say.
    """

    agent: Named | None
    peer: tuple[str, int]
    hop: Hop
    envelope: Envelope
    data: bytes
    replies: list[Reply] = field(default_factory=list)
    delivered: int = 0
    key: MessageKey | None = None
    begun: bool = False
    abandoned: bool = False
    outcome: Answer | RuntimeError | None = None
    lines: list[Line] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> bool:
        """Whether anybody still waits for it."""
        with self.lock:
            self.begun = not self.abandoned
            return self.begun

    def add(self, line: Line) -> None:
        """Note the reply for the next recipient, for the log, and for whoever still waits for
        it."""
        with self.lock:
            self.lines.append(line)
            if not self.abandoned:
                self.replies.append(line.reply)
                self.delivered += line.reply.positive and not line.repeat

    def take_lines(self) -> list[Line]:
        """What the log is to say; whoever takes it has to."""
        with self.lock:
            lines, self.lines = self.lines, []
            return lines

    def abandon(self, reply: Reply) -> Answer:
        """Wait no longer: the answer is ``reply`` for whoever has not been served so far."""
        with self.lock:
            self.abandoned = True
            left = len(self.envelope.recipients) - len(self.replies)
            each = (*self.replies, *([reply] * left))
        return self.answer(_for_all(self.envelope, each) or reply, each)

    def answer(self, reply: Reply, each: Sequence[Reply]) -> Answer:
        """What the client hears."""
        digest = self.key.digest if self.key else b""
        return Answer(reply, tuple(each), self.delivered, digest)


@dataclass
class Waiting:
    """An errand, who waits for it in which event loop, and until when on that loop's clock.

    ``overdue``: there was something to log or to tell when the event loop looked.
    """

    errand: Errand
    answered: Callable[[Answer | RuntimeError], None]
    loop: asyncio.AbstractEventLoop
    until: float
    overdue: bool = False
    done: bool = False

    def come_home(self) -> None:
        """Tell them what has come of it, if anything has and they have not heard yet."""
        if not self.done and self.errand.outcome is not None:
            self.tell(self.errand.outcome)

    def tell(self, outcome: Answer | RuntimeError) -> None:
        """This is what they hear, once."""
        self.done = True
        self.answered(outcome)


def _come_home(pieces: Sequence[Waiting]) -> None:
    for piece in pieces:
        piece.come_home()


def _for_all(envelope: Envelope, each: Sequence[Reply]) -> Reply | None:
    """The reply that a client hears behind those of the recipients, if it hears those."""
    if not envelope.prdr:
        return None
    taken = sum(reply.positive for reply in each)
    if not taken:
        return None
    return Reply(250, f"taken for {taken} of {len(each)} recipients", "2.0.0")


class Dispatcher:
    """Delivers the messages of one service, one after another, in the thread of ``worker``.

    ``service``          its name.
    ``handler_timeout``  seconds from a message's end to its answer.
    ``repeat_seconds``   how long a message that comes again is known.
    """

    def __init__(
        self,
        service: str,
        delivery: Delivery,
        journal: DeliveryJournal,
        plugins: HookCaller,
        notifier: Notifier,
        worker: BatchWorker[Waiting],
        *,
        handler_timeout: float,
        repeat_seconds: float,
    ) -> None:
        self._service = service
        self._handler_timeout, self._repeat_seconds = handler_timeout, repeat_seconds
        self._delivery = delivery
        self._journal = journal
        self._plugins = plugins
        self._notifier = notifier
        self._worker = worker
        self._pending: list[Waiting] = []
        self._looks_in: asyncio.AbstractEventLoop | None = None
        self._known: dict[MessageKey, dict[str, DeliveryRecord]] = {}
        self._log_from = 0.0

    def deliver(self, errand: Errand, answered: Callable[[Answer | RuntimeError], None]) -> None:
        """Deliver a message to every recipient, and call ``answered`` in the event loop when all of
        them are safe or refused; with :class:`RuntimeError` if there is no thread any more.

        Past the service's ``handler_timeout`` the answer is 451 for those that are not.  A message
        whose turn has not come by then is not handled at all; a handler that is running goes on,
        and what comes of it is recorded for the client's retry, which waits behind it.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._handler_timeout
        waiting = Waiting(errand, answered, loop, until)
        try:
            self._worker.submit(self, waiting)
        except RuntimeError as error:  # the thread is closed
            errand.outcome = error
        self._pending.append(waiting)
        self._look_soon(loop)

    async def delivered(self, errand: Errand) -> Answer:
        """The same, to be awaited."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def answered(outcome: Answer | RuntimeError) -> None:
            if future.done():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self.deliver(errand, answered)
        return await future

    def _look(self) -> None:
        """Do not let those who wait depend on the batch's end: a handler may be slow, or never
        return."""
        loop = asyncio.get_running_loop()
        self._looks_in = None
        try:
            for waiting in self._pending:
                late = waiting.until <= loop.time()
                if waiting.overdue or late:
                    waiting.come_home()
                    if late and not waiting.done:
                        waiting.tell(self._put_off(waiting.errand))
                    # Before the answer leaves, which it does in the loop's next turn.
                    self._log(waiting.errand)
                waiting.overdue = bool(waiting.errand.lines or waiting.errand.outcome)
        finally:
            self._pending = [one for one in self._pending if not one.done and one.loop is loop]
            if self._pending:
                self._look_soon(loop)

    def _look_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._looks_in is not loop:
            self._looks_in = loop
            loop.call_later(LOOK_EVERY, self._look)

    def _put_off(self, errand: Errand) -> Answer:
        timeout = self._handler_timeout
        late = Reply(451, f"not done in {timeout:g} seconds, try again later", "4.3.0")
        answer = errand.abandon(late)
        log_safely(
            log,
            logging.WARNING,
            "%s from=<%s> reply=%r %s",
            self._via(errand),
            errand.envelope.reverse_path,
            str(late),
            "its handler goes on" if errand.begun else "its turn did not come",
        )
        return answer

    # -- in the thread ----------------------------------------------------------------------------

    def begin(self, pieces: Sequence[Waiting]) -> None:
        """A batch: see which of them have come before."""
        self._log_from = time.monotonic() + LOOK_EVERY
        name = self._service
        keys = []
        for errand in (one.errand for one in pieces):
            if errand.key is None:
                errand.key = MessageKey.of(name, errand.envelope.reverse_path, errand.data)
            keys.append(errand.key)
        self._known = self._journal.known_all(keys, self._repeat_seconds)

    def do(self, piece: Waiting) -> None:
        """Deliver one message, if anybody still waits for it."""
        errand = piece.errand
        if not errand.begin():
            return
        try:
            errand.outcome = self._deliver(errand)
        except BaseException:  # a hook may even try to end the process
            errand.outcome = errand.abandon(BUG)
            log_safely(log, logging.ERROR, "%s a delivery failed", self._via(errand), error=True)

    def end(self, pieces: Sequence[Waiting]) -> None:
        """Log those of a batch, and answer them.

        All at once: a line among deliveries costs more than twice as much.  In a batch that takes
        long they are logged as they come, or the event loop would have to.
        """
        errands = [piece.errand for piece in pieces]
        # Taken first: what a slow log holds up is answered, and not logged, by the event loop.
        for errand, lines in [(errand, errand.take_lines()) for errand in errands]:
            self._write_lines(errand, lines)
        for loop, those in groupby(pieces, key=lambda one: one.loop):
            with contextlib.suppress(RuntimeError):  # nobody waits on a loop that is closed
                loop.call_soon_threadsafe(_come_home, list(those))

    def _deliver(self, errand: Errand) -> Answer | None:
        """``None``: the errand was abandoned, and nobody waits for an answer."""
        envelope, key = errand.envelope, errand.key
        assert key is not None
        lines = errand.data.replace(b"\r\n", b"\n")
        if hops(lines) >= MAX_HOPS:
            for recipient in envelope.recipients:
                errand.add(Line(recipient, LOOP, repeat=False))
            return errand.abandon(LOOP)
        content = memoryview(lines)[: len(lines) - lines.endswith(b"\n")]
        known = self._known[key]
        put_off: dict[str, DeliveryRecord] = {}
        for recipient in envelope.recipients:
            if errand.abandoned:
                return None
            if served := known.get(recipient) or put_off.get(recipient):
                errand.add(Line(recipient, served.reply, repeat=True))
                continue
            served = self._hand_over(errand, key, recipient, content)
            errand.add(Line(recipient, served.reply, repeat=False))
            (put_off if served.reply.transient else known)[recipient] = served
            self._tell_plugins(errand, recipient, served.reply)
            if time.monotonic() >= self._log_from:
                self._log(errand)
        if errand.abandoned:
            return None
        return errand.answer(self._put_together(errand, key, known, lines), errand.replies)

    def _hand_over(
        self, errand: Errand, key: MessageKey, recipient: str, content: Content
    ) -> DeliveryRecord:
        envelope = errand.envelope
        trace = errand.hop.received(envelope, recipient)
        reply = self._asked(errand.agent, envelope, trace, content)
        if reply is None:
            reply = self._delivery.deliver(errand.peer, envelope, recipient, trace, content)
        window = self._repeat_seconds
        return self._journal.record(key, recipient, reply, window)

    def _tell_plugins(self, errand: Errand, recipient: str, reply: Reply) -> None:
        if self._plugins.implemented("message_delivered"):
            self._plugins.call(
                "message_delivered",
                agent=errand.agent,
                envelope=errand.envelope,
                recipient=recipient,
                reply=reply,
            )

    def _log(self, errand: Errand) -> None:
        self._write_lines(errand, errand.take_lines())

    def _write_lines(self, errand: Errand, lines: Iterable[Line]) -> None:
        for recipient, reply, repeat in lines:
            log_safely(
                log,
                logging.INFO if reply.positive else logging.WARNING,
                "%s from=<%s> to=<%s> bytes=%d reply=%r%s",
                self._via(errand),
                errand.envelope.reverse_path,
                recipient,
                len(errand.data),
                str(reply),
                " repeat" if repeat else "",
            )

    def _via(self, errand: Errand) -> str:
        return f"agent={errand.agent.name}" if errand.agent else f"service={self._service}"

    def _asked(
        self, agent: Named | None, envelope: Envelope, trace: bytes, content: Content
    ) -> Reply | None:
        """Whether a plugin refuses the message."""
        if not self._plugins.implemented("message_received"):
            return None
        said = self._plugins.call(
            "message_received", agent=agent, envelope=envelope, message=b"".join((trace, content))
        )
        if said is None or (isinstance(said, Reply) and (said.transient or said.permanent)):
            return said
        log.error("hook=message_received returned %r, which refuses nothing; ignored", said)
        return None

    def _put_together(
        self, errand: Errand, key: MessageKey, known: dict[str, DeliveryRecord], content: bytes
    ) -> Reply:
        replies: Sequence[Reply] = errand.replies
        if total := _for_all(errand.envelope, replies):
            return total
        if len(replies) == 1:
            return replies[0]
        positive = [reply for reply in replies if reply.positive]
        transient = [reply for reply in replies if reply.transient]
        permanent = [reply for reply in replies if reply.permanent]
        if transient:
            return transient[0]
        if not positive:
            return permanent[0]
        if permanent:
            return self._notify(errand.envelope, key, known, content) or positive[0]
        return positive[0]

    def _notify(
        self, envelope: Envelope, key: MessageKey, known: dict[str, DeliveryRecord], content: bytes
    ) -> Reply | None:
        """Have the sender told of the failures that it has not been told of; ``None`` when that is
        safe, else the 4yz for the message."""
        failed = {
            recipient: served
            for recipient, served in known.items()
            if served.reply.permanent and not served.notified and recipient in envelope.recipients
        }
        if not failed:
            return None
        replies = {recipient: served.reply for recipient, served in failed.items()}
        refusal = self._notifier.notify(envelope, replies, content)
        if refusal is None:
            known.update(self._journal.record_notified(key, failed))
        return refusal
