"""One asyncio driver for every SMTP machine, in either role.

A :class:`Driver` moves bytes between an asyncio transport and a machine that does no I/O.  What all
connections need is here, once: back-pressure in both directions, a clock that runs on progress, the
TLS handshake, the end.  A subclass says what a machine's events mean.

Back-pressure.  While the peer does not read what we say, we read nothing from it; while the machine
is ``paused``, too.  What is to be written goes to the transport in pieces, as it takes them.

The end.  Where ``at_boundary`` says that something is under way, the connection ends with a reset,
also when this process is killed: a peer must not take the end for a clean one.  So such a
connection has SO_LINGER with a time of 0 from its beginning, and loses it for a clean end only.
Exim 4.100.1 in the clear takes even a reset for success there, and deletes the message; only a
reply keeps it.  So a connection in the clear has a guard, too, who gives one.

The clock.  A peer that has the word has ``timeout`` seconds to bring the session forward: a command
or a reply that became whole (RFC 5321 4.5.3.2), enough content, or enough of ours read.  An octet
now and then is none of these.  A command now and then is, so where it has ``patience`` a second
clock runs: from when the peer was given the word until it gives us something to do.  Only content
that comes, or ours that is read, gives it more time, at the least rate.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

from salmon_revsmtp.net.guard import Guard, guard
from salmon_revsmtp.net.tls import TlsTransport
from salmon_revsmtp.net.trace import ENOUGH, Trace, hearer
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["DEAD_AFTER", "Driver", "Machine"]

# Octets handed to the transport at a time.
PIECE = 256 * 1024

# Octets a second, on an average over one timeout, that count as progress.  A tenth of what a 9,600
# baud line brings: a message of the largest size would take for ever if each octet did.
LEAST_RATE = 100

# Seconds that a peer that was sent away has to read why.
GOODBYE = 5.0


# Either side drops a session that is kept open when it has heard nothing for so many times the
# longest silence that was agreed: one sign of life may be lost on the way.
DEAD_AFTER = 2.5


class Machine(Protocol):
    """A protocol without I/O, as the driver sees it; ``smtp`` has them.

    ``steps``           counts the commands, chunks, messages or replies that became whole.
    ``content_octets``  counts the octets of content that came.
    ``answers``         what comes makes it say more, so nothing may be read while that is not.  (A
                        client has to read replies while it writes, RFC 2920 3.1, or both sides wait
                        for ever.)
    ``secret``          what comes may be a password.
    """

    steps: int
    content_octets: int

    @property
    def answers(self) -> bool:
        """See above."""

    @property
    def secret(self) -> bool:
        """See above."""

    @property
    def paused(self) -> bool:
        """Read no more, for now."""

    @property
    def closed(self) -> bool:
        """The session is over: close the connection when all is written."""

    @property
    def streaming(self) -> bool:
        """There is more to write when that is written which ``data_to_send`` has given."""

    @property
    def pending(self) -> bool:
        """Bytes came that have not been looked at."""

    def receive_bytes(self, data: bytes) -> Sequence[object]:
        """Take what came; returns what happened, in order."""

    def advance(self) -> Sequence[object]:
        """Go on with what has come; returns what happened, in order."""

    def data_to_send(self) -> bytes | Sequence[bytes]:
        """What is to be written now; each octet is returned once."""


class Driver(asyncio.Protocol):
    """One connection.

    ``peer``     the other side's address and port.
    ``tls``      the connection is encrypted.
    ``clean``    it ended as the protocol has it.
    ``broken``   what broke it, if anything did; a sentence's end.
    ``broken_off``  the peer did.
    ``ended``    a future: done when the connection is over and nothing of it is under way.
    ``machine``  speaks the protocol; a subclass may change it at a turn of roles.

    ``timeout``   seconds in which the peer has to bring the session forward.
    ``patience``  seconds in which it has to give us something to do; ``None``: no limit.
    """

    # Ten thousand of them wait at a time: they are to be small.
    __slots__ = (
        "_aborted",
        "_begun",
        "_clock",
        "_congested",
        "_eof",
        "_guard",
        "_handshake",
        "_hearer",
        "_loop",
        "_lost",
        "_marks",
        "_outgoing",
        "_patience",
        "_progressed_at",
        "_ticking",
        "_timeout",
        "_trace",
        "_transport",
        "_word",
        "_written",
        "broken",
        "broken_off",
        "clean",
        "ended",
        "machine",
        "peer",
        "tls",
    )

    #: Who we are and who they are, in messages for a person.
    WE, THEY = "server", "client"

    def __init__(self, machine: Machine, timeout: float, patience: float | None = None) -> None:
        self.machine = machine
        self.clean = False
        self.peer: tuple[str, int] = ("", 0)
        self.tls = False
        self.broken: str | None = None
        self.broken_off = False
        # Asking for it costs a system call, and each command would.
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._timeout = timeout
        self._patience = patience
        self._transport: asyncio.Transport | None = None
        self._outgoing: list[memoryview] = []
        self._written = 0  # octets
        self._congested = False
        self._eof = False
        self._lost = self._aborted = False
        self._guard: Guard | None = None
        self._handshake: asyncio.Task[None] | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._ticking = False  # the clock runs
        self._progressed_at = 0.0
        self._marks = (0, 0, 0)
        # When the peer was given the word, and the octets that had gone either way; when it began
        # what is under way, and the octets of content.
        self._word = self._begun = (0.0, 0)
        self._hearer = hearer()
        self._trace = Trace() if self._hearer is not None else None

    # -- what a subclass says -------------------------------------------------------------------

    @abstractmethod
    def handle(self, event: object) -> None:
        """Something happened in the machine."""

    @property
    def busy(self) -> bool:
        """The peer waits for us: no clock runs on it, and a half-closed connection stays."""
        return False

    @property
    def progressed_at(self) -> float:
        """When the peer brought the session forward, on the event loop's clock."""
        return self._progressed_at

    @property
    def unfinished(self) -> bool:
        """Something of it is under way, also when the connection is gone."""
        return self.busy

    @property
    def at_boundary(self) -> bool:
        """Nothing is under way that a clean close could be taken for the success of."""
        return True

    @property
    def owes_an_answer(self) -> bool:
        """The peer waits for an answer, or is about to, and may take none for success."""
        return False

    def connected(self) -> None:
        """The connection is there."""

    def disconnected(self) -> None:
        """It is gone."""

    # -- asyncio calls these --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self.peer[0]:  # a load balancer may have said who it is
            self.peer = (transport.get_extra_info("peername") or ("", 0))[:2]
        self.tls = transport.get_extra_info("ssl_object") is not None
        self.connected()
        self.flush()

    def data_received(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._trace is None or self._hearer is None:
            self.happened(self.machine.receive_bytes(data))
            return
        # A machine that answers is the server.
        secret, answers, before = (
            self.machine.secret,
            self.machine.answers,
            self.machine.content_octets,
        )
        events = self.machine.receive_bytes(data)
        shown = f"[{len(data)} octets]"
        if not secret:
            content = self.machine.content_octets - before
            shown = self._trace.client(data, content) if answers else self._trace.server(data)
        if shown:
            self._hear(f"{self.THEY}: {shown}")
        self.happened(events)

    def eof_received(self) -> bool:
        """The peer has no more to say; what it waits for is still answered (not under TLS, where a
        close ends both directions)."""
        self._eof = True
        if self.at_boundary:
            self.reset_at_end(False)
        return (self.busy or bool(self._outgoing)) and not self.tls

    def connection_lost(self, exc: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self._stop_clock()
        self._outgoing.clear()
        if self._guard is not None:
            if self.owes_an_answer:
                self._guard.end()
            else:
                self._guard.close()
            self._guard = None
        if self.broken is None and not self.clean:
            self.broken_off = True
            self.broken = f"the {self.THEY} broke the connection off" + (f": {exc}" if exc else "")
        self.disconnected()
        self.finish()

    def pause_writing(self) -> None:
        self._congested = True
        self._regulate()

    def resume_writing(self) -> None:
        self._congested = False
        self._pump()
        self._stream()
        self._regulate()

    # -- the machine ------------------------------------------------------------------------------

    def happened(self, events: Iterable[object]) -> None:
        """Handle what happened in the machine, and write what it says to that."""
        for event in events:
            self.handle(event)
            if self._aborted:
                break  # what comes after that was never answered, and stays with the peer
        self.flush()

    def advance(self) -> None:
        """Go on after anything that may have ended a pause of the machine."""
        self.happened(self.machine.advance())
        self.finish()

    def change_roles(self, machine: Machine) -> None:
        """Another machine speaks from now on, when what this one has to say is written."""
        self._say(self.machine.data_to_send())
        self.machine = machine
        self.flush()

    def flush(self) -> None:
        """Write what the machine has to say, and see who has the word now."""
        said = self.machine.data_to_send()
        if self._lost or self._transport is None:
            return
        if said:
            self._say(said)
        machine = self.machine
        if machine.streaming:
            self._stream()
        if self._outgoing or self._eof or machine.closed:
            self._pump()
        self._regulate()
        self._wind_up()

    def _stream(self) -> None:
        """Write what the machine has more of, as long as there is room for it."""
        if not self.machine.streaming:
            return
        while self.machine.streaming and not self._lost:
            if self._outgoing:  # a piece with stuffed dots is more than goes out at a time
                self._pump()
            if self._outgoing or self._congested:
                break
            self._say(self.machine.data_to_send())
        if not self.machine.streaming:  # what waited for that
            self.happened(self.machine.advance())

    def _say(self, said: bytes | Sequence[bytes]) -> None:
        for data in (said,) if isinstance(said, bytes) else said:
            if self._trace is not None and self._hearer is not None:
                answers = self.machine.answers
                shown = self._trace.server(data) if answers else self._trace.client(data)
                if shown:
                    self._hear(f"{self.WE}: {shown}")
            self._write(data)

    def _hear(self, line: str) -> None:
        if self._hearer is not None and self._hearer(line) is ENOUGH:
            self._trace = self._hearer = None

    def _write(self, data: bytes) -> None:
        if self._lost or self._transport is None or self._transport.is_closing():
            return
        if len(data) <= PIECE and not self._outgoing and not self._congested:
            if data:
                self._put(self._transport, data)
            return
        view = memoryview(data)
        self._outgoing.extend(view[start : start + PIECE] for start in range(0, len(view), PIECE))

    def _pump(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        while self._outgoing and not self._congested:
            self._put(transport, self._outgoing.pop(0))
        over = self.machine.closed or (self._eof and not self.busy)
        if over and not self._outgoing:
            if self.at_boundary:
                self.reset_at_end(False)
            transport.close()

    def _put(self, transport: asyncio.Transport, data: bytes | memoryview) -> None:
        self._written += len(data)
        transport.write(data)
        if self._guard is not None:
            self._guard.torn(transport.get_write_buffer_size() > 0)

    def _regulate(self) -> None:
        """Read only while there is room: for what comes, and for what is said to it."""
        transport = self._transport
        if transport is None or self._lost or transport.is_closing():
            return
        if self.machine.paused or (self._congested and self.machine.answers):
            transport.pause_reading()
        else:
            transport.resume_reading()

    # -- the clock --------------------------------------------------------------------------------

    def _wind_up(self) -> None:
        if self._lost or self.busy:
            # A timer that is there stays: it costs less to let it come too early, once in a
            # timeout, than to have a new one for each message.
            self._ticking = False
            return
        now, machine = self._loop.time(), self.machine
        if not self._ticking:
            self._ticking = True
            self._progressed_at, self._marks = now, self._now()
            self._word = (now, self._marks[1] + self._marks[2])
            self._begun = (now, self._marks[1])
            if self._patience is not None and self._patience < self._timeout and self._clock:
                self._clock.cancel()  # it may come too late
                self._clock = None
            if self._clock is None:
                self._clock = self._loop.call_at(self._until(), self._look)
        elif machine.steps > self._marks[0] or self._progress():  # the first, as a rule
            self._progressed_at, self._marks = now, self._now()
        if self.at_boundary:
            self._begun = (now, machine.content_octets)

    def _now(self) -> tuple[int, int, int]:
        unread = 0
        if self._transport is not None and not self._lost:
            unread = self._transport.get_write_buffer_size()
        return self.machine.steps, self.machine.content_octets, self._written - unread

    def _progress(self) -> bool:
        steps, octets, read = self._marks
        enough = LEAST_RATE * self._timeout
        now = self._now()
        return now[0] > steps or now[1] - octets >= enough or now[2] - read >= enough

    def _look(self) -> None:
        """Time may be up."""
        loop, self._clock = self._loop, None
        if not self._ticking:
            return
        if self._progress():
            self._progressed_at, self._marks = loop.time(), self._now()
        if self._until() > loop.time():
            self._clock = loop.call_at(self._until(), self._look)
            return
        self._ticking = False
        if self._progressed_at + self._timeout <= loop.time():
            self.abort(f"the {self.THEY} {self._did()} in {self._timeout:g} seconds")
        else:
            seconds = loop.time() - self._word[0]
            text = f"no message came to its end in {seconds:.0f} seconds, closing"
            self.send_away(Reply(421, text, "4.4.2"))

    def _until(self) -> float:
        """When the first of the two clocks will have run down."""
        until = self._progressed_at + self._timeout
        if self._patience is None:
            return until
        since, before = self._word
        _, content, read = self._now()
        return min(until, since + self._patience + (content + read - before) / LEAST_RATE)

    @property
    def waits_since(self) -> float | None:
        """Since when the peer has brought nothing forward, on the event loop's clock; ``None``
        while we have the word, or something of it is under way."""
        return None if self.busy or self.unfinished or self._lost else self._progressed_at

    def slower_than(self, rate: int, after: float) -> bool:
        """What the peer has under way came with less than ``rate`` octets a second so far; of the
        first ``after`` seconds that is not said."""
        if self.busy or self.at_boundary or self._lost:
            return False
        since, before = self._begun
        seconds = self._loop.time() - since
        return seconds >= after and self.machine.content_octets - before < rate * seconds

    def _did(self) -> str:
        came = self.machine.content_octets - self._marks[1]
        if came:
            return f"sent no more than {came} octets of a message"
        if self._congested:
            return "read too little of what we sent"
        return "sent no whole command" if self.machine.pending else "said nothing"

    def wait_at_most(self, seconds: float) -> None:
        """Change how long the peer may make no progress."""
        if seconds != self._timeout:
            self._timeout = seconds
            self._stop_clock()
            self._wind_up()

    def keep_alive(self, silence: float) -> None:
        """Have the system see, after so many seconds of silence, whether the peer is there, and end
        the connection when it has not been for one and a half times as long again."""
        connection = self._transport.get_extra_info("socket") if self._transport else None
        if connection is None:
            return
        most = int(1000 * DEAD_AFTER * silence)  # milliseconds
        options = {
            "TCP_KEEPIDLE": max(1, int(silence)),
            "TCP_KEEPINTVL": max(1, int(silence / 2)),
            "TCP_KEEPCNT": 3,
            "TCP_USER_TIMEOUT": most,
        }
        with contextlib.suppress(OSError):  # it is gone
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in options.items():
                if (number := getattr(socket, name, None)) is not None:
                    connection.setsockopt(socket.IPPROTO_TCP, number, value)

    def _stop_clock(self) -> None:
        self._ticking = False
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    # -- TLS --------------------------------------------------------------------------------------

    def start_tls(self, context: ssl.SSLContext, server: str | None = None) -> None:
        """Do the handshake now; then the machine goes on (RFC 3207).  ``server``: the name of the
        peer, if we are the client."""
        if self._guard is not None:
            self._guard.let_go()
            self._guard = None
        task = self._loop.create_task(self._start_tls(context, server))
        self._handshake = task
        task.add_done_callback(self._shaken)

    async def _start_tls(self, context: ssl.SSLContext, server: str | None) -> None:
        assert self._transport is not None
        if self.machine.pending:
            raise ConnectionError("unexpected data after STARTTLS")
        if server is None:
            ours = TlsTransport(self._transport, context)
            await ours.shake_hands()
            ours.set_protocol(self)
            self._transport, self._handshake = ours, None
        else:
            if self._transport.is_closing():
                raise ConnectionError("the connection was lost")
            encrypted = await self._loop.start_tls(
                self._transport, self, context, server_hostname=server
            )
            if encrypted is None:
                raise ConnectionError("the connection was lost")
            self._transport = encrypted
        self.tls, self._congested = True, False
        self.encrypted()
        self.advance()

    def encrypted(self) -> None:
        """The handshake is done; the machine has to hear of it."""

    def _shaken(self, task: asyncio.Task[None]) -> None:
        self._handshake = None
        if task.cancelled():
            self.connection_lost(None)
        elif error := task.exception():
            self.abort(f"the TLS handshake failed: {error}")
            self.connection_lost(None)

    # -- the end ----------------------------------------------------------------------------------

    def shut_down(self) -> None:
        """End at the next boundary that the protocol has for that; in a handshake there is none
        to wait for."""
        if self._handshake is not None:
            self.abort("we are shutting down")
        else:
            self.end_soon()

    def end_soon(self) -> None:
        """What a machine does when its side shuts down."""
        self.abort("we are shutting down")

    def send_away(self, reply: Reply) -> None:
        """End it now, whatever is under way; ``reply`` (421) says why, where the role has that."""
        self.abort(str(reply))

    def abort_soon(self) -> None:
        """Do not wait any longer than a moment for what was said last to be read."""
        if self._transport is not None:
            self._loop.call_later(GOODBYE, self._transport.abort)

    def reset_at_end(self, on: bool) -> None:
        """Whether this connection ends with a reset, whatever ends it."""
        if self._transport is None:
            return
        connection = self._transport.get_extra_info("socket")
        if connection is not None:
            with contextlib.suppress(OSError):  # it is gone
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))

    def guard(self, last_words: bytes) -> None:
        """If this connection ends while we owe an answer, or with this process, the peer hears this
        line.  Not under TLS, which no other process can go on with."""
        assert self._transport is not None
        connection = self._transport.get_extra_info("socket")
        if connection is not None and not self.tls:
            self._guard = guard(connection, last_words)

    def abort(self, reason: str) -> None:
        """Drop the connection."""
        self._aborted = True
        if self.broken is None:
            self.broken = reason
        if self._handshake is not None:
            self._handshake.cancel()
        if self._transport is not None:
            if self.at_boundary:
                self.reset_at_end(False)
            self._transport.abort()

    def finish(self) -> None:
        """The end, if it is that."""
        if self._lost and not self.unfinished and not self.ended.done():
            self.ended.set_result(None)
