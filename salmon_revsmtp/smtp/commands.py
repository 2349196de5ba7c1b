"""The server's side of SMTP commands, without I/O: what every server role has in common (RFC 5321).

Two machines are built on this: ``receiver``, which takes mail, and ``turn``, the provider before
the reversal.  Here are, once, for both: the line reader with its limits, the counting of errors and
of commands that bring nothing, EHLO, HELO, STARTTLS, NOOP, RSET, HELP and QUIT, and the end of a
session.

How a machine works.  A session is in one of the states of :class:`State`.  The table ``VERBS`` of
its class has a row for each command: the states in which it may come, with the state that each
leads to; whether it is junk, that is, brings no one forward; and the method that carries it out.
That method returns a reply or ``None``, or raises :class:`CommandError`.  A command that is refused
leads nowhere.  The table ``ENDS`` has what else leads on: the end of content, of a handshake, of an
exchange.  No state is entered that is not in one of the two; the docs draw them.

The table ``READERS`` has, for each state, the method that takes bytes in it: most take a line, some
take content.  A reader consumes what it can of the input buffer and says whether it got anywhere;
the loop in ``advance`` is all the control flow there is.

Only CRLF ends a command: a bare CR or LF is an error (RFC 5321 2.3.8).  Memory is bounded by
:class:`~salmon_revsmtp.smtp.limits.Limits`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar

from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.replies import Reply

__all__ = [
    "NOT_IMPLEMENTED",
    "OK",
    "SEQUENCE",
    "SYNTAX",
    "CommandError",
    "Commands",
    "Quit",
    "StartTls",
    "State",
    "Verb",
    "stay",
    "to",
]


class State(Enum):
    """Where a session is.  The first four are every machine's; the next are the receiver's (RFC
    5321 4.1.4, RFC 3030 3, RFC 1985), the last the provider's before the reversal (RFC 4954, RFC
    2645)."""

    CONNECTED = auto()  #: greeted by us, no EHLO or HELO yet
    IDLE = auto()  #: between transactions
    HANDSHAKE = auto()  #: after STARTTLS: bytes wait until the caller has done the handshake
    CLOSED = auto()  #: after QUIT or 421: bytes are ignored

    MAIL = auto()  #: a sender, no accepted recipient
    RCPT = auto()  #: a sender and recipients
    DATA = auto()  #: bytes are content up to CRLF.CRLF
    CHUNK = auto()  #: bytes are content, as many as BDAT said
    CHUNKS = auto()  #: at least one BDAT taken, LAST not yet
    STARTING = auto()  #: after ETRN: bytes wait until the caller has answered it

    LOGIN = auto()  #: lines are responses of an AUTH exchange
    ASKING = auto()  #: within AUTH: bytes wait until the caller has looked a name up
    SLOWED = auto()  #: a login failed: bytes wait until the caller has the client hear of it
    CUSTOMER = auto()  #: logged in
    TURNING = auto()  #: after ATRN: bytes wait until the caller has answered it

    # Enum's own is slow, and every command goes by a look into tables of states.
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Quit:
    """The session is over by QUIT (``reply`` 221) or because the client was sent away (421)."""

    reply: Reply


@dataclass(frozen=True)
class StartTls:
    """The client was told to begin the TLS handshake: send the reply, see that nothing is
    ``pending``, do the handshake, call :meth:`Commands.tls_started`."""


@dataclass(frozen=True)
class Verb:
    """A row of the table of commands.

    ``leads``  the states in which it may come -> the state in which it leaves the session.
    ``run``    carries it out: argument in, reply out, ``None`` if there is none (yet).
    ``junk``   it brings no one forward.  What answers it may be cheap, but not for ever.
    """

    leads: Mapping[State, State]
    run: Callable[[Any, str], Reply | None]
    junk: bool = False


def stay(states: Iterable[State]) -> Mapping[State, State]:
    """Each of these states leads to itself."""
    return {state: state for state in states}


def to(target: State, states: Iterable[State]) -> Mapping[State, State]:
    """Each of these states leads to ``target``."""
    return dict.fromkeys(states, target)


class CommandError(Exception):
    """A command's own refusal; ends in its reply and counts as an error of the client."""

    def __init__(self, code: int, text: str, enhanced: str | None = None) -> None:
        self.reply = Reply(code, text, enhanced)
        super().__init__(str(self.reply))


OK = Reply(250, "ok", "2.0.0")
SYNTAX = "5.5.4"
SEQUENCE = "5.5.1"

# What SMTP and its extensions know and a machine may not do: 502 and not 500 (RFC 5321 4.2.4).
_KNOWN = frozenset({"ATRN", "AUTH", "BDAT", "DATA", "ETRN", "EXPN", "MAIL", "RCPT", "TURN", "VRFY"})
NOT_IMPLEMENTED = (502, "command not implemented", SEQUENCE)

# Before EHLO, what begins like this comes from a client of something else: a browser that was given
# a form with SMTP commands in it, or TLS where it was not asked for (RFC 8446 5.1: a handshake
# record).  Not a line of it may be taken for SMTP.
_FOREIGN: Sequence[tuple[re.Pattern[bytes], str]] = (
    (re.compile(rb"(?:GET|HEAD|POST|PUT|PATCH|DELETE|CONNECT|OPTIONS|TRACE|PRI) "), "HTTP"),
    (re.compile(rb"\x16\x03"), "TLS"),
)

_COMMAND = re.compile(r"([A-Za-z]{4,8})(?: +(.*))?")
_UNPRINTABLE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class Commands:
    """One SMTP session in a server role, as far as roles do not differ.

    ``hostname``  what the greeting and EHLO name.
    ``limits``    what a session may cost.
    ``starttls``  offer STARTTLS (RFC 3207).

    ``answers``  whatever comes is answered, so nothing should be read while that is not.
    ``secret``   what comes may be a password.

    For the caller's clock: ``steps`` counts the commands, chunks and messages that became whole,
    ``content_octets`` the octets of content that came.
    """

    answers: ClassVar[bool] = True
    secret: ClassVar[bool] = False

    VERBS: ClassVar[Mapping[str, Verb]]
    #: What a command hears that is in no table: code, text, enhanced status code.
    UNKNOWN: ClassVar[tuple[int, str, str]] = (500, "command not recognized", "5.5.2")
    READERS: ClassVar[Mapping[State, Callable[[Any], bool]]]
    #: What ends -> where that leads from each state.
    ENDS: ClassVar[Mapping[str, Mapping[State, State]]] = {
        "the TLS handshake": {State.HANDSHAKE: State.CONNECTED},
    }
    #: What a command that comes in a state in which it may not hears.
    OUT_OF_ORDER: ClassVar[Mapping[State, str]]
    #: In these states a message is in hand, or nothing is: no 421 at a shutdown.
    NO_BOUNDARY: ClassVar[frozenset[State]]

    def __init__(self, hostname: str, limits: Limits, greeting: str, *, starttls: bool) -> None:
        self.hostname = hostname
        self.limits = limits
        self.steps = 0
        self.content_octets = 0
        self._state = State.CONNECTED
        self._starttls = starttls
        self._shutting_down: Reply | None = None
        self._buffer = bytearray()
        self._skipping = False  # what comes is the rest of a line that is too long
        self._ready = bytearray()
        self._events: list[Any] = []
        self._errors = 0
        self._junk = 0  # since anything was brought forward
        self._helo = ""
        self._esmtp = False
        self._reply(Reply(220, greeting, ""))

    # -- what the caller sees ---------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Enough waits for the caller: stop reading (bytes that come all the same are kept)."""
        return False

    @property
    def streaming(self) -> bool:
        """What a server says is said at once."""
        return False

    @property
    def closed(self) -> bool:
        """The session is over and every reply is in :meth:`data_to_send`: close the connection."""
        return self._state is State.CLOSED

    @property
    def pending(self) -> bool:
        """Bytes came that have not been looked at.  Before a TLS handshake that is an attack: what
        was said in the clear must not be taken for said under TLS (CVE-2011-0411)."""
        return bool(self._buffer)

    def data_to_send(self) -> bytes:
        """The reply bytes that may go out now; each is returned once."""
        data = bytes(self._ready)
        self._ready.clear()
        return data

    def receive_bytes(self, data: bytes) -> list[Any]:
        """Take what came from the client; returns what happened, in order.  Never raises on any
        bytes."""
        if self._state is not State.CLOSED:
            self._buffer += data
        return self.advance()

    def advance(self) -> list[Any]:
        """Go on with what has come, as far as that can be; returns what happened, in order.  Call
        it after anything that may have ended a pause."""
        while self._buffer and not self.paused and self.READERS[self._state](self):
            if self._shutting_down is not None:
                self._end_if_shutting_down()
        events, self._events = self._events, []
        return events

    def tls_started(self) -> None:
        """The handshake is done: what was said before is forgotten (RFC 3207 4.2)."""
        self._starttls = False
        self._helo, self._esmtp = "", False
        if self._state is not State.CLOSED:
            self._over("the TLS handshake")

    def shut_down(self) -> None:
        """End the session at the next message boundary: a message whose data is coming is taken
        and answered, anything else hears 421 (RFC 5321 3.8)."""
        self._shutting_down = Reply(421, f"{self.hostname} is shutting down", "4.3.2")
        self._end_if_shutting_down()

    def refuse_session(self, reply: Reply) -> None:
        """Say this instead of the greeting, and no more (RFC 5321 3.1)."""
        self._ready.clear()
        self._state = State.CLOSED
        self._reply(reply)

    def forgive(self) -> None:
        """A while has passed: unproductive commands do not count as in a row with those before."""
        self._junk = 0

    def send_away(self, reply: Reply) -> None:
        """End the session with this 421 now, whatever is under way (RFC 5321 3.8).  A message that
        is not whole was never answered, and stays with the client."""
        if self._state is not State.CLOSED:
            self._close(reply)

    # -- replies ------------------------------------------------------------------------------

    def _reply(self, reply: Reply) -> None:
        self._ready += reply.encode()

    def _over(self, what: str) -> None:
        """Something has ended: see ``ENDS``."""
        self._state = self.ENDS[what][self._state]

    def _close(self, reply: Reply) -> None:
        self._state = State.CLOSED
        self._buffer.clear()
        self._reply(reply)
        self._events.append(Quit(reply))

    def _end_if_shutting_down(self) -> None:
        if self._shutting_down is not None and self._state not in self.NO_BOUNDARY:
            self._close(self._shutting_down)

    def _refuse_command(self, reply: Reply) -> None:
        self._errors += 1
        if self._errors < self.limits.errors:
            self._reply(reply)
        else:
            # RFC 5321 3.8: a server may close after 421.
            self._close(Reply(421, f"{self.hostname} too many errors, closing", "4.7.0"))

    def _unproductive(self, reply: Reply | None) -> Reply | None:
        """``reply``, unless there was enough of this."""
        self._junk += 1
        if self._junk <= self.limits.junk or reply is None:
            return reply
        self._close(Reply(421, "too many unproductive commands, closing", "4.7.0"))
        return None

    # -- lines ----------------------------------------------------------------------------------

    def _read_line(self) -> bool:
        """The next line is a command."""
        if self._state is State.CONNECTED and not self._skipping and self._is_foreign():
            return False
        line = self._next_line(self.limits.command_line)
        if line is None:
            return False
        self.steps += 1
        if isinstance(line, Reply):
            self._wrong("", line)
        else:
            self._command(line)
        return True

    def _next_line(self, limit: int) -> bytes | Reply | None:
        """A line without its CRLF; the reply to one that had more than ``limit`` octets; ``None``
        until more comes."""
        if not self._skipping:
            end = self._buffer.find(b"\r\n", 0, limit)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 2]
                return line
            if len(self._buffer) < limit:
                return None
            self._skipping = True
        end = self._buffer.find(b"\r\n")
        if end < 0:
            del self._buffer[:-1]  # the last octet may be the CR of the CRLF
            return None
        del self._buffer[: end + 2]
        self._skipping = False
        return self._too_long()

    def _too_long(self) -> Reply:
        return Reply(500, "line too long", "5.5.2")

    def _is_foreign(self) -> bool:
        """The client speaks something else, and was sent away."""
        for beginning, name in _FOREIGN:
            if beginning.match(self._buffer):
                self._close(Reply(421, f"this is SMTP and not {name}, closing", "4.7.0"))
                return True
        return False

    def _read_nothing(self) -> bool:
        """What comes waits."""
        return False

    def _ignore(self) -> bool:
        self._buffer.clear()
        return False

    # -- commands ---------------------------------------------------------------------------

    def _command(self, line: bytes) -> None:
        name = ""
        try:
            name, argument = _split(line)
            verb = self.VERBS.get(name)
            if verb is None:
                raise CommandError(*(NOT_IMPLEMENTED if name in _KNOWN else self.UNKNOWN))
            then = verb.leads.get(self._state)
            if then is None:
                raise CommandError(503, self.OUT_OF_ORDER[self._state], SEQUENCE)
            reply = verb.run(self, argument)
        except CommandError as error:
            self._wrong(name, error.reply)
            return
        if verb.junk:
            reply = self._unproductive(reply)
        if reply is not None:
            if reply.code < 400:
                self._state = then
            self._reply(reply)

    def _wrong(self, name: str, reply: Reply) -> None:
        """A command that its client should not have sent, or not so."""
        self._refuse_command(reply)

    def _keywords(self) -> Iterable[str]:
        """What EHLO lists."""
        return ("STARTTLS",) if self._starttls else ()

    def _on_ehlo(self, argument: str) -> Reply:
        self._greet(argument, esmtp=True)
        return Reply(250, "\n".join((self.hostname, *self._keywords())), "")

    def _on_helo(self, argument: str) -> Reply:
        self._greet(argument, esmtp=False)
        return Reply(250, self.hostname, "")

    def _greet(self, argument: str, *, esmtp: bool) -> None:
        if not argument or " " in argument:
            raise CommandError(501, "EHLO and HELO take one host name", SYNTAX)
        self._helo, self._esmtp = argument, esmtp

    def _on_starttls(self, argument: str) -> Reply | None:
        if not self._starttls:
            raise CommandError(*NOT_IMPLEMENTED)
        if argument:
            raise CommandError(501, "STARTTLS takes no argument", SYNTAX)
        if self.pending:
            self._close(Reply(421, "unexpected data after STARTTLS, closing", "4.7.0"))
            return None
        self._events.append(StartTls())
        return Reply(220, "go ahead", "")

    def _on_rset(self, argument: str) -> Reply:
        if argument:
            raise CommandError(501, "RSET takes no argument", SYNTAX)
        return OK

    def _on_noop(self, argument: str) -> Reply:
        return OK

    def _on_help(self, argument: str) -> Reply:
        return Reply(214, "commands: " + " ".join(self.VERBS), "2.0.0")

    def _on_quit(self, argument: str) -> None:
        if argument:
            raise CommandError(501, "QUIT takes no argument", SYNTAX)
        self._close(Reply(221, f"{self.hostname} closing", "2.0.0"))


def _split(line: bytes) -> tuple[str, str]:
    """A command line without its CRLF -> verb in upper case, argument."""
    if _UNPRINTABLE.search(line):
        raise CommandError(500, "control characters in a command; only CRLF ends a line", "5.5.2")
    try:
        text = line.decode("utf-8").replace("\t", " ").rstrip(" ")
    except UnicodeDecodeError:
        raise CommandError(500, "a command is ASCII, or UTF-8", "5.5.2") from None
    found = _COMMAND.fullmatch(text)
    if not found:
        raise CommandError(500, "command not recognized", "5.5.2")
    return found[1].upper(), found[2] or ""
