"""The server role of SMTP, without I/O (RFC 5321).

How it is used.  The caller owns the connection and the time; the machine owns the protocol::

    receiver = Receiver("mail.example.org", Limits(), accept_recipient)
    send(receiver.data_to_send())                      # the 220 greeting
    for event in receiver.receive_bytes(data):         # as often as bytes come
        if isinstance(event, Transaction):             # one whole message
            ...                                        # deliver it, at leisure
            receiver.answer(event, reply)              # only now does the client hear 250
    send(receiver.data_to_send())

How it works.  A session is in one of the states of :class:`State`.  In three of them bytes are
content (``DATA``, ``CHUNK``) or thrown away (``LONG_LINE``); in the others they are lines.  Each
state that takes bytes has one method in ``_READERS``, which consumes what it can of the input
buffer and says whether it got anywhere; the loop in ``_run`` is all the control flow there is.
Each command has one method ``_on_<verb>``, which returns a reply and may set the next state;
``_EXPECTED`` says in which states the verb may come, and with which reply it is sent away
elsewhere.

Replies go out in the order of the commands (RFC 2920 3.1), although a transaction is answered by
the caller when it pleases: reading goes on behind an unanswered transaction, and the replies to
what was read wait in ``_waiting`` behind its place.  ``paused`` says when the caller should stop
reading until something is answered.

What is content?  Only CRLF.CRLF ends DATA (RFC 5321 4.1.1.4) and only CRLF ends a command: with
any laxer rule a line end that the previous hop took for text ends a message here, and what comes
after it is another message that nobody sent (CVE-2023-51764 and its kin).  A bare CR or LF in
content stays where it is; in a command it is an error.  After BDAT come exactly as many octets as
it said, also when the command is refused (RFC 3030 4.2).

What it costs.  Content is searched and cut in blocks; each octet is copied into the input buffer,
into the message, and out of it, whatever the pieces it came in.  Memory is bounded by
:class:`~salmon_revsmtp.smtp.limits.Limits`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from salmon_revsmtp.smtp.addresses import AddressError, parse_path
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Event", "Quit", "Receiver", "Refused", "StartTls", "Transaction"]


class State(Enum):
    """Where a session is (RFC 5321 4.1.4, RFC 3030 3)."""

    CONNECTED = auto()  #: greeted by us, no EHLO or HELO yet
    IDLE = auto()  #: between transactions
    MAIL = auto()  #: a sender, no accepted recipient
    RCPT = auto()  #: a sender and recipients
    CHUNKS = auto()  #: at least one BDAT taken, LAST not yet
    DATA = auto()  #: bytes are content up to CRLF.CRLF
    CHUNK = auto()  #: bytes are content, as many as BDAT said
    LONG_LINE = auto()  #: bytes are the rest of a command that is too long
    HANDSHAKE = auto()  #: after STARTTLS: bytes wait until the caller has done the handshake
    CLOSED = auto()  #: after QUIT or 421: bytes are ignored

    # Enum's own is slow, and every command goes by a look into tables of states.
    __hash__ = object.__hash__


@dataclass(frozen=True, eq=False)
class Transaction:
    """A whole message; the client waits for :meth:`Receiver.answer`.

    ``envelope``  its accepted sender and recipients.
    ``data``      its octets as the client meant them: dots unstuffed, line ends as they came
                  (CRLF, and bare CR or LF where there were any).
    """

    envelope: Envelope
    data: bytes


@dataclass(frozen=True)
class Refused:
    """A sender, recipient or message was refused; the client has the reply already.

    ``recipients`` whom it concerned; empty for a MAIL.
    """

    recipients: tuple[str, ...]
    reply: Reply


@dataclass(frozen=True)
class Quit:
    """The session is over by QUIT (``reply`` 221) or because the client was sent away (421)."""

    reply: Reply


@dataclass(frozen=True)
class StartTls:
    """The client was told to begin the TLS handshake: send the reply, see that nothing is
    ``pending``, do the handshake, call :meth:`Receiver.tls_started`."""


Event = Transaction | Refused | StartTls | Quit


@dataclass
class _Slot:
    """A place in the order of replies: ``data`` once it is known."""

    transaction: Transaction | None = None
    data: bytearray = field(default_factory=bytearray)


OK = Reply(250, "ok", "2.0.0")
SENDER_OK = Reply(250, "sender ok", "2.1.0")
RECIPIENT_OK = Reply(250, "recipient ok", "2.1.5")
CHUNK_OK = Reply(250, "chunk ok", "2.0.0")
SYNTAX = "5.5.4"
SEQUENCE = "5.5.1"

_ANYWHERE = frozenset(
    {State.CONNECTED, State.IDLE, State.MAIL, State.RCPT, State.CHUNKS},
)
_GREETED = _ANYWHERE - {State.CONNECTED}
# A message is in hand, or nothing is.
_NO_BOUNDARY = frozenset({State.DATA, State.CHUNK, State.CHUNKS, State.CLOSED})

# verb -> the states in which it may come.  RFC 5321 4.1.4; RFC 3030 3 for BDAT.
_EXPECTED: Mapping[str, frozenset[State]] = {
    "EHLO": _ANYWHERE,
    "HELO": _ANYWHERE,
    "MAIL": frozenset({State.IDLE}),
    "RCPT": frozenset({State.MAIL, State.RCPT}),
    "DATA": frozenset({State.MAIL, State.RCPT}),
    "BDAT": _ANYWHERE,  # its octets come whether or not it is expected
    "RSET": _ANYWHERE,
    "NOOP": _ANYWHERE,
    "VRFY": _GREETED,
    "HELP": _ANYWHERE,
    "QUIT": _ANYWHERE,
    "STARTTLS": frozenset({State.IDLE}),  # RFC 3207 4 allows more; nobody needs it
}

# Commands that bring nobody forward.  What answers them may be cheap, but not for ever.
_JUNK = frozenset({"EHLO", "HELO", "RSET", "NOOP", "VRFY", "HELP"})

# Before EHLO, what begins like this comes from a client of something else: a browser that somebody
# has given a form with SMTP commands in it, or TLS where it was not asked for (RFC 8446 5.1: a
# handshake record).  Not a line of it may be taken for SMTP.
_FOREIGN: Sequence[tuple[re.Pattern[bytes], str]] = (
    (re.compile(rb"(?:GET|HEAD|POST|PUT|PATCH|DELETE|CONNECT|OPTIONS|TRACE|PRI) "), "HTTP"),
    (re.compile(rb"\x16\x03"), "TLS"),
)

# What RFC 5321 and its extensions know and we do not do: 502 and not 500 (RFC 5321 4.2.4).
_NOT_IMPLEMENTED = frozenset({"EXPN", "TURN", "ATRN", "ETRN", "AUTH"})
_NOT_IMPLEMENTED_REPLY = Reply(502, "command not implemented", SEQUENCE)

_OUT_OF_ORDER: Mapping[State, Reply] = {
    State.CONNECTED: Reply(503, "send EHLO first", SEQUENCE),
    State.IDLE: Reply(503, "send MAIL first", SEQUENCE),
    State.MAIL: Reply(503, "a transaction is under way, send RCPT or RSET", SEQUENCE),
    State.RCPT: Reply(503, "a transaction is under way, send the data or RSET", SEQUENCE),
    State.CHUNKS: Reply(503, "more BDAT is expected, or RSET", SEQUENCE),
}

_COMMAND = re.compile(r"([A-Za-z]{4,8})(?: +(.*))?")
_UNPRINTABLE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
# A letter that is another's other case by Unicode only ("\u017f" is an "s") is not it in SMTP.
_ANY_CASE = re.IGNORECASE | re.ASCII
_BDAT = re.compile(r"([0-9]{1,20})( +LAST)?", _ANY_CASE)
# RFC 5321 4.1.2 esmtp-param, with RFC 6531's UTF-8 values.
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([^\x00-\x20=\x7f]+))?")
_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*")

# RFC 5321 4.5.3.1, 1870, 6152, 6531, draft-hall-prdr, 3461: what a value may look like.
_MAIL_PARAMETERS: Mapping[str, re.Pattern[str]] = {
    "SIZE": re.compile(r"[0-9]{1,20}"),
    "BODY": re.compile(r"7BIT|8BITMIME", _ANY_CASE),
    "SMTPUTF8": re.compile(""),
    "PRDR": re.compile(""),
    "RET": re.compile(r"FULL|HDRS", _ANY_CASE),
    "ENVID": re.compile(rf"(?=.{{1,100}}$){_XTEXT.pattern}"),
}
_NOTIFY = r"(?:SUCCESS|FAILURE|DELAY)"
_RCPT_PARAMETERS: Mapping[str, re.Pattern[str]] = {
    "NOTIFY": re.compile(rf"NEVER|{_NOTIFY}(?:,{_NOTIFY}){{0,2}}", _ANY_CASE),
    "ORCPT": re.compile(r"[A-Za-z0-9-]+;[^\x00-\x20=\x7f]{1,500}"),
}

_END_OF_DATA = b"\r\n.\r\n"
_TOO_LONG = Reply(500, "line too long", "5.5.2")
_NO_RECIPIENTS = Reply(554, "no valid recipients", SEQUENCE)
_BAD_OCTETS = Reply(500, "control characters in a command; only CRLF ends a line", "5.5.2")


class _CommandError(Exception):
    """A command's own refusal; ends in its reply and counts as an error of the client."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class Receiver:
    """One SMTP session in the server role.

    ``hostname``          what the greeting and EHLO name.
    ``limits``            what a session may cost.
    ``starttls``          offer STARTTLS (RFC 3207).
    ``accept_recipient``  asked for every RCPT, with the mailbox: ``None`` to accept it, or the
                          :class:`Reply` that refuses it.  It must not block.

    ``ahead``: the whole messages that are read ahead.  The caller may make it less than the limits
    have, where messages are delivered slowly.

    For the caller's clock: ``steps`` counts the commands, chunks and messages that became whole,
    ``content_octets`` the octets of content that came.
    """

    def __init__(
        self,
        hostname: str,
        limits: Limits | None = None,
        accept_recipient: Callable[[str], Reply | None] = lambda mailbox: None,
        *,
        starttls: bool = False,
    ) -> None:
        self.hostname = hostname
        self.limits = limits or Limits()
        self.ahead = self.limits.unanswered_messages
        self._accept_recipient = accept_recipient
        self._starttls = starttls
        self._shutting_down: Reply | None = None

        self._state = State.CONNECTED
        self._buffer = bytearray()
        self._ready = bytearray()
        self._waiting: deque[_Slot] = deque()
        self._events: list[Event] = []
        self._errors = 0
        self.steps = 0
        self.content_octets = 0
        self._junk = 0  # commands that brought nothing, since anything was brought forward
        self._refusals = 0  # since a message was taken
        self._unanswered_messages = 0
        self._unanswered_octets = 0

        self._helo = ""
        self._esmtp = False
        self._reset()
        self._reply(Reply(220, f"{hostname} ESMTP", ""))

    def _reset(self) -> None:
        """Forget the transaction (RFC 5321 4.1.1.5)."""
        self._sender = ""
        self._recipients: list[str] = []
        self._mail_options: dict[str, str] = {}
        self._rcpt_options: dict[str, dict[str, str]] = {}
        self._content = bytearray()
        self._size = 0  # octets of content that came, also those that were thrown away
        self._chunk_octets = self._chunk_left = 0
        self._last_chunk = False
        self._chunk_refusal: Reply | None = None
        self._chunks = 0
        if self._state is not State.CONNECTED:
            self._state = State.IDLE

    # -- what the caller sees ---------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Enough is unanswered: stop reading until :meth:`answer` (bytes that come all the same
        are kept)."""
        return (
            self._unanswered_messages >= self.ahead
            or self._unanswered_octets > self.limits.unanswered_octets
        )

    @property
    def closed(self) -> bool:
        """The session is over and every reply is in :meth:`data_to_send`: close the connection."""
        return self._state is State.CLOSED and not self._waiting

    @property
    def in_transaction(self) -> bool:
        """Between an accepted MAIL and the end of its message."""
        return self._state not in (State.CONNECTED, State.IDLE, State.CLOSED)

    @property
    def pending(self) -> bool:
        """Bytes came that nobody has looked at.  Before a TLS handshake that is an attack: what was
        said in the clear must not be taken for said under TLS (CVE-2011-0411)."""
        return bool(self._buffer)

    def tls_started(self) -> list[Event]:
        """The handshake is done: what was said before is forgotten (RFC 3207 4.2).  Returns the
        events of what the client has said since."""
        self._starttls = False
        self._helo, self._esmtp = "", False
        if self._state is not State.CLOSED:
            self._state = State.CONNECTED
        return self._run()

    def shut_down(self) -> list[Event]:
        """End the session at the next message boundary: a message whose data is coming is taken
        and answered, anything else hears 421 (RFC 5321 3.8)."""
        self._shutting_down = Reply(421, f"{self.hostname} is shutting down", "4.3.2")
        self._end_if_shutting_down()
        return self._run()

    def data_to_send(self) -> bytes:
        """The reply bytes that may go out now; each is returned once."""
        data = bytes(self._ready)
        self._ready.clear()
        return data

    def receive_bytes(self, data: bytes) -> list[Event]:
        """Take what came from the client; returns what happened, in order.  Never raises on any
        bytes."""
        if self._state is not State.CLOSED:
            self._buffer += data
        return self._run()

    def answer(
        self, transaction: Transaction, reply: Reply, each: Sequence[Reply] = ()
    ) -> list[Event]:
        """Answer a transaction; returns the events of what was held back by ``paused``.

        ``each`` is one reply per recipient, in order, and is sent when the client asked for that
        (PRDR): ``353``, each, then ``reply`` (draft-hall-prdr 3).  Raises :class:`KeyError` for a
        transaction that has been answered, or is not of this session.
        """
        slot = next((slot for slot in self._waiting if slot.transaction is transaction), None)
        if slot is None:
            raise KeyError("this transaction has its answer already, or is of another session")
        replies = [reply]
        if transaction.envelope.prdr and each:
            replies = [Reply(353, "one reply per recipient follows"), *each, reply]
        answer = b"".join(one.encode() for one in replies)
        slot.data[:0] = answer
        slot.transaction = None
        self._unanswered_messages -= 1
        self._unanswered_octets += len(answer) - len(transaction.data)
        while self._waiting and self._waiting[0].transaction is None:
            data = self._waiting.popleft().data
            self._unanswered_octets -= len(data)
            self._ready += data
        return self._run()

    # -- the loop -----------------------------------------------------------------------------

    def _run(self) -> list[Event]:
        while self._buffer and not self.paused and self._READERS[self._state](self):
            self._end_if_shutting_down()
        events, self._events = self._events, []
        return events

    def _end_if_shutting_down(self) -> None:
        if self._shutting_down is not None and self._state not in _NO_BOUNDARY:
            self._close(self._shutting_down)

    def _reply(self, reply: Reply) -> None:
        data = reply.encode()
        if self._waiting:
            self._waiting[-1].data += data
            self._unanswered_octets += len(data)
        else:
            self._ready += data

    # -- readers: one per kind of state; True if they consumed anything ---------------------

    def _read_command(self) -> bool:
        if self._state is State.CONNECTED and self._is_foreign():
            return False
        limit = self.limits.command_line
        end = self._buffer.find(b"\r\n", 0, limit)
        if end < 0:
            if len(self._buffer) < limit:
                return False
            self._long_line_from = self._state
            self._state = State.LONG_LINE
            return True
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        self._command(line)
        return True

    def _is_foreign(self) -> bool:
        """The client speaks something else, and was sent away."""
        for beginning, name in _FOREIGN:
            if beginning.match(self._buffer):
                self._close(Reply(421, f"this is SMTP and not {name}, closing", "4.7.0"))
                return True
        return False

    def _read_long_line(self) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            del self._buffer[:-1]  # the last octet may be the CR of the CRLF
            return False
        del self._buffer[: end + 2]
        self._state = self._long_line_from
        self.steps += 1
        self._refuse_command(_TOO_LONG)
        return True

    def _read_data(self) -> bool:
        # Search from where an end of data may begin in what was there before.
        old = len(self._content)
        self.content_octets += len(self._buffer)
        self._content += self._buffer
        self._buffer.clear()
        end = self._content.find(_END_OF_DATA, max(0, old - 4))
        if end < 0:
            self._size += len(self._content) - old
            # Surely too big, whatever part of this is the end of data already.
            if self._size > self.limits.message + len(_END_OF_DATA):
                del self._content[:-4]
            if self._size > self._read_through + len(_END_OF_DATA):
                self._close(self._far_too_big())
            return False
        self._buffer += memoryview(self._content)[end + 5 :]
        self._size += end + 2 - old
        del self._content[end + 2 :]
        # RFC 5321 4.5.2: the first dot of a line that has more after it.
        del self._content[: 3 if self._content.startswith(b"\r\n.") else 2]
        self._size -= 2
        if self._size > self._read_through:
            self._close(self._far_too_big())
        elif self._size <= self.limits.message:
            content = bytes(self._content)
            self._content.clear()  # a large message is here twice at most
            self._finish(content.replace(b"\r\n.", b"\r\n"))
        else:
            self._finish(b"")
        return True

    def _read_chunk(self) -> bool:
        take = min(self._chunk_left, len(self._buffer))
        if self._chunk_refusal is None:
            self._content += memoryview(self._buffer)[:take]
        del self._buffer[:take]
        self.content_octets += take
        self._chunk_left -= take
        if self._chunk_left == 0:
            self._end_of_chunk()
        return True

    def _read_nothing(self) -> bool:
        self._buffer.clear()
        return False

    _READERS: Mapping[State, Callable[[Receiver], bool]] = {
        **dict.fromkeys(_ANYWHERE, _read_command),
        State.LONG_LINE: _read_long_line,
        State.DATA: _read_data,
        State.CHUNK: _read_chunk,
        State.HANDSHAKE: lambda self: False,
        State.CLOSED: _read_nothing,
    }

    # -- commands ---------------------------------------------------------------------------

    def _command(self, line: bytes) -> None:
        self.steps += 1
        try:
            verb, argument = _split(line)
            if verb in _NOT_IMPLEMENTED:
                raise _CommandError(_NOT_IMPLEMENTED_REPLY)
            states = _EXPECTED.get(verb)
            if states is None:
                raise _CommandError(Reply(500, "command not recognized", "5.5.2"))
            if self._state not in states:
                raise _CommandError(_OUT_OF_ORDER[self._state])
            reply = self._HANDLERS[verb](self, argument)
        except _CommandError as error:
            self._refuse_command(error.reply)
        else:
            self._answer(self._bring_nothing(reply) if verb in _JUNK else reply)

    def _answer(self, reply: Reply | None) -> None:
        if reply is not None:
            self._reply(reply)

    def _refuse_command(self, reply: Reply) -> None:
        self._errors += 1
        if self._errors < self.limits.errors:
            self._reply(reply)
        else:
            # RFC 5321 3.8: a server may close after 421.
            self._close(Reply(421, f"{self.hostname} too many errors, closing", "4.7.0"))

    def _close(self, reply: Reply) -> None:
        self._reset()
        self._state = State.CLOSED
        self._buffer.clear()
        self._reply(reply)
        self._events.append(Quit(reply))

    def _refuse(self, recipients: tuple[str, ...], reply: Reply) -> Reply | None:
        """A refusal that is policy and not the client's error: the client knows more than before,
        and goes on with what else it has."""
        self._events.append(Refused(recipients, reply))
        self._junk = 0
        self._refusals += 1
        if self._refusals > self.limits.refusals:
            too_many = Reply(421, f"{self.limits.refusals} refusals in a row, closing", "4.7.0")
            self._close(too_many)
            return None
        return reply

    def _bring_nothing(self, reply: Reply | None) -> Reply | None:
        """``reply``, unless there was enough of this."""
        self._junk += 1
        if self._junk <= self.limits.junk or reply is None:
            return reply
        self._close(Reply(421, "too many commands that bring nothing, closing", "4.7.0"))
        return None

    def _on_ehlo(self, argument: str) -> Reply:
        self._greet(argument, esmtp=True)
        keywords = (
            f"SIZE {self.limits.message}",
            "8BITMIME",
            "PIPELINING",
            "ENHANCEDSTATUSCODES",
            "CHUNKING",
            "SMTPUTF8",
            "PRDR",
            "HELP",
            *(("STARTTLS",) if self._starttls else ()),
        )
        return Reply(250, "\n".join((self.hostname, *keywords)), "")

    def _on_helo(self, argument: str) -> Reply:
        self._greet(argument, esmtp=False)
        return Reply(250, self.hostname, "")

    def _greet(self, argument: str, *, esmtp: bool) -> None:
        if not argument or " " in argument:
            raise _CommandError(Reply(501, "EHLO and HELO take one host name", SYNTAX))
        self._state = State.IDLE
        self._reset()
        self._helo, self._esmtp = argument, esmtp

    def _on_mail(self, argument: str) -> Reply | None:
        mailbox, options = self._path("FROM", argument, _MAIL_PARAMETERS)
        if not mailbox.isascii() and "SMTPUTF8" not in options:
            raise _CommandError(Reply(553, "a UTF-8 address needs SMTPUTF8", "5.6.7"))
        size = int(options.get("SIZE", "0"))
        if size > self.limits.message:
            return self._refuse((), self._too_big())  # RFC 1870 6.1
        self._sender, self._mail_options = mailbox, options
        self._state = State.MAIL
        return SENDER_OK

    def _on_rcpt(self, argument: str) -> Reply | None:
        mailbox, options = self._path("TO", argument, _RCPT_PARAMETERS)
        if not mailbox:
            raise _CommandError(Reply(501, "a recipient cannot be <>", "5.1.3"))
        if not mailbox.isascii() and "SMTPUTF8" not in self._mail_options:
            raise _CommandError(Reply(553, "a UTF-8 address needs SMTPUTF8", "5.6.7"))
        if len(self._recipients) >= self.limits.recipients:
            reply = Reply(452, "too many recipients, send the rest again", "4.5.3")
            return self._refuse((mailbox,), reply)
        if refusal := self._accept_recipient(mailbox):
            return self._refuse((mailbox,), refusal)
        self._recipients.append(mailbox)
        self._rcpt_options[mailbox] = options
        self._state = State.RCPT
        return RECIPIENT_OK

    def _path(
        self, keyword: str, argument: str, known: Mapping[str, re.Pattern[str]]
    ) -> tuple[str, dict[str, str]]:
        """``FROM:<path> parameters`` -> mailbox and parameters."""
        if argument[: len(keyword) + 1].upper() != keyword + ":":
            raise _CommandError(Reply(501, f"{keyword}:<address> is expected", SYNTAX))
        try:
            mailbox, rest = parse_path(argument[len(keyword) + 1 :])
        except AddressError:
            status = "5.1.7" if keyword == "FROM" else "5.1.3"
            raise _CommandError(Reply(501, "that is no address in < >", status)) from None
        if keyword == "TO" and "@" not in mailbox and mailbox.lower() not in ("", "postmaster"):
            raise _CommandError(Reply(501, "an address needs a domain", "5.1.3"))
        if rest and not self._esmtp:
            raise _CommandError(Reply(555, "parameters need EHLO", SYNTAX))
        return mailbox, _parameters(rest, known)

    def _no_recipients(self) -> Reply | None:
        # RFC 5321 3.3: all were refused.  The client is not at fault, and the transaction is over
        # for it: it may go on with MAIL or with RSET.
        self._reset()
        return self._bring_nothing(_NO_RECIPIENTS)

    def _on_data(self, argument: str) -> Reply | None:
        if argument:
            raise _CommandError(Reply(501, "DATA takes no argument", SYNTAX))
        if not self._recipients:
            return self._no_recipients()
        # A lone dot may be the very first line: the CRLF of DATA itself goes before it.
        self._content += b"\r\n"
        self._size = 2
        self._state = State.DATA
        return Reply(354, "end the message with <CRLF>.<CRLF>")

    def _on_bdat(self, argument: str) -> None:
        found = _BDAT.fullmatch(argument)
        if not found:
            # Nobody knows where the octets end: whatever comes next may be content.
            self._close(Reply(421, "BDAT takes a number of octets and LAST, closing", "4.5.4"))
            return
        octets, self._last_chunk = int(found[1]), found[2] is not None
        self._chunks += 1
        if self._size + octets > self._read_through:
            self._close(self._far_too_big())
        elif self._chunks > self.limits.chunks:
            self._close(Reply(421, f"more than {self.limits.chunks} chunks, closing", "4.7.0"))
        else:
            self._chunk_left = self._chunk_octets = octets
            self._chunk_refusal = self._bdat_refusal(octets)
            self._size += octets
            self._chunk_from = self._state
            self._state = State.CHUNK
            if octets == 0:
                self._end_of_chunk()

    def _bdat_refusal(self, octets: int) -> Reply | None:
        """Why a chunk is thrown away, if it is (RFC 3030 3, 4.2)."""
        if self._state in (State.CONNECTED, State.IDLE):
            return _OUT_OF_ORDER[self._state]
        if not self._recipients:
            return _NO_RECIPIENTS
        if self._size + octets > self.limits.message:
            return self._too_big()
        return None

    def _end_of_chunk(self) -> None:
        refusal, self._chunk_refusal = self._chunk_refusal, None
        self._state = self._chunk_from
        self.steps += 1
        if refusal in (_OUT_OF_ORDER[State.CONNECTED], _OUT_OF_ORDER[State.IDLE]):
            self._reset()
            self._refuse_command(refusal)
        elif self._last_chunk and self._recipients:
            self._finish(bytes(self._content))
        elif self._last_chunk:
            self._answer(self._no_recipients())
        elif refusal is not None:
            # RFC 3030 4.2: the message is lost, whatever else comes of it.
            self._content.clear()
            self._state = State.CHUNKS
            self._reply(refusal)
        else:
            self._state = State.CHUNKS
            self._answer(CHUNK_OK if self._chunk_octets else self._bring_nothing(CHUNK_OK))

    def _finish(self, content: bytes) -> None:
        """The whole message is here."""
        self.steps += 1
        recipients = tuple(self._recipients)
        if refusal := self._content_refusal(content):
            self._reset()
            self._answer(self._refuse(recipients, refusal))
        else:
            envelope = Envelope(
                self._sender,
                recipients,
                self._mail_options,
                self._rcpt_options,
                self._helo,
                self._esmtp,
            )
            transaction = Transaction(envelope, content)
            self._waiting.append(_Slot(transaction))
            self._unanswered_messages += 1
            self._unanswered_octets += len(content)
            self._events.append(transaction)
            self._junk = self._refusals = 0
            self._reset()

    def _content_refusal(self, content: bytes) -> Reply | None:
        if self._size > self.limits.message:
            return self._too_big()
        if _has_long_line(content, self.limits.text_line):
            return Reply(554, f"a line of more than {self.limits.text_line} octets", "5.6.0")
        return None

    @property
    def _read_through(self) -> int:
        return max(self.limits.read_through, self.limits.message)

    def _far_too_big(self) -> Reply:
        """No 552: nobody waits for the end of it to say so."""
        text = f"{self.limits.message} octets are taken, not this many, closing"
        return Reply(421, text, "4.3.4")

    def _too_big(self) -> Reply:
        return Reply(552, f"more than {self.limits.message} octets are not taken", "5.3.4")

    def _on_rset(self, argument: str) -> Reply:
        if argument:
            raise _CommandError(Reply(501, "RSET takes no argument", SYNTAX))
        self._reset()
        return OK

    def _on_noop(self, argument: str) -> Reply:
        return OK

    def _on_vrfy(self, argument: str) -> Reply:
        if not argument:
            raise _CommandError(Reply(501, "VRFY takes an address", SYNTAX))
        # RFC 5321 3.5.3: we do not say who is there.
        return Reply(252, "send some mail, we will try to deliver it", "2.5.0")

    def _on_starttls(self, argument: str) -> Reply | None:
        if not self._starttls:
            raise _CommandError(_NOT_IMPLEMENTED_REPLY)
        if argument:
            raise _CommandError(Reply(501, "STARTTLS takes no argument", SYNTAX))
        if self._waiting:
            raise _CommandError(Reply(503, "wait for the answer to your mail", SEQUENCE))
        if self.pending:
            self._close(Reply(421, "bytes behind STARTTLS, closing", "4.7.0"))
            return None
        self._state = State.HANDSHAKE
        self._events.append(StartTls())
        return Reply(220, "go ahead", "")

    def _on_help(self, argument: str) -> Reply:
        return Reply(214, "commands: " + " ".join(_EXPECTED), "2.0.0")

    def _on_quit(self, argument: str) -> None:
        if argument:
            raise _CommandError(Reply(501, "QUIT takes no argument", SYNTAX))
        self._close(Reply(221, f"{self.hostname} closing", "2.0.0"))

    _HANDLERS: Mapping[str, Callable[[Receiver, str], Reply | None]] = {
        "EHLO": _on_ehlo,
        "HELO": _on_helo,
        "MAIL": _on_mail,
        "RCPT": _on_rcpt,
        "DATA": _on_data,
        "BDAT": _on_bdat,
        "RSET": _on_rset,
        "NOOP": _on_noop,
        "VRFY": _on_vrfy,
        "HELP": _on_help,
        "QUIT": _on_quit,
        "STARTTLS": _on_starttls,
    }


def _split(line: bytes) -> tuple[str, str]:
    """A command line without its CRLF -> verb in upper case, argument."""
    if _UNPRINTABLE.search(line):
        raise _CommandError(_BAD_OCTETS)
    try:
        text = line.decode("utf-8").replace("\t", " ").rstrip(" ")
    except UnicodeDecodeError:
        raise _CommandError(Reply(500, "a command is ASCII, or UTF-8", "5.5.2")) from None
    found = _COMMAND.fullmatch(text)
    if not found:
        raise _CommandError(Reply(500, "command not recognized", "5.5.2"))
    return found[1].upper(), found[2] or ""


def _parameters(text: str, known: Mapping[str, re.Pattern[str]]) -> dict[str, str]:
    """The ESMTP parameters of MAIL or RCPT (RFC 5321 4.1.2)."""
    options: dict[str, str] = {}
    for word in filter(None, text.split(" ")):  # and not at what Unicode calls a space
        found = _PARAMETER.fullmatch(word)
        if not found:
            raise _CommandError(Reply(501, "that is no KEY=VALUE parameter", SYNTAX))
        key, value = found[1].upper(), found[2] or ""
        if key not in known:
            raise _CommandError(Reply(555, f"parameter {key[:40]} not implemented", SYNTAX))
        if key in options:
            raise _CommandError(Reply(501, f"parameter {key} twice", SYNTAX))
        if not known[key].fullmatch(value):
            raise _CommandError(Reply(501, f"parameter {key} has a wrong value", SYNTAX))
        options[key] = value
    return options


def _has_long_line(content: bytes, limit: int) -> bool:
    """Whether any line has more than ``limit`` octets: leaps from line end to line end, never
    further than ``limit``, so that short lines are not looked at one by one."""
    start = 0
    while len(content) - start > limit:
        end = content.rfind(b"\n", start, start + limit)
        if end < 0:
            return True
        start = end + 1
    return False
