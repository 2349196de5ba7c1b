"""One connection to an inbound service: the driver of a session's transport.

A :class:`Session` moves bytes between an asyncio transport and the SMTP
machine, and whole messages to the delivery.  It knows nothing of agents but the name that hooks
and trace headers get.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
from collections.abc import Callable, Iterable
from typing import NamedTuple

from salmon_revsmtp.delivery.dispatcher import Answer
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.tally import Tally
from salmon_revsmtp.smtp.limits import COMMAND_TIMEOUT
from salmon_revsmtp.smtp.receiver import Quit, Receiver, Refused, StartTls, Transaction
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Session"]

dialogue = logging.getLogger("salmon_revsmtp.dialogue")
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
# anybody wrote begins with these octets (RFC 8446 5.1: application_data, legacy version).
TLS_RECORD = b"\x17\x03"


class _Place(NamedTuple):
    """Of a message among those that are to be delivered: its number when it came, and when that
    was on the event loop's clock."""

    number: int
    since: float


#: Delivers a message of a session, and calls the function with what the client is to hear.
Deliver = Callable[[Transaction, "Session", Callable[[Answer | RuntimeError], None]], None]


class Session(asyncio.Protocol):
    """One SMTP session in the server role on an asyncio transport.

    ``peer``    the client's address and port.
    ``tls``     the connection is encrypted.
    ``clean``   it ended with QUIT.
    ``ended``   a future: done when the connection is over and every delivery has returned; its
                exception is what broke it, if anything did.
    ``served``  messages answered 250 that brought the provider forward: new ones, or a repeat of
                one whose 250 may have been lost on its way.
    """

    def __init__(
        self,
        service: Service,
        policy: Callable[[str], Reply | None],
        deliver: Deliver,
        tally: Tally,
        idle_timeout: float = COMMAND_TIMEOUT,
        *,
        starttls: ssl.SSLContext | None = None,
        admit: Callable[[Session], Reply | None] = lambda session: None,
    ) -> None:
        self.service = service
        self.peer: tuple[str, int] = ("", 0)
        self.tls = False
        self.clean = False
        self.served = 0
        self.broken: str | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deliver = deliver
        self._tally = tally
        self._idle_timeout = idle_timeout
        self._starttls, self._admit = starttls, admit
        self._receiver = Receiver(
            service.hostname, service.limits, policy, starttls=starttls is not None
        )
        self._receiver.ahead = min(AHEAD_LEAST, self._receiver.ahead)
        self._transport: asyncio.Transport | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._seen = (0, 0)  # the receiver's steps and octets when the clock was wound up
        self._refusals = 0
        self._deliveries: dict[Transaction, _Place] = {}
        self._handshakes: set[asyncio.Task[None]] = set()
        self._congested = False
        self._turning = False
        self._eof = False
        self._lost = False
        self._trace = dialogue.isEnabledFor(logging.DEBUG)

    # -- asyncio calls these --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.peer = (transport.get_extra_info("peername") or ("", 0))[:2]
        self.tls = transport.get_extra_info("ssl_object") is not None
        if refusal := self._admit(self):
            log.warning("service=%s peer=%s %s", self.service.name, self.peer[0], refusal)
            transport.write(refusal.encode())
            transport.close()
        else:
            self._flush()

    def data_received(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._trace:
            dialogue.debug("provider: %s", _shown(data))
        self._handle(self._receiver.receive_bytes(data))
        self._flush()

    def eof_received(self) -> bool:
        """The client has no more to say; what it waits for is still answered (not under TLS, where
        a close ends both directions)."""
        self._eof = True
        return (bool(self._deliveries) or self._turning) and not self.tls

    def connection_lost(self, exc: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self._stop_clock()
        if self._refusals > LOGGED_REFUSALS:
            log.warning("peer=%s %d more refused", self.peer, self._refusals - LOGGED_REFUSALS)
        if not self.clean and self.broken is None:
            self.broken = "the provider broke the connection off" + (f": {exc}" if exc else "")
        self._finish()

    def pause_writing(self) -> None:
        self._congested = True
        self._regulate()

    def resume_writing(self) -> None:
        self._congested = False
        self._regulate()

    # -- the session ------------------------------------------------------------------------------

    def _handle(self, events: Iterable[object]) -> None:
        for event in events:
            if isinstance(event, Transaction):
                if self.tls and event.data.startswith(TLS_RECORD):
                    self.abort("a message came encrypted twice; the provider keeps it")
                    return
                place = _Place(len(self._deliveries) + 1, asyncio.get_running_loop().time())
                self._deliveries[event] = place
                self._deliver(event, self, functools.partial(self._delivered, event))
            elif isinstance(event, Refused):
                self._log_refusal(event)
                self._tally.refuse(len(event.recipients) or 1, event.reply)
            elif isinstance(event, StartTls):
                task = asyncio.get_running_loop().create_task(self._handshake())
                self._handshakes.add(task)
                task.add_done_callback(self._shaken)
            elif isinstance(event, Quit):
                self.clean = event.reply.positive
                if not self.clean:
                    self.broken = f"we sent the provider away: {event.reply}"
                    if self._refusals > LOGGED_REFUSALS:
                        self.broken += "; the log names the first that were refused, and why"

    def _log_refusal(self, refused: Refused) -> None:
        self._refusals += 1
        if self._refusals <= LOGGED_REFUSALS:
            to = refused.recipients[:LOGGED_REFUSALS]
            log.warning("peer=%s to=%r reply=%r", self.peer, to, str(refused.reply))

    async def _handshake(self) -> None:
        assert self._transport is not None and self._starttls is not None
        if self._receiver.pending:
            raise ConnectionError("bytes behind STARTTLS")
        encrypted = await asyncio.get_running_loop().start_tls(
            self._transport, self, self._starttls, server_side=True
        )
        if encrypted is None:
            raise ConnectionError("the connection was lost")
        self._transport = encrypted
        self.tls = True
        self._handle(self._receiver.tls_started())
        self._flush()

    def _shaken(self, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.abort(f"the TLS handshake failed: {error}")
            # asyncio tells nobody of a connection that is lost in its handshake.
            self.connection_lost(None)

    def _delivered(self, transaction: Transaction, outcome: Answer | RuntimeError) -> None:
        """Only now is a message answered: 250 means safe."""
        self._read_ahead(self._deliveries.pop(transaction))
        try:
            if isinstance(outcome, RuntimeError):
                raise outcome
            self._answer(transaction, outcome)
        except Exception as error:
            # Our own bug: the message has no 250, so the provider keeps it.
            log.exception("delivery failed")
            self._flush()  # what has been answered
            self.abort(f"a delivery failed: {type(error).__name__}: {error}")
        if not self._turning:
            # What is answered in one turn of the event loop goes out together.
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _answer(self, transaction: Transaction, answer: Answer) -> None:
        envelope, tally = transaction.envelope, self._tally
        if answer.reply.positive:
            seen = (answer.digest, envelope.reverse_path, envelope.recipients)
            tally.accepted[seen] += 1
            # A repeat is progress once: the first 250 may not have arrived.
            self.served += tally.accepted[seen] <= 2
        tally.add(answer, len(transaction.data))
        self._handle(self._receiver.answer(transaction, answer.reply, answer.each))

    def _read_ahead(self, place: _Place) -> None:
        """Take as much from the client as is delivered in a moment: what waits here is waited for
        there, and its time (``handler_timeout``, RFC 5321 4.5.3.2.6) is running."""
        seconds = asyncio.get_running_loop().time() - place.since
        ahead = int(AHEAD_SECONDS * place.number / seconds) if seconds else self._receiver.ahead
        most = self._receiver.limits.unanswered_messages
        self._receiver.ahead = min(max(AHEAD_LEAST, ahead), most)

    def _turn(self) -> None:
        self._turning = False
        self._flush()
        if self._eof and not self._deliveries and self._transport is not None:
            self._transport.close()
        self._finish()

    def _flush(self) -> None:
        data = self._receiver.data_to_send()
        if self._lost or self._transport is None:
            return
        if data:
            if self._trace:
                dialogue.debug("customer: %s", _shown(data))
            self._transport.write(data)
        if self._receiver.closed:
            self._transport.close()
        self._regulate()
        self._wait()

    def _regulate(self) -> None:
        """Read only while there is room: for messages, and for our replies."""
        transport = self._transport
        if transport is None or self._lost or transport.is_closing():
            return
        if self._congested or self._receiver.paused:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def _wait(self) -> None:
        """The clock on a client that has the word.  What it says winds the clock up when it goes
        on: a command that became whole (RFC 5321 4.5.3.2), enough content.  An octet now and then
        does not."""
        if self._deliveries or self._lost:
            self._stop_clock()
        elif self._idle is None or self._went_on():
            self._stop_clock()
            self._seen = (self._receiver.steps, self._receiver.content_octets)
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self._idle_timeout, self._idled)

    def _went_on(self) -> bool:
        steps, octets = self._seen
        enough = self._receiver.limits.content_rate * self._idle_timeout
        return self._receiver.steps > steps or self._receiver.content_octets - octets >= enough

    def _stop_clock(self) -> None:
        if self._idle:
            self._idle.cancel()
            self._idle = None

    def _idled(self) -> None:
        came = self._receiver.content_octets - self._seen[1]
        if came:
            did = f"sent no more than {came} octets of a message"
        elif self._receiver.pending:
            did = "sent no whole command"
        else:
            did = "said nothing"
        self.abort(f"the provider {did} in {self._idle_timeout:g} seconds")

    def shut_down(self) -> None:
        """End at the next message boundary: the message in hand is answered, a new one gets 421."""
        self._handle(self._receiver.shut_down())
        self._flush()

    def abort(self, reason: str) -> None:
        """Drop the connection; what was not answered stays with the client."""
        if self.broken is None:
            self.broken = reason
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> None:
        if self._lost and not self._deliveries and not self.ended.done():
            self.ended.set_result(None)


def _shown(data: bytes) -> str:
    """Wire bytes for a person: lines with / between them, and no more than a few."""
    text = data[:300].decode("utf-8", "backslashreplace").replace("\r\n", " / ").rstrip(" /")
    more = f" ... [{len(data)} octets]" if len(data) > 300 else ""
    return "".join(char if char.isprintable() else "?" for char in text) + more
