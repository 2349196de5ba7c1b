"""The server that mail is handed on to, by SMTP or LMTP.

:class:`~salmon_revsmtp.smtp.sender.Sender` speaks; here are sockets and time.  It blocks: handlers
run in a thread of their own.

It never says that a message was taken when the server has not said so.  So whatever comes out of
turn ends the dialogue: a reply before its command, or two to one.  And it does not hand a message
on twice of its own accord: a connection that was kept open, and turns out to be closed, is replaced
once, and only while the message cannot have been taken.

A connection is kept open between messages for a little while, and each thread that hands mail on
at the same time has one of its own.  After a server did not answer in time, it is not asked again
for a while: each message would hold up all others for as long.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import ipaddress
import logging
import os
import select
import socket
import ssl
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from salmon_revsmtp.forks import ours_alone
from salmon_revsmtp.hostname import machine_name
from salmon_revsmtp.net.address import host_and_port
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.addresses import to_ascii
from salmon_revsmtp.smtp.content import Octets
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply, is_about_mail
from salmon_revsmtp.smtp.sender import (
    BeginTls,
    Broken,
    Event,
    NotForwarded,
    Outgoing,
    Ready,
    Sender,
    Sent,
)

__all__ = ["NextHop", "Server", "next_hop"]

log = logging.getLogger(__name__)

# Seconds for a connection, to each address of the server.
CONNECT = 10.0
# Seconds for a reply, but for that to the whole message: a server on this network is meant.
REPLY = 60.0
# Of the time that a handler has, the part after which a message is given up.
PART = 0.8
# Seconds that a connection stays open after a message, for the next one.
IDLE = 15.0
# Seconds in which a server is not asked that did not answer in time.
PAUSE = 30.0
# Seconds in which a server is called in the clear with which TLS failed.
CLEAR = 60.0
# Seconds that a server has for its greeting when it is only tried.
TRY = 10.0
# Seconds after a line about trouble before one about another trouble.
SILENCE = 60.0
# Seconds for a QUIT to be written; its answer changes nothing.
GOODBYE = 1.0

# Octets that are read at a time.
READ = 64 * 1024

# What the network, TLS, and names that they do not take raise: UnicodeError is a ValueError.
_FAILURES = (OSError, ValueError)

# SO_LINGER on, with no time.
_AT_ONCE = struct.pack("ii", 1, 0)

# A parameter that this server does not take would turn all mail away for a wrong setting.
WRONG_SETTING = frozenset({555})

LATER = "the next server does not take it now, try again later"
UNREACHABLE = Reply(451, "the next server cannot be reached now, try again later", "4.4.1")
BROKEN = Reply(451, LATER, "4.4.2")
NOT_US = Reply(451, LATER, "4.3.5")


@dataclass(frozen=True)
class Server:
    """Where a server is: a host and a port, or a socket on this machine."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def of_setting(cls, value: object, *, unix: bool, below: Path) -> Server:
        """``host:port``; ``unix:/path`` if that may be, whose path may be below a folder.  Raises
        :class:`ValueError`."""
        if not isinstance(value, str):
            raise ValueError("that is no text")
        if unix and value.startswith("unix:"):
            path = str(below / value.removeprefix("unix:"))
            if value == "unix:" or "\0" in path:
                raise ValueError("that is no path")
            return cls(path=path)
        host, port = host_and_port(value)
        if not host or not port:
            raise ValueError("it has no host" if not host else "0 is no port to call")
        _see_that_it_is_a_host(host)
        return cls(host, port)

    def connect(self) -> socket.socket:
        """A connection.  Raises :class:`OSError`; :class:`ValueError` for a host that is none."""
        if not self.path:
            return socket.create_connection((self.host, self.port), CONNECT)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(CONNECT)
            connection.connect(self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _see_that_it_is_a_host(host: str) -> None:
    """Raises :class:`ValueError` for what is no host to call: neither a name nor an address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        to_ascii(host)
        if host.endswith(".."):  # to_ascii takes away any number of them
            raise ValueError(f"{host!r} is no domain name") from None


class _Trouble(Exception):
    """The server cannot be reached, or the dialogue is broken.

    ``reply``  what our client hears.
    ``slow``   it did not answer in time.
    ``tls``    it broke in the TLS handshake.
    """

    def __init__(
        self, text: str, reply: Reply = BROKEN, *, slow: bool = False, tls: bool = False
    ) -> None:
        super().__init__(text)
        self.reply, self.slow, self.tls = reply, slow, tls


class _Message:
    """The content of a message; ``gone``: all of it but its end has been asked for."""

    def __init__(self, octets: Octets) -> None:
        self._octets = octets
        self.size, self.ascii = octets.size, octets.ascii
        self.gone = False

    def pieces(self) -> Iterator[bytes]:
        yield from self._octets.pieces()
        self.gone = True

    def beginning(self, octets: int) -> bytes:
        return self._octets.beginning(octets)


class _Dialogue:
    """One connection to the server."""

    def __init__(self, server: Server, hostname: str, lmtp: bool, tls: bool) -> None:
        self._server = server
        self._unread = b""
        self._events: list[Event] = []
        self.since = 0.0
        try:
            self._socket = server.connect()
        except _FAILURES as error:
            raise _Trouble(_reason(error), UNREACHABLE, slow=_is_late(error)) from None
        try:
            tls = tls and not self._is_near()
        except _FAILURES as error:  # it has hung up already
            self.close()
            raise _Trouble(_reason(error), UNREACHABLE) from None
        self._sender = Sender(hostname, starttls=tls, lmtp=lmtp, chunking=False)

    def _is_near(self) -> bool:
        """It is on this machine: no one listens in between."""
        if self._server.path:
            return True
        return ipaddress.ip_address(self._socket.getpeername()[0].partition("%")[0]).is_loopback

    def greet(self, until: float) -> None:
        """Everything before the first message.  Raises :class:`_Trouble`."""
        self._wait_for(Ready, until)

    def send(self, envelope: Envelope, message: _Message, until: float) -> Reply:
        """Hand a message on.  Returns what the server says; raises :class:`_Trouble`."""
        self._events += self._sender.send(Outgoing(None, envelope, message))
        sent = self._wait_for(Sent, until, message)
        assert isinstance(sent, Sent)
        return sent.replies[0]

    def rest(self) -> bool:
        """After a message: whether the server waits for another."""
        until = time.monotonic() + GOODBYE
        try:
            while not (self._sender.idle or self._sender.closed):  # after a refusal there is a RSET
                self._write(until)
                self._events += self._read(until)
        except _Trouble:
            return False
        return self.quiet

    @property
    def quiet(self) -> bool:
        """The server has not said anything, nor closed the connection."""
        waiting = self._unread or self._events or self._readable()
        return not (waiting or self._sender.closed)

    def quit(self) -> None:
        """Say goodbye, and close."""
        with contextlib.suppress(*_FAILURES):
            self._socket.settimeout(GOODBYE)
            self._socket.sendall(b"QUIT\r\n")
        with contextlib.suppress(OSError):
            self._socket.close()

    def close(self) -> None:
        """Close it without a word.  It is reset, so that no server, however lax, takes the part of
        a message that it has for a message."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        with contextlib.suppress(OSError):
            self._socket.close()

    def fileno(self) -> int:
        """Its descriptor; -1: it is closed."""
        return self._socket.fileno()

    # -- the loop -------------------------------------------------------------------------------

    def _wait_for(
        self, wanted: type[Event], until: float, message: _Message | None = None
    ) -> Event:
        while True:
            while self._events:
                event = self._events.pop(0)
                if isinstance(event, wanted):
                    return event
                self._take(event, until)
            self._write(until)
            whole = message is not None and message.gone
            self._events += self._read(until if whole else min(until, time.monotonic() + REPLY))

    def _take(self, event: Event, until: float) -> None:
        if isinstance(event, Broken):
            raise _Trouble(event.reason)
        if isinstance(event, BeginTls):
            self._begin_tls(until)
        elif isinstance(event, NotForwarded):
            text = "server=%s takes no XFORWARD from here: %s"
            log_safely(log, logging.INFO, text, str(self._server), str(event.reply))

    def _begin_tls(self, until: float) -> None:
        if self._unread or self._sender.pending:  # CVE-2011-0411
            raise _Trouble("more came with the answer to STARTTLS")
        try:
            self._set_timeout(min(until, time.monotonic() + REPLY))
            encrypted = _unverified().wrap_socket(
                self._socket,
                server_hostname=self._server.host.rstrip("."),
                do_handshake_on_connect=False,
            )
            self._socket = encrypted
            encrypted.do_handshake()
        except _FAILURES as error:
            raise _Trouble(f"TLS failed: {_reason(error)}", tls=True) from None
        self._sender.tls_started()
        self._events += self._sender.advance()

    def _write(self, until: float) -> None:
        """Write all that is to be said.  Where nothing has been asked, no answer may be here."""
        while pieces := self._sender.data_to_send():
            if self._unread or self._readable():
                raise _Trouble(f"it speaks out of turn{self._said()}")
            try:
                self._set_timeout(until)
                self._socket.sendall(b"".join(pieces))
            except _FAILURES as error:
                raise _Trouble(f"sending: {_reason(error)}", slow=_is_late(error)) from None

    def _said(self) -> str:
        """What came last, for the log."""
        if not self._unread:
            with contextlib.suppress(*_FAILURES):
                self._socket.settimeout(0)
                self._unread = self._socket.recv(READ)
        if not self._unread:
            return ", or has closed the connection"
        return f": {self._unread[:200].partition(bytes([10]))[0]!r}"

    def _read(self, until: float) -> list[Event]:
        """Take one line of what comes."""
        line, end, rest = self._unread.partition(b"\n")
        if not end:
            try:
                self._set_timeout(until)
                came = self._socket.recv(READ)
            except _FAILURES as error:
                late = _is_late(error)
                text = "it does not answer in time" if late else _reason(error)
                raise _Trouble(text, slow=late) from None
            if not came:
                raise _Trouble("it closed the connection")
            line, end, rest = came.partition(b"\n")
        self._unread = rest
        return self._sender.receive_bytes(line + end)

    def _set_timeout(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _readable(self) -> bool:
        """Something has come, or the connection is at its end."""
        try:
            if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
                return True
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            if not poll.poll(0):
                return False
            if isinstance(self._socket, ssl.SSLSocket):
                self._socket.settimeout(0)
                self._unread = self._socket.recv(READ)
            return True
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False  # it was TLS's own, such as the tickets that follow a handshake
        except _FAILURES:
            return True


def _is_late(error: Exception) -> bool:
    return isinstance(error, TimeoutError)


def _reason(error: Exception) -> str:
    if _is_late(error):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error)


class NextHop:
    """The server that mail is handed on to.  Safe to use from several threads.

    ``protocol``  ``"lmtp"`` or ``"smtp"``.
    ``hostname``  what we call ourselves; this machine's name if there is none.
    ``seconds``   that a handler has for a message.
    """

    def __init__(self, protocol: str, server: Server, hostname: str | None, seconds: float) -> None:
        self._protocol, self._server = protocol, server
        self._hostname = hostname
        self._seconds = PART * seconds
        self._kept: list[_Dialogue] = []
        self._lock = threading.Lock()
        self._closing: threading.Timer | None = None
        self._trouble = ""
        self._silent_until = 0.0
        self._asked_again = 0.0
        self._clear_until = 0.0
        # All that are open, in use or kept.
        self._dialogues: weakref.WeakSet[_Dialogue] = weakref.WeakSet()
        self._descriptors = contextlib.ExitStack()
        self._descriptors.enter_context(ours_alone(self._open_descriptors))
        self._process = os.getpid()
        atexit.register(self._leave)

    def hand_on(self, envelope: Envelope, content: bytes) -> Reply:
        """Hand a message for one recipient on.  Returns the server's reply, or a 451 of ours."""
        octets = Octets(content)
        if octets.hides_an_end:
            return Reply(554, "a line of the message is a dot hidden by NULs", "5.6.0")
        if time.monotonic() < self._asked_again:
            return UNREACHABLE
        until = time.monotonic() + self._seconds
        try:
            reply = self._handed_on(envelope, octets, until)
        except _Trouble as trouble:
            self._in_trouble(trouble)
            return trouble.reply
        except _FAILURES as error:  # whatever else a server can cause, it has not said 250
            self._in_trouble(_Trouble(_reason(error), slow=_is_late(error)))
            return BROKEN
        return self._ours(reply)

    def try_it(self) -> str:
        """Connect, greet and say goodbye, as when there is mail.  Returns what came of it; raises
        :class:`OSError` with a sentence for a person where the server would take none."""
        try:
            self._new(time.monotonic() + TRY).quit()
        except _Trouble as trouble:
            raise OSError(f"{self} {trouble}") from None
        except _FAILURES as error:
            raise OSError(f"{self} {_reason(error)}") from None
        return f"{self} answers"

    def _handed_on(self, envelope: Envelope, octets: Octets, until: float) -> Reply:
        if (kept := self._take_kept()) is not None:
            message = _Message(octets)
            try:
                return self._over(kept, envelope, message, until)
            except _Trouble as trouble:
                if message.gone or trouble.slow:
                    raise
        dialogue = self._new(until)
        return self._over(dialogue, envelope, _Message(octets), until)

    def _new(self, until: float) -> _Dialogue:
        """A connection on which the server waits for mail.  Raises :class:`_Trouble`."""
        try:
            return self._greeted(until, time.monotonic() >= self._clear_until)
        except _Trouble as trouble:
            if not trouble.tls:
                raise
            # RFC 7435 5: without TLS is better than not at all.
            log_safely(log, logging.WARNING, "%s %s; calling again in the clear", self, trouble)
            self._clear_until = time.monotonic() + CLEAR
            return self._greeted(until, False)

    def _greeted(self, until: float, tls: bool) -> _Dialogue:
        if self._hostname is None:
            self._hostname = machine_name()
        lmtp = self._protocol == "lmtp"
        dialogue = _Dialogue(self._server, self._hostname, lmtp, tls)
        self._dialogues.add(dialogue)
        try:
            dialogue.greet(until)
        except BaseException:
            dialogue.close()
            raise
        return dialogue

    def _over(
        self, dialogue: _Dialogue, envelope: Envelope, message: _Message, until: float
    ) -> Reply:
        try:
            reply = dialogue.send(envelope, message, until)
        except BaseException:
            dialogue.close()
            raise
        self._keep(dialogue)
        return reply

    def _ours(self, reply: Reply) -> Reply:
        """The server's reply as ours."""
        if not is_about_mail(reply, WRONG_SETTING):
            self._in_trouble(_Trouble(f"it answers {reply}"))
            return NOT_US
        if self._trouble:
            self._trouble, self._silent_until = "", 0.0
            log_safely(log, logging.INFO, "%s takes mail again", self)
        return reply

    def _in_trouble(self, trouble: _Trouble) -> None:
        """Say so once for each trouble, not for each message."""
        now, text = time.monotonic(), str(trouble)
        if trouble.slow:
            self._asked_again = now + PAUSE
        if text != self._trouble and now >= self._silent_until:
            line = "%s %s; mail for it is answered with 451, and its senders keep it"
            log_safely(log, logging.ERROR, line, self, trouble)
            # A server may say something else each time.
            self._trouble, self._silent_until = text, now + SILENCE

    def __str__(self) -> str:
        return f"{self._protocol}_server={self._server}"

    # -- connections that are kept ----------------------------------------------------------------

    def _take_kept(self) -> _Dialogue | None:
        """The one that was used last; the others are for other threads, or become idle."""
        while True:
            with self._lock:
                if not self._kept:
                    return None
                latest = self._kept.pop()
            if latest.quiet:
                return latest
            latest.close()

    def _keep(self, dialogue: _Dialogue) -> None:
        """Keep a connection open if it can be kept.  Never raises: the server has answered."""
        try:
            rests = dialogue.rest()
        except _FAILURES:
            rests = False
        if not rests:
            dialogue.close()
            return
        dialogue.since = time.monotonic()
        with self._lock:
            if kept := self._arm():
                self._kept.append(dialogue)
        if not kept:
            dialogue.quit()

    def _arm(self) -> bool:
        """Have what is idle closed later; ``False``: the machine has no thread to spare."""
        if self._closing is None:
            closing = threading.Timer(IDLE, self._close_idle)
            closing.daemon = True
            try:
                closing.start()
            except RuntimeError:
                return False
            self._closing = closing
        return True

    def _close_idle(self) -> None:
        now = time.monotonic()
        with self._lock:
            self._closing = None
            idle = [one for one in self._kept if one.since + IDLE <= now]
            self._kept = [one for one in self._kept if one not in idle]
            if self._kept and not self._arm():
                idle, self._kept = idle + self._kept, []
        for one in idle:
            one.quit()

    def _leave(self) -> None:
        """Our process ends."""
        if os.getpid() != self._process:
            return  # in a handler's child they are closed, and their numbers may be other files
        with self._lock:
            kept, self._kept = self._kept, []
        for one in kept:
            one.quit()

    def _open_descriptors(self) -> list[int]:
        return [one.fileno() for one in self._dialogues if one.fileno() >= 0]


@functools.cache
def next_hop(protocol: str, server: Server, hostname: str | None, seconds: float) -> NextHop:
    """The one for these settings, however often a handler is imported again."""
    return NextHop(protocol, server, hostname, seconds)


@functools.cache
def _unverified() -> ssl.SSLContext:
    """RFC 7435: encrypted is better than not, whoever is at the other end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
