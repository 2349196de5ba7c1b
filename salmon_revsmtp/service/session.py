"""One connection to an inbound service: the SMTP machine, and what becomes of its messages.

A :class:`Session` hands whole messages to the dispatcher and answers them when they are safe.  What
every connection needs is in ``net.driver``.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from salmon_revsmtp.delivery.dispatcher import GONE, Deliverer, PendingDelivery
from salmon_revsmtp.delivery.trace import Origin, forwarded_client
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.net.together import afterwards
from salmon_revsmtp.safelog import LogBudget, log_safely
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.recipients import Recipients
from salmon_revsmtp.smtp.budget import Budget
from salmon_revsmtp.smtp.content import Sink
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.limits import COMMAND_TIMEOUT
from salmon_revsmtp.smtp.receiver import (
    EtrnRequest,
    Quit,
    Receiver,
    RecipientRequest,
    Refused,
    StartTls,
    Transaction,
)
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["AnswerEtrn", "Session", "Tally"]

log = logging.getLogger(__name__)

# Log lines about refused recipients in one session; of the others their number is told.  Enough to
# see what is wrong, and a provider cannot fill the disk with them.
LOGGED_REFUSALS = 20
# Recipients that one of them names, where a whole message was refused.
NAMED = 5

# Messages that are read ahead: as many as would be delivered in so many seconds, and at least so
# many.
AHEAD_SECONDS = 1.0
AHEAD_LEAST = 16

# Exim 4.100.1 as provider encrypts every message but the first of a session twice: what comes out
# of the connection's TLS is a TLS record, cut off where the message should end.  It takes the
# message for unsent when the connection breaks, and sends it in the next session.  No message that
# anyone wrote begins with these octets (RFC 8446 5.1: application_data, legacy version).
TLS_RECORD = b"\x17\x03"


# Messages of a collection that are remembered, to tell a repeat from a new one.
REMEMBERED = 10_000

# Seconds that a client that has closed its side of the connection is waited for.  It may listen on,
# and then it hears the answers that come by then; most are gone, and nothing tells the one from the
# other.
HALF_CLOSED = 30.0

# Seconds in which a client has to bring a message to its end, whatever it says; content that comes
# at the least rate makes it more.  A provider that has a thousand recipients refused a minute apart
# brings no one forward; what it has not sent it sends over the next connection.
PATIENCE = 1800.0


_Digest = bytes

#: Given what an ETRN asks for; returns its answer.
AnswerEtrn = Callable[[str], Awaitable[Reply]]

# A NOOP now and then is how a provider sees whether we are there.  On a reversed session
# unproductive commands count as in a row only where there was no silence of so many seconds between
# them.
CALM = 0.5

# Unproductive commands, and refusals, in a session that stays open, and in which strangers' senders
# and recipients are asked for.
ENDLESS = 1_000_000_000

# What a client hears whose session ends within a message, or with the process.
ENDED = "has ended this session; send the mail again"


@dataclass
class Tally:
    """Counts over all sessions of a collection, live."""

    messages: int = 0
    recipients: int = 0
    bytes: int = 0
    refused: int = 0
    #: How many messages were answered 250, repeats among them.
    accepted: int = 0
    #: The last 4yz that we gave for a recipient or a message.
    deferred: Reply | None = None
    #: Since when no message was taken or refused, and all were deferred (seconds since the epoch).
    deferring: float | None = None
    #: How often each of the last ones was, by its digest and envelope.
    _seen: OrderedDict[_Digest, int] = field(default_factory=OrderedDict, repr=False)

    @property
    def answered(self) -> int:
        """Messages and recipients that were answered in any way."""
        return self.accepted + self.refused

    def refuse(self, recipients: int, reply: Reply) -> None:
        """Recipients that were not taken, by their number."""
        self.refused += recipients
        if reply.transient:
            self.deferred = reply

    def add(self, delivery: PendingDelivery) -> bool:
        """A message that is settled.  Whether it was taken and brought the client forward: a repeat
        does so once, for the first 250 may not have arrived."""
        self.recipients += delivery.delivered
        if delivery.delivered:
            self.messages += 1
            self.bytes += delivery.size
        for reply in delivery.replies:
            if not reply.positive:
                self.refuse(1, reply)
        assert delivery.reply is not None
        if delivery.reply.transient:  # whatever became of each, the client tries again
            self.deferred = delivery.reply
        if delivery.reply.transient and not delivery.delivered:
            self.deferring = self.deferring or time.time()
        else:
            self.deferring = None
        if not delivery.reply.positive or delivery.key is None:
            return False
        self.accepted += 1
        return self._times(_message(delivery.key.digest, delivery.envelope)) <= 2

    def _times(self, message: _Digest) -> int:
        times = self._seen.pop(message, 0) + 1
        self._seen[message] = times
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return times


def _message(digest: bytes, envelope: Envelope) -> _Digest:
    """A message as the provider sees it, in short."""
    text = "\n".join((envelope.reverse_path, *envelope.recipients))
    return hashlib.sha256(digest + text.encode()).digest()


class Session(Driver):
    """One SMTP session in the server role on an asyncio transport.

    ``recipients``  whom it takes mail for.
    ``origin``  where its messages come from; the connection adds the client's address and TLS.
    ``served``  messages answered 250 that brought the provider forward: new ones, or a repeat of
                one whose 250 may have been lost on its way.
    ``log``     what its lines are written with; several sessions may share one.
    ``memory``  what its messages are counted in.
    ``etrn``    answers ETRN, if that is offered.
    """

    WE, THEY = "customer", "provider"

    def __init__(
        self,
        service: Service,
        recipients: Recipients,
        deliverer: Deliverer,
        origin: Origin,
        tally: Tally,
        idle_timeout: float = COMMAND_TIMEOUT,
        *,
        starttls: ssl.SSLContext | None = None,
        admit: Callable[[Session], Reply | None] = lambda session: None,
        log: LogBudget | None = None,
        patience: float | None = PATIENCE,
        etrn: AnswerEtrn | None = None,
    ) -> None:
        limits = service.limits
        if patience is None:
            # What a provider asks in a session that stays open it asks for others.
            limits = replace(limits, junk=ENDLESS, refusals=ENDLESS)
        self._receiver = Receiver(
            service.hostname,
            limits,
            recipients.verdict,
            starttls=starttls is not None,
            etrn=etrn is not None,
            xforward=origin.agent is not None,
            memory=service.memory,
            sinks=None if deliverer.sinks is None else self._sink,
        )
        self._receiver.ahead = min(AHEAD_LEAST, self._receiver.ahead)
        super().__init__(self._receiver, idle_timeout, patience)
        self.service = service
        self.origin = origin
        self.served = 0
        self.log = log or LogBudget()
        self._deliverer = deliverer
        self._sinks = deliverer.sinks
        self._tally = tally
        self._starttls, self._admit = starttls, admit
        self._refusals = 0
        self._deliveries: dict[Transaction, PendingDelivery] = {}
        # Answered, and nothing has come since.
        self._perhaps_unheard: list[PendingDelivery] = []
        self._answering = False  # soon
        self._etrn = etrn
        self._etrn_asked: asyncio.Task[None] | None = None
        self._recipients = recipients
        self._deciding: dict[RecipientRequest, asyncio.Task[None]] = {}
        self._heard_at = 0.0

    @property
    def busy(self) -> bool:
        return (
            bool(self._deliveries)
            or self._answering
            or bool(self._deciding)
            or self._etrn_asked is not None
        )

    @property
    def at_boundary(self) -> bool:
        return self._receiver.at_boundary

    @property
    def memory(self) -> Budget:
        return self._receiver.memory

    @memory.setter
    def memory(self, memory: Budget) -> None:
        """Before its first message."""
        self._receiver.memory = memory

    @property
    def owes_an_answer(self) -> bool:
        return self._receiver.owes_an_answer

    @property
    def doing(self) -> tuple[str, float]:
        """What goes on, for a person, and since when on the event loop's clock."""
        if waiting := list(self._deliveries.values()):
            return "handling a message", min(pending.since for pending in waiting)
        if self._deciding:
            return "deciding on a recipient", self.progressed_at
        if self._receiver.at_boundary:
            return f"waiting for the {self.THEY}'s next message", self.progressed_at
        return f"waiting for the rest of a message from the {self.THEY}", self.progressed_at

    def connected(self) -> None:
        self.reset_at_end(True)
        self.origin = self.origin.over(self.peer, self.tls)
        if self.origin.agent is None:  # a provider is not where its messages come from
            self._receiver.client = self.peer
            self._receiver.xforward = self.peer[0] in self.service.forwarders
        if refusal := self._admit(self):
            self.log.log(
                *(log, logging.WARNING, "service=%s peer=%s %s"),
                *(self.service.name, self.peer[0], str(refusal)),
            )
            self._receiver.refuse_session(refusal)
            return
        last_words = Reply(421, f"{self.service.hostname} {ENDED}", "4.3.2")  # RFC 5321 3.8
        self.guard(last_words.encode())

    def encrypted(self) -> None:
        self.origin = self.origin.over(self.peer, self.tls)
        self._receiver.tls_started()

    def eof_received(self) -> bool:
        if self._deliveries:
            self._loop.call_later(HALF_CLOSED, self._forget)
        for pending in self._deliveries.values():
            pending.note_heard(False)  # there will be no command after the answer
        return super().eof_received()

    def _forget(self) -> None:
        """No one waits for the answers any more, as far as we can tell: what has not begun is not
        done now."""
        for transaction, pending in list(self._deliveries.items()):
            pending.note_heard(False)
            if self._deliverer.let_go(pending):
                del self._deliveries[transaction]
                self._receiver.answer(transaction, GONE)
        self.advance()

    def disconnected(self) -> None:
        for task in self._deciding.values():
            task.cancel()
        self._deciding.clear()
        self._receiver.lost()
        self._note_heard(False)
        self._forget()
        if self._refusals > LOGGED_REFUSALS:
            more = self._refusals - LOGGED_REFUSALS
            self.log.log(log, logging.WARNING, "peer=%s %d more refused", self.peer, more)
        self.log.settle(log)

    def data_received(self, data: bytes) -> None:
        if self._perhaps_unheard and not self._answering:
            self._note_heard(True)
        now = self._loop.time()
        if self.origin.agent is not None and now - self._heard_at >= CALM:
            self._receiver.forgive()
            self._refusals = 0
        self._heard_at = now
        super().data_received(data)

    def _note_heard(self, heard: bool) -> None:
        """Whoever wants to know learns whether its answer was heard."""
        for pending in self._perhaps_unheard:
            pending.note_heard(heard)
        self._perhaps_unheard.clear()

    # -- events -----------------------------------------------------------------------------------

    def handle(self, event: object) -> None:
        if isinstance(event, Transaction):
            self._deliver(event)
        elif isinstance(event, Refused):
            self._log_refusal(event)
            refused = len(event.recipients) or 1
            self._tally.refuse(refused, event.reply)
            self.service.answered[event.reply.code] += refused
        elif isinstance(event, RecipientRequest):
            deciding = self._loop.create_task(self._decide(event))
            self._deciding[event] = deciding
        elif isinstance(event, EtrnRequest):
            self._etrn_asked = self._loop.create_task(self._ask(event.argument))
        elif isinstance(event, StartTls):
            assert self._starttls is not None
            self.start_tls(self._starttls)
        elif isinstance(event, Quit):
            self.clean = event.reply.positive
            if not self.clean:
                self.broken = f"we closed the session: {event.reply}"
                if self._refusals > LOGGED_REFUSALS:
                    self.broken += "; the log names the first that were refused, and why"

    def _log_refusal(self, refused: Refused) -> None:
        self._refusals += 1
        if self._refusals <= LOGGED_REFUSALS:
            first, more = refused.recipients[:NAMED], len(refused.recipients) - NAMED
            to = ",".join(map(angle, first)) + (f" and {more} more" if more > 0 else "")
            self.log.log(
                *(log, logging.WARNING, "peer=%s%s to=%s reply=%r"),
                *(self.peer, forwarded_client(refused.forwarded), to, str(refused.reply)),
            )

    def _sink(self, envelope: Envelope) -> Sink:
        """Where a large message goes while it comes."""
        assert self._sinks is not None
        return self._sinks(self.origin, envelope)

    def _deliver(self, transaction: Transaction) -> None:
        if self.tls and transaction.beginning.startswith(TLS_RECORD):
            if transaction.sink is not None:
                transaction.sink.discard()
            self.abort("a message came encrypted twice; the provider keeps it")
            return
        pending = PendingDelivery(
            self.origin,
            transaction.envelope,
            transaction.data,
            log=self.log,
            sink=transaction.sink,
        )
        self._deliveries[transaction] = pending
        pending.number = len(self._deliveries)
        self._deliverer.deliver(pending, functools.partial(self._delivered, transaction))

    def _delivered(self, transaction: Transaction) -> None:
        """Only now is a message answered: 250 means safe."""
        pending = self._deliveries.pop(transaction)
        self._perhaps_unheard.append(pending)
        if self._lost:
            self._note_heard(False)
        try:
            self._read_ahead(pending)
            self.served += self._tally.add(pending)
            assert pending.reply is not None
            self.service.answered[pending.reply.code] += 1
            self.service.octets += pending.size * pending.reply.positive
            self._receiver.answer(transaction, pending.reply, pending.replies)
        except Exception as error:
            # Our own bug: the message has no 250, so the provider keeps it.
            log_safely(log, logging.ERROR, "answering failed", error=True)
            self.flush()  # what has been answered
            self.abort(f"answering failed: {type(error).__name__}: {error}")
        self._answer_soon()

    def _answer_soon(self) -> None:
        """What is answered together goes out together."""
        if not self._answering:
            self._answering = True
            afterwards(self._answered)

    def _answered(self) -> None:
        self._answering = False
        self.advance()

    def _read_ahead(self, pending: PendingDelivery) -> None:
        """Take as much from the client as is delivered in a moment: what waits here is waited for
        there, and its time (``handler_timeout``, RFC 5321 4.5.3.2.6) is running."""
        seconds = self._loop.time() - pending.since
        receiver = self._receiver
        ahead = int(AHEAD_SECONDS * pending.number / seconds) if seconds else receiver.ahead
        receiver.ahead = min(max(AHEAD_LEAST, ahead), receiver.limits.unanswered_messages)

    async def _decide(self, request: RecipientRequest) -> None:
        """Answer a RCPT when its answer is known."""
        reply = await self._recipients.decide(request)
        self._deciding.pop(request, None)
        self._receiver.answer_recipient(request, reply)
        self._answer_soon()

    async def _ask(self, name: str) -> None:
        """Answer an ETRN when its answer is known."""
        assert self._etrn is not None
        try:
            reply = await self._etrn(name)
        except Exception:  # our own bug
            log_safely(log, logging.ERROR, "answering ETRN failed", error=True)
            reply = Reply(458, f"unable to queue messages for node {name}", "4.3.0")
        self.log.log(
            *(log, logging.INFO, "service=%s peer=%s etrn=%s reply=%r"),
            *(self.service.name, self.peer[0], name, str(reply)),
        )
        self._etrn_asked = None
        self._receiver.answer_etrn(reply)
        self.advance()

    def send_away(self, reply: Reply) -> None:
        if self._handshake is not None:
            super().send_away(reply)
            return
        self._receiver.send_away(reply)
        self.advance()
        self.abort_soon()

    def end_soon(self) -> None:
        """The message in hand is answered, a new one gets 421."""
        self._receiver.shut_down()
        self.advance()
