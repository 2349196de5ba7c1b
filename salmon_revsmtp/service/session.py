"""One connection to an inbound service: the SMTP machine, and what becomes of its messages.

A :class:`Session` hands whole messages to the dispatcher and answers them when they are safe.  What
every connection needs is in ``net.driver``.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from salmon_revsmtp.delivery.dispatcher import Dispatcher, PendingDelivery
from salmon_revsmtp.delivery.trace import Origin
from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.smtp.limits import COMMAND_TIMEOUT
from salmon_revsmtp.smtp.receiver import Quit, Receiver, Refused, StartTls, Transaction
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Session", "Tally"]

log = logging.getLogger(__name__)

# Log lines about refused recipients in one session; of the others their number is told.  Enough to
# see what is wrong, and a provider cannot fill the disk with them.
LOGGED_REFUSALS = 20

# Messages that are read ahead: as many as would be delivered in so many seconds, and at least so
# many.
AHEAD_SECONDS = 1.0
AHEAD_LEAST = 16

# Exim 4.100.1 as provider encrypts every message but the first of a session twice: what comes out
# of the connection's TLS is a TLS record, cut off where the message should end.  It takes the
# message for unsent when the connection breaks, and sends it in the next session.  No message that
# anyone wrote begins with these octets (RFC 8446 5.1: application_data, legacy version).
TLS_RECORD = b"\x17\x03"


# What a client hears whose session ends within a message, or with the process.
ENDED = "has ended this session; send the mail again"

#: A message as the provider sees it: digest, reverse-path, recipients.
_Message = tuple[bytes, str, tuple[str, ...]]


@dataclass
class Tally:
    """Counts over all sessions of a collection, live."""

    messages: int = 0
    recipients: int = 0
    bytes: int = 0
    refused: int = 0
    #: How often each message (by its digest and envelope) was answered 250.
    accepted: Counter[_Message] = field(default_factory=Counter)
    #: The last 4yz that we gave for a recipient or a message.
    deferred: Reply | None = None

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
            self.bytes += len(delivery.data)
        for reply in delivery.replies:
            if not reply.positive:
                self.refuse(1, reply)
        assert delivery.reply is not None
        if delivery.reply.transient:  # whatever became of each, the client tries again
            self.deferred = delivery.reply
        if not delivery.reply.positive or delivery.key is None:
            return False
        seen = (delivery.key.digest, delivery.envelope.reverse_path, delivery.envelope.recipients)
        self.accepted[seen] += 1
        return self.accepted[seen] <= 2


class Session(Driver):
    """One SMTP session in the server role on an asyncio transport.

    ``origin``  where its messages come from; the connection adds the client's address and TLS.
    ``served``  messages answered 250 that brought the provider forward: new ones, or a repeat of
                one whose 250 may have been lost on its way.
    """

    WE, THEY = "customer", "provider"

    def __init__(
        self,
        service: Service,
        policy: Callable[[str], Reply | None],
        dispatcher: Dispatcher,
        origin: Origin,
        tally: Tally,
        idle_timeout: float = COMMAND_TIMEOUT,
        *,
        starttls: ssl.SSLContext | None = None,
        admit: Callable[[Driver], Reply | None] = lambda driver: None,
    ) -> None:
        self._receiver = Receiver(
            service.hostname, service.limits, policy, starttls=starttls is not None
        )
        self._receiver.ahead = min(AHEAD_LEAST, self._receiver.ahead)
        super().__init__(self._receiver, idle_timeout)
        self.service = service
        self.origin = origin
        self.served = 0
        self._dispatcher = dispatcher
        self._tally = tally
        self._starttls, self._admit = starttls, admit
        self._refusals = 0
        self._deliveries: dict[Transaction, PendingDelivery] = {}
        self._answering = False  # soon

    @property
    def busy(self) -> bool:
        return bool(self._deliveries) or self._answering

    @property
    def at_boundary(self) -> bool:
        return self._receiver.at_boundary

    @property
    def owes_an_answer(self) -> bool:
        return self._receiver.owes_an_answer

    @property
    def doing(self) -> tuple[str, float]:
        """What goes on, for a person, and since when on the event loop's clock."""
        if waiting := list(self._deliveries.values()):
            return "handling a message", min(pending.since for pending in waiting)
        if self._receiver.at_boundary:
            return f"waiting for the {self.THEY}'s next message", self.progressed_at
        return f"waiting for the rest of a message from the {self.THEY}", self.progressed_at

    def connected(self) -> None:
        self.reset_at_end(True)
        self.origin = self.origin.over(self.peer, self.tls)
        if refusal := self._admit(self):
            log.warning("service=%s peer=%s %s", self.service.name, self.peer[0], refusal)
            self._receiver.refuse_session(refusal)
            return
        last_words = Reply(421, f"{self.service.hostname} {ENDED}", "4.3.2")  # RFC 5321 3.8
        self.guard(last_words.encode())

    def encrypted(self) -> None:
        self.origin = self.origin.over(self.peer, self.tls)
        self._receiver.tls_started()

    def disconnected(self) -> None:
        if self._refusals > LOGGED_REFUSALS:
            log.warning("peer=%s %d more refused", self.peer, self._refusals - LOGGED_REFUSALS)

    # -- events -----------------------------------------------------------------------------------

    def handle(self, event: object) -> None:
        if isinstance(event, Transaction):
            self._deliver(event)
        elif isinstance(event, Refused):
            self._log_refusal(event)
            self._tally.refuse(len(event.recipients) or 1, event.reply)
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
            to = refused.recipients[:LOGGED_REFUSALS]
            log.warning("peer=%s to=%r reply=%r", self.peer, to, str(refused.reply))

    def _deliver(self, transaction: Transaction) -> None:
        if self.tls and transaction.data.startswith(TLS_RECORD):
            self.abort("a message came encrypted twice; the provider keeps it")
            return
        pending = PendingDelivery(self.origin, transaction.envelope, transaction.data)
        self._deliveries[transaction] = pending
        pending.number = len(self._deliveries)
        self._dispatcher.deliver(pending, functools.partial(self._delivered, transaction))

    def _delivered(self, transaction: Transaction) -> None:
        """Only now is a message answered: 250 means safe."""
        pending = self._deliveries.pop(transaction)
        try:
            self._read_ahead(pending)
            self.served += self._tally.add(pending)
            assert pending.reply is not None
            self._receiver.answer(transaction, pending.reply, pending.replies)
        except Exception as error:
            # Our own bug: the message has no 250, so the provider keeps it.
            log.exception("answering failed")
            self.flush()  # what has been answered
            self.abort(f"answering failed: {type(error).__name__}: {error}")
        if not self._answering:
            # What is answered in one turn of the event loop goes out together.
            self._answering = True
            asyncio.get_running_loop().call_soon(self._answered)

    def _answered(self) -> None:
        self._answering = False
        self.advance()

    def _read_ahead(self, pending: PendingDelivery) -> None:
        """Take as much from the client as is delivered in a moment: what waits here is waited for
        there, and its time (``handler_timeout``, RFC 5321 4.5.3.2.6) is running."""
        seconds = asyncio.get_running_loop().time() - pending.since
        receiver = self._receiver
        ahead = int(AHEAD_SECONDS * pending.number / seconds) if seconds else receiver.ahead
        receiver.ahead = min(max(AHEAD_LEAST, ahead), receiver.limits.unanswered_messages)

    def end_soon(self) -> None:
        """The message in hand is answered, a new one gets 421."""
        self._receiver.shut_down()
        self.advance()
