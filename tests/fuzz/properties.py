"""What must hold for any input: one function per fuzz target, which raises if it does not.

An input is octets, so that a fuzzer can mutate it, and a dialogue, so that a person can write one::

    words LF dialogue

The words are options of the target (below, at each target); a number among them is the size of a
piece: the machine is fed the whole dialogue and, a second time, cut into pieces of these sizes in
turn, and must do the same.  In the dialogue RS (octet 1E) ends a flight: what one side says before
it waits for the other.  FS (1C) stands for 4 KiB of ``x``, so that a small input can reach large
limits.

Each property is checked against a second reading of the same octets, which has all of them at
once and is as simple as that allows.  Nothing here knows of a fuzzer: ``test_seeds`` runs the same
functions under pytest.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import itertools
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from unittest.mock import patch

from parsing import parser

from salmon_revsmtp.net import proxyheader
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.settings import AccountSettings
from salmon_revsmtp.smtp import receiver as receiver_module
from salmon_revsmtp.smtp import replies as reply_limits
from salmon_revsmtp.smtp import turn
from salmon_revsmtp.smtp.addresses import domain_of, parse_path
from salmon_revsmtp.smtp.commands import State
from salmon_revsmtp.smtp.envelope import Client, Envelope
from salmon_revsmtp.smtp.limits import RECIPIENT_COST, Limits
from salmon_revsmtp.smtp.receiver import (
    EtrnRequest,
    Quit,
    Receiver,
    Refused,
    StartTls,
    Transaction,
)
from salmon_revsmtp.smtp.replies import Reply, ReplyError, ReplyParser
from salmon_revsmtp.smtp.sender import Broken, Closed, Outgoing, Sender, Sent

__all__ = ["TARGETS", "parser", "proxy", "receiver", "replies", "sender", "session"]

FLIGHT, MESSAGES, FIELD, MANY = b"\x1e", b"\x1d", b"\x1f", b"\x1c"

# More would make an input dear, and tell nothing that another input does not.
PIECES = 12

# -- the input ------------------------------------------------------------------------------------


def _read(data: bytes) -> tuple[set[bytes], list[int], bytes]:
    """An input -> its option words, its piece sizes, its dialogue."""
    head, _, dialogue = data.partition(b"\n")
    words = head.split()[:20]
    sizes = [max(1, int(word)) for word in words if word.isdigit() and len(word) < 5]
    return {word for word in words if not word.isdigit()}, sizes or [7], dialogue


def _flights(dialogue: bytes) -> list[bytes]:
    return dialogue.replace(MANY, b"x" * 4096).split(FLIGHT)


def _pieces(flight: bytes, sizes: list[int]) -> Iterable[bytes]:
    """The flight in pieces of these sizes; what is left behind ``PIECES`` of them is one more."""
    start = 0
    for size in itertools.islice(itertools.cycle(sizes), PIECES):
        if start >= len(flight):
            return
        yield flight[start : start + size]
        start += size
    yield flight[start:]


# -- replies --------------------------------------------------------------------------------------

_REPLY_LINE = re.compile(rb"([2-5][0-9][0-9])([ -])([\x20-\x7e]*)\r\n")


def _said(heard: bytes) -> deque[tuple[int, bytes]]:
    """What a server wrote -> (code, octets) of each reply; every one must be well-formed."""
    found: deque[tuple[int, bytes]] = deque()
    start, position = 0, 0
    while position < len(heard):
        line = _REPLY_LINE.match(heard, position)
        assert line, f"no reply line (RFC 5321 4.2): {heard[position : position + 80]!r}"
        assert line[1] == heard[start : start + 3], "lines of one reply with two codes"
        assert len(line[0]) <= 512, "RFC 5321 4.5.3.1.5: a reply line has 512 octets"
        position = line.end()
        if line[2] == b" ":
            found.append((int(line[1]), heard[start:position]))
            start = position
    assert start == position, "the last reply never ends"
    return found


def replies(data: bytes) -> None:
    """A peer's replies, parsed and written again.  No options."""
    _, sizes, dialogue = _read(data)
    stream = b"".join(_flights(dialogue))
    whole, error = _parsed([stream])
    assert (whole, error) == _parsed(_pieces(stream, sizes)), "another split, other replies"
    assert len(whole) <= stream.count(b"\n")
    for reply in whole:
        [(code, again)] = _said(reply.encode())
        assert code == reply.code
        # What has been written by us once is read and written the same ever after.
        [read], error = _parsed([again])
        assert error == "" and _visible(read.encode()) == _visible(again)
        assert reply.positive + reply.transient + reply.permanent == (code // 100 != 3)
        assert not re.search(r"[\r\n]", str(reply)), "a log line that a peer can break"


def _visible(reply: bytes) -> list[bytes]:
    """The lines of a reply that say something."""
    lines = (line[4:] for line in reply.split(b"\r\n"))
    return [line for line in lines if not re.fullmatch(rb"([0-9]\.[0-9.]+)? *", line)]


def _parsed(pieces: Iterable[bytes]) -> tuple[list[Reply], str]:
    parser, found = ReplyParser(), list[Reply]()
    try:
        for piece in pieces:
            parser.receive_bytes(piece)
            while (reply := parser.next_reply()) is not None:
                found.append(reply)
            assert len(parser.pending) <= reply_limits.MAX_LINE
    except ReplyError as error:
        # Where a line is too long depends on when one looks, that it is too long does not.
        return found, _too_long(str(error))
    return found, ""


def _too_long(reason: str) -> str:
    return re.sub(r"a reply( line)? of more than.*", "a reply that is too long", reason)


# -- the server role ------------------------------------------------------------------------------

HOSTNAME = "mail.example.org"
SERVER = Limits(
    message=60,
    recipients=2,
    command_line=90,
    text_line=30,
    read_through=120,
    chunks=4,
    refusals=4,
    junk=6,
    requests=3,
    errors=8,
    unanswered_messages=1,
    unanswered_octets=100,
)
# Two small messages with their envelopes, and some replies after them.
AHEAD = Limits(**{**vars(SERVER), "unanswered_messages": 3, "unanswered_octets": 700})
# In a sink a message takes less memory, so more is read ahead: here octets do not count.
AHEAD_WITH_SINKS = Limits(**{**vars(AHEAD), "unanswered_octets": 10_000})
# The largest thing that one command can make us say.
LONGEST_REPLY = 512
# What the transactions of a session take beside their content: their commands, and two recipients.
ENVELOPE = 3 * SERVER.command_line + 2 * RECIPIENT_COST
# Octets of content from which on it goes into a sink, if there are sinks.
SINK_AT = 8


def _policy(mailbox: str) -> Reply | None:
    if mailbox.lower().endswith("@example.org") or mailbox.lower() == "postmaster":
        return None
    return Reply(550, "not one of our domains", "5.7.1")


def _verdict(envelope: Envelope, data: bytes) -> tuple[Reply, list[Reply]]:
    """How the caller answers this message: it depends on the message and on nothing else."""
    choices = (Reply(250, "taken"), Reply(451, "later\nmuch later"), Reply(554, "no"))
    first = len(data) % 3
    each = [choices[(first + number) % 3] for number in range(len(envelope.recipients))]
    return choices[first], each


def _etrn(argument: str) -> Reply:
    """How the caller answers an ETRN; the last counts as an error."""
    answers = (
        Reply(250, "started"),
        Reply(253, "2\nof them"),
        Reply(458, "no"),
        Reply(501, "what?"),
    )
    return answers[len(argument) % 4]


@dataclass(eq=False)
class _Sink:
    """Where a message goes, and what became of it."""

    data: bytes = b""
    discarded: bool = False

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()

    def beginning(self) -> bytes:
        return self.data

    def write(self, data: bytes) -> None:
        assert not self.discarded, "written for no one"
        self.data += data

    def discard(self) -> None:
        assert not self.discarded, "forgotten twice"
        self.discarded = True


def _content(transaction: Transaction) -> bytes:
    """A message, wherever it went."""
    if transaction.sink is None:
        return transaction.data
    assert isinstance(transaction.sink, _Sink) and not transaction.sink.discarded
    assert not transaction.data, "a message in two places"
    return transaction.sink.data


@dataclass
class _Served:
    """A session of the receiver with its caller, and what came of it.

    ``sinks``  the messages go into sinks.
    """

    words: set[bytes]
    sinks: bool = False
    heard: bytes = b""
    events: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        ahead = AHEAD_WITH_SINKS if b"sinks" in self.words else AHEAD
        limits = ahead if b"ahead" in self.words else SERVER
        self.made: list[_Sink] = []
        self.machine = Receiver(
            HOSTNAME,
            limits,
            _policy,
            starttls=b"tls" in self.words,
            xforward=b"believed" in self.words,
            etrn=b"etrn" in self.words,
            sinks=self._make_sink if self.sinks else None,
        )
        self.unanswered: list[Transaction] = []
        self.request: EtrnRequest | None = None
        self.kept = 0  # octets that came while the machine was paused
        self.handshake = self.dropped = self.shutdown = False

    def _make_sink(self, envelope: Envelope) -> _Sink:
        assert envelope.recipients, "a message for no one"
        self.made.append(_Sink())
        return self.made[-1]

    def run(self, flights: list[bytes], sizes: list[int] | None) -> None:
        self.heard += self.machine.data_to_send()
        for number, flight in enumerate(flights):
            for piece in [flight] if sizes is None else _pieces(flight, sizes):
                self._hear(self.machine.receive_bytes(piece), len(piece))
                while self.machine.paused and not self._lets_wait:
                    self._answer()
                if self.handshake and self.machine.pending:
                    break
            while self.unanswered or (self.request and b"never" not in self.words):
                self._answer()
            self._shake_hands()
            if self.dropped:
                break
            if number == 0 and b"shutdown" in self.words:
                self.shutdown = True
                self.machine.shut_down()
                self._hear(self.machine.advance(), 0)
            if self.machine.paused:  # for ever
                break
        self._stop()

    @property
    def _lets_wait(self) -> bool:
        """The caller takes its time for an ETRN; what comes meanwhile is kept."""
        return self.request is not None and bool({b"late", b"never"} & self.words)

    def _hear(self, events: Iterable[object], size: int) -> None:
        for event in events:
            assert self.request is None or self.shutdown, (
                "something is read before the answer to ETRN"
            )
            self.events.append(event)
            if isinstance(event, Transaction):
                self.unanswered.append(event)
            elif isinstance(event, EtrnRequest):
                self.request = event
            self.handshake = self.handshake or isinstance(event, StartTls)
        self.heard += self.machine.data_to_send()
        self._weigh(size)
        if self.shutdown and not self.machine.paused:
            # With a recipient accepted the message is as good as in hand.
            in_hand = (State.RCPT, State.DATA, State.CHUNK, State.CHUNKS)
            assert self.machine._state in (*in_hand, State.CLOSED), "an idle session stays"

    def _weigh(self, size: int) -> None:
        """Memory: a message, a command line and what waits for the caller, never what came."""
        machine, limits = self.machine, self.machine.limits
        self.kept = self.kept + size if machine.paused else 0
        held = len(machine._buffer) + len(machine._content)
        # With a stuffed dot in each of its lines, which have three octets.
        message = limits.message * 4 // 3 + 7
        if not machine.paused and not self.handshake:
            assert held <= message + limits.command_line, "more is held than allowed"
        assert held <= message + limits.command_line + max(size, self.kept)
        waiting = sum(len(one) for one in machine._waiting if isinstance(one, bytearray))
        assert waiting <= limits.unanswered_octets + LONGEST_REPLY, "replies pile up"
        counted = machine.memory.held - sum(one.held for one in self.unanswered)
        assert 0 <= counted <= message + ENVELOPE, "memory that no message has"
        if machine.at_boundary:
            assert counted == 0, "memory is not given back"
            self._check_sinks()

    def _check_sinks(self) -> None:
        """Nothing is coming: each sink is a message's, or forgotten."""
        given = {id(one.sink) for one in self.events if isinstance(one, Transaction) and one.sink}
        for sink in self.made:
            assert sink.discarded != (id(sink) in given), "a sink that no one has"

    def _answer(self) -> None:
        size = len(self.machine._buffer)
        newest = b"newest" in self.words
        # Nothing is read after an ETRN, so it is the newest.
        if self.request and (newest or not self.unanswered) and b"never" not in self.words:
            request, self.request = self.request, None
            self.machine.answer_etrn(_etrn(request.argument))
        else:
            transaction = self.unanswered.pop(-1 if newest else 0)
            reply, each = _verdict(transaction.envelope, _content(transaction))
            self.machine.answer(transaction, reply, each)
        self._hear(self.machine.advance(), size)

    def _shake_hands(self) -> None:
        """What the caller does about STARTTLS when the client waits."""
        if not self.handshake:
            return
        self.handshake = False
        if not self.machine.pending:
            self.machine.tls_started()
            self._hear(self.machine.advance(), 0)
            return
        # Bytes behind STARTTLS.  The machine may have seen them with it, or after it: the same
        # attack, the same end.
        go_ahead, closing = Reply(220, "go ahead", "").encode(), _INJECTED.encode()
        assert self.heard.endswith(go_ahead) and self.events[-1] == StartTls()
        self.heard = self.heard.removesuffix(go_ahead) + closing
        self.events[-1] = Quit(_INJECTED)
        self.dropped = True

    def _stop(self) -> None:
        if self.machine.closed:
            assert self.machine.receive_bytes(b"NOOP\r\n\x00" * 50) == []
            assert self.machine.data_to_send() == b"" and not self.machine.pending
        # The connection is gone, and someone may still be about to answer.
        self.machine.lost()
        if self.request is not None:
            self.machine.answer_etrn(_etrn(self.request.argument))
        assert self.machine.advance() == [] and self.machine.data_to_send() == b""
        assert self.machine.memory.held == 0, "memory is not given back at the end"
        self._check_sinks()

    @property
    def outcome(self) -> tuple[bytes, list[object]]:
        return self.heard, [
            (event.envelope, _content(event)) if isinstance(event, Transaction) else event
            for event in self.events
        ]


_INJECTED = Reply(421, "unexpected data after STARTTLS, closing", "4.7.0")


def receiver(data: bytes) -> None:
    """The server role; the input is a hostile client.

    ``tls``       STARTTLS is offered.
    ``ahead``     the machine may read ahead of its caller, three messages instead of one.
    ``newest``    the caller answers the newest first.
    ``shutdown``  the caller shuts down after the first flight.
    ``believed``  XFORWARD is offered.
    ``etrn``      ETRN is offered.
    ``late``      the caller answers it at the end of the flight; ``never``: not at all.
    ``sinks``     there are sinks for content; it must be the same as without.
    """
    words, sizes, dialogue = _read(data)
    flights = _flights(dialogue)
    whole = _Served(words)
    whole.run(flights, None)
    assert not whole.dropped
    _ServerDialogue(b"".join(flights), whole).read()
    others = [_Served(words)]
    others[0].run(flights, sizes)
    if b"sinks" in words:
        with patch.object(receiver_module, "SINK_AT", SINK_AT):
            others += [_Served(words, sinks=True), _Served(words, sinks=True)]
            others[1].run(flights, sizes)
            others[2].run(flights, None)
    for other in others:
        assert other.outcome == whole.outcome, "another split, other replies or events"


_BDAT = re.compile(rb"BDAT +([0-9]{1,20})( +LAST)? *", re.IGNORECASE)
_SIZE = SERVER.message
_FOREIGN = re.compile(rb"[A-Z]+ |\x16\x03")


@dataclass
class _Mail:
    """A transaction as the replies tell of it."""

    line: bytes
    recipients: list[bytes] = field(default_factory=list)
    content: bytes = b""
    size: int = 0
    spoilt: bool = False


# What may be in a field of a client that we were told of.
_HARMLESS = re.compile(r"[!#-'*-:=?A-\[\]-~]{0,255}")


class _ServerDialogue:
    """A second reading of what a client sent, all of it at once, with what it heard.

    The replies say which commands were accepted; what is a command and what is content, and which
    messages there were, is found here by other means than the machine's, and has to be the same.
    """

    def __init__(self, stream: bytes, served: _Served) -> None:
        self.stream = stream
        self.replies = _said(served.heard)
        self.messages = deque(one for one in served.events if isinstance(one, Transaction))
        self.requests = deque(one for one in served.events if isinstance(one, EtrnRequest))
        self.etrn = b"etrn" in served.words
        self.never = b"never" in served.words
        self.waits = False
        self.last = served.events[-1] if served.events else None
        self.quits = sum(isinstance(one, Quit) for one in served.events)
        self.refused = sum(len(one.recipients) for one in served.events if isinstance(one, Refused))
        self.shutdown = b"shutdown" in served.words
        self.believed = b"believed" in served.words
        # The XFORWARDs that were accepted since the last transaction.
        self.forwarded: list[bytes] = []
        self.position = 0
        self.mail: _Mail | None = None
        self.greeted = self.esmtp = self.over = self.endless = False
        self.helo = b""

    def read(self) -> None:
        assert self._reply() == 220
        while not (self.over or self.waits) and (line := self._line()) is not None:
            self._command(line)
        if not self.over and self.replies:
            # No one waits for the end of a shutdown, of endless data, or of another protocol.
            rest = self.stream[self.position :]
            assert self._reply() == 421
            assert self.shutdown or self.endless or _FOREIGN.match(rest)
        assert not self.replies, f"replies that no one asked for: {self.replies}"
        assert not self.messages, f"messages that no one sent: {self.messages}"
        assert not self.requests, f"ETRN that no one said: {self.requests}"
        assert self.quits == self.over, "a session ends once, and says so"
        assert not self.over or isinstance(self.last, Quit), "events after the end"

    def _reply(self) -> int:
        assert self.replies, f"no reply to {self.stream[: self.position][-80:]!r}"
        code, _ = self.replies.popleft()
        self.over = self.over or code in (221, 421)
        return code

    def _line(self) -> bytes | None:
        end = self.stream.find(b"\r\n", self.position)
        if end < 0:
            return None
        line = self.stream[self.position : end]
        self.position = end + 2
        return line if len(line) + 2 <= SERVER.command_line else b""

    def _command(self, line: bytes) -> None:
        line = line.replace(b"\t", b" ")
        verb = line.partition(b" ")[0].upper()
        if verb == b"ETRN" and self._asks(line):
            return
        if self.replies and self.replies[0][0] == 421:
            self._reply()  # the last straw, or it went out before the command came
            return
        if chunk := _BDAT.fullmatch(line):
            self._chunk(int(chunk[1]), chunk[2] is not None)
            return
        code = self._reply()
        if verb == b"BDAT":
            assert code == 500, "octets that no one can count are coming"
        elif code == 354:
            assert line.rstrip(b" ").upper() == b"DATA"
            assert self.mail and self.mail.recipients and not self.mail.content
            self._data()
        elif code == 220:
            assert verb == b"STARTTLS" and self.mail is None
            self.greeted, self.forwarded = False, []
        elif code == 250 and verb == b"MAIL":
            assert self.greeted and self.mail is None
            self.mail = _Mail(line)
        elif verb == b"MAIL" and code not in (500, 503):
            self.forwarded = []
        elif code == 500:  # between two transactions it may have been a MAIL
            self.forwarded = self.forwarded if self.mail else []
        elif code == 250 and verb == b"XFORWARD":
            assert self.believed and self.greeted and self.mail is None
            self.forwarded.append(line)
        elif code == 250 and verb == b"RCPT":
            assert self.mail and not self.mail.size, "a recipient in the middle of the data"
            self.mail.recipients.append(line)
            assert len(self.mail.recipients) <= SERVER.recipients
        elif code == 250 and verb in (b"EHLO", b"HELO"):
            self.greeted, self.esmtp, self.mail = True, verb == b"EHLO", None
            self.helo, self.forwarded = line.partition(b" ")[2].strip(b" "), []
        elif (code == 250 and verb == b"RSET") or (code == 554 and verb == b"DATA"):
            assert verb == b"RSET" or not (self.mail and self.mail.recipients)
            self.mail, self.forwarded = None, []
        else:
            assert code >= 400 or verb in (b"NOOP", b"HELP", b"VRFY", b"QUIT"), (code, line)

    def _asks(self, line: bytes) -> bool:
        """Whether the caller was asked (RFC 1985 5), and has answered or will not."""
        if not (self.etrn and self.greeted and self.esmtp and self.mail is None):
            return False
        argument = line[4:].strip(b" ")
        if not self.requests or self.requests[0].argument.encode() != argument:
            well_formed = re.fullmatch(rb"ETRN +[!-~]+ *", line, re.IGNORECASE)
            last = self.replies and self.replies[0][0] == 421
            assert last or not well_formed, "no one was asked"
            return False
        answer = _etrn(self.requests.popleft().argument)
        if self.never:
            self.waits = True
            return True
        if self.replies and self.replies[0][0] == 421:
            assert answer.permanent, "no answer to ETRN"  # and one error too many
            self._reply()
            return True
        assert self.replies.popleft()[1] == answer.encode()
        return True

    def _chunk(self, octets: int, last: bool) -> None:
        """RFC 3030 4.2: after BDAT come as many octets as it said, also when it is refused."""
        chunk = self.stream[self.position : self.position + octets]
        self.position += len(chunk)
        if len(chunk) < octets:
            self.position = len(self.stream)
            return
        mail = self.mail
        if mail is None:
            assert self._reply() == 503
            self.forwarded = []
            return
        mail.size += octets
        if not mail.recipients:
            assert self._reply() == 554
            # What was thrown away is missing: no message may come of the rest.
            mail.spoilt = True
            self.mail = None if last else mail
            self.forwarded = [] if last else self.forwarded
            return
        mail.content += chunk
        if last:
            self._message(mail.content, mail.size)
        else:
            mail.spoilt = mail.spoilt or mail.size > _SIZE
            assert self._reply() == (552 if mail.spoilt else 250)

    def _data(self) -> None:
        """RFC 5321 4.1.1.4: to CRLF.CRLF, of which the first CRLF may be that of DATA."""
        end = self.stream.find(b"\r\n.\r\n", self.position - 2)
        if end < 0:
            rest = self._unstuffed(self.stream[self.position :])
            self.endless = len(rest) > SERVER.read_through
            self.position = len(self.stream)
            return
        stuffed = self.stream[self.position : end + 2]
        self.position = end + 5
        assert b"." not in stuffed.split(b"\r\n"), "the data ended before"
        content = self._unstuffed(stuffed)
        self._message(content, len(content))

    @staticmethod
    def _unstuffed(data: bytes) -> bytes:
        """RFC 5321 4.5.2; what is counted, too (RFC 1870 4)."""
        lines = data.split(b"\r\n")
        return b"\r\n".join(line[1:] if line.startswith(b".") else line for line in lines)

    def _message(self, content: bytes, size: int) -> None:
        mail, self.mail = self.mail, None
        forwarded, self.forwarded = self.forwarded, []
        assert mail is not None and mail.recipients
        if size > _SIZE or mail.spoilt:
            far = size > SERVER.read_through
            assert self._reply() in ((421,) if far else (552, 421))
            return
        if any(len(line) > SERVER.text_line for line in re.findall(rb"[^\n]*\n|[^\n]+", content)):
            assert self._reply() in (554, 421)
            return
        assert self.messages, "a message was lost"
        message = self.messages.popleft()
        assert _content(message) == content, "the data is not what was sent"
        self._envelope(message.envelope, mail)
        self._client(message.envelope, forwarded)
        reply, each = _verdict(message.envelope, content)
        answers = [reply]
        if message.envelope.prdr:
            answers = [Reply(353, "one reply per recipient follows"), *each, reply]
        for answer in answers:
            assert self.replies.popleft()[1] == answer.encode()

    def _envelope(self, envelope: Envelope, mail: _Mail) -> None:
        assert envelope.esmtp == self.esmtp
        assert envelope.esmtp or not envelope.mail_options
        assert envelope.reverse_path.encode() in mail.line
        assert len(envelope.recipients) == len(mail.recipients)
        for mailbox, line in zip(envelope.recipients, mail.recipients, strict=True):
            assert mailbox.encode() in line and _policy(mailbox) is None
            assert parse_path(f"<{mailbox}>") == (mailbox, "")
            assert mailbox.isascii() or envelope.smtputf8
            domain_of(mailbox)
        for options in (envelope.mail_options, *envelope.rcpt_options.values()):
            for key, value in options.items():
                assert not re.search(r"[\x00-\x20\x7f]", key + value)
        self._options(envelope.mail_options, mail.line)
        for mailbox, options in envelope.rcpt_options.items():
            lines = [one for one in mail.recipients if mailbox.encode() in one]
            self._options(options, b" ".join(lines))

    def _client(self, envelope: Envelope, forwarded: list[bytes]) -> None:
        """It is that of this message's own XFORWARDs, and nothing in it does harm."""
        said = b" ".join(line.partition(b" ")[2] for line in forwarded).upper()
        keys = {word.partition(b"=")[0] for word in said.split()}
        hosts = keys - {b"IDENT", b"SOURCE"}
        assert bool(envelope.forwarded_by) == bool(hosts)
        assert (envelope.client is not None) >= bool(hosts)
        if not hosts:
            assert envelope.helo.encode() == self.helo
        if (client := envelope.client) is None:
            return
        if hosts:
            assert envelope.helo == client.helo and envelope.forwarded_by.encode() == self.helo
        if client.address:
            assert str(ipaddress.ip_address(client.address)) == client.address
        assert 0 <= client.port <= 65535
        fields = ("NAME", client.name), ("PROTO", client.protocol), ("HELO", client.helo)
        for key, value in (*fields, ("IDENT", client.ident), ("ADDR", client.address)):
            assert key.encode() in keys or not value
            assert _HARMLESS.fullmatch(value), value

    def _options(self, options: Mapping[str, str], line: bytes) -> None:
        words = {word.upper() for word in line.split(b" ")}
        for key, value in options.items():
            word = f"{key}={value}" if value else key
            assert word.encode().upper() in words, f"{word!r} is no word of {line!r}"


# -- the client role ------------------------------------------------------------------------------

_DEFAULT = FIELD.join([b"a@example.com", b"b@example.org", b"c@example.org", b"hi\r\n..\n.\n.x"])
_PARAMETERS = rb"(?: [A-Z0-9]+(?:=[^\x00-\x20\x7f]+)?)*"


@dataclass
class _Client:
    """A session of the sender with its caller, and what came of it."""

    messages: list[Outgoing]
    words: set[bytes]
    written: bytes = b""
    events: list[object] = field(default_factory=list)

    def run(self, flights: list[bytes], sizes: list[int] | None) -> None:
        machine, messages = Sender("odmr.example.net"), deque(self.messages)
        if b"quit" in self.words:
            self._note(machine, machine.quit())
        for flight in flights:
            while messages:
                self._note(machine, machine.send(messages.popleft()))
                if b"later" in self.words:
                    break
            for piece in [flight] if sizes is None else _pieces(flight, sizes):
                self._note(machine, machine.receive_bytes(piece))
                assert self.over or len(machine._parser.pending) <= reply_limits.MAX_LINE
        for message in messages:
            self._note(machine, machine.send(message))
        if b"quit" not in self.words:
            self._note(machine, machine.quit())
        if self.over:
            before = len(machine._parser.pending)
            self._note(machine, machine.receive_bytes(b"250 no one listens\r\n250"))
            assert len(machine._parser.pending) <= before, "kept for nobody"

    def _note(self, machine: Sender, events: Iterable[object]) -> None:
        events, pieces = list(events), machine.data_to_send()
        if self.over:
            assert not events and not pieces, "something happens after the end"
        self.events += events
        self.written += b"".join(pieces)

    @property
    def over(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Broken | Closed)


def sender(data: bytes) -> None:
    """The client role; the input is what to send, and a hostile server.

    ``quit``   QUIT is asked for before anything else.
    ``later``  the caller has another message before each flight of the server, instead of all of
               them before the first.

    The dialogue is what the server says; or messages, GS (1D), and what the server says.  Messages
    are separated by RS; a message is reverse-path, recipients and data, separated by US (1F); FS
    and ``KEY=VALUE`` may follow a mailbox.  ``CLIENT=...`` after the reverse-path makes a client of
    it that is called so.
    """
    words, sizes, dialogue = _read(data)
    before, separator, after = dialogue.partition(MESSAGES)
    sources, said = (before, after) if separator else (_DEFAULT, dialogue)
    messages = [_outgoing(one) for one in sources.split(FLIGHT)[:8]]
    flights = _flights(said)
    whole, pieces = _Client(messages, words), _Client(messages, words)
    whole.run(flights, None)
    _ClientDialogue(whole, b"".join(flights)).read()
    pieces.run(flights, sizes)
    assert pieces.written == whole.written, "another split, other octets"
    assert _without_lengths(pieces.events) == _without_lengths(whole.events), (
        "another split, other events"
    )


def _without_lengths(events: list[object]) -> list[object]:
    return [
        Broken(_too_long(event.reason)) if isinstance(event, Broken) else event for event in events
    ]


def _outgoing(source: bytes) -> Outgoing:
    first, *rest = source.split(FIELD)
    data = rest.pop() if rest else b""
    reverse_path, mail_options = _mailbox(first)
    recipients = [_mailbox(one) for one in rest[:4]] or [("b@example.org", {})]
    helo = mail_options.pop("CLIENT", None)
    client = None
    if helo is not None:
        client = Client(helo if helo[:1].isdigit() else "2001:db8::1", 25, helo, helo, helo, helo)
    envelope = Envelope(
        reverse_path,
        tuple(mailbox for mailbox, _ in recipients),
        mail_options,
        dict(recipients),
        client=client,
    )
    return Outgoing(source, envelope, data)


def _mailbox(source: bytes) -> tuple[str, dict[str, str]]:
    mailbox, *options = source.decode("utf-8", "surrogateescape").split(MANY.decode())
    return mailbox, {key: value for key, _, value in (one.partition("=") for one in options)}


_UNTOLD = Reply(554, "no one was told")


class _ClientDialogue:
    """A second reading of what the sender wrote, as the server at the other end takes it, with
    what that server answered; it knows what became of each message."""

    def __init__(self, client: _Client, said: bytes) -> None:
        self.written, self.events = client.written, client.events
        self.replies = self._replies(said)
        self.messages = deque(client.messages)
        self.everyone = client.messages
        self.extensions: set[str] = set()
        self.xforward: set[str] = set()  # what the server lists
        self.forwarded: list[bytes] = []  # said since the last transaction
        self.refused_for_good = False  # before one was taken
        self.taken = False
        self.position = 0
        # The message under way, and each message's replies as far as they are known.
        self.current: Outgoing | None = None
        self.mail: Reply | None = None
        self.rcpts: list[Reply | None] = []
        self.outcomes: list[tuple[Outgoing, tuple[Reply, ...]]] = []

    @staticmethod
    def _replies(said: bytes) -> deque[Reply]:
        """Up to what ends the session from outside: 421, or what is no reply at all."""
        found, _ = _parsed([said])
        ends = [number for number, reply in enumerate(found) if reply.code == 421]
        return deque(found[: ends[0]] if ends else found)

    def read(self) -> None:
        self._line_ends()
        greeting = self._answer()
        if greeting is None or greeting.code != 220:
            assert not self.written
        while self.position < len(self.written):
            self._command(self._line())
        self._finish()
        self._rest()
        sent = [event for event in self.events if isinstance(event, Sent)]
        assert len({id(event.message) for event in sent}) == len(sent), "sent twice"
        for event in sent:
            assert len(event.replies) == len(event.message.envelope.recipients)
            for reply in event.replies:
                assert reply.positive or reply.transient or reply.permanent, "that is no answer"
        assert [(event.message, event.replies) for event in sent] == self.outcomes

    def _line_ends(self) -> None:
        ends = self.written.count(b"\r\n")
        assert self.written.count(b"\r") == self.written.count(b"\n") == ends, "a bare CR or LF"

    def _answer(self, goes_on: tuple[int, ...] = ()) -> Reply | None:
        """The reply to what was read last; ``None`` when the session broke before it."""
        reply = self.replies.popleft() if self.replies else None
        if reply is not None and 300 <= reply.code < 400 and reply.code not in goes_on:
            reply = None
        if reply is None:
            self.replies.clear()
        return reply

    def _line(self) -> bytes:
        end = self.written.index(b"\r\n", self.position)
        line = self.written[self.position : end]
        self.position = end + 2
        assert line.isascii() or "SMTPUTF8" in self.extensions, "UTF-8 to a peer that has it not"
        assert re.fullmatch(rb"[^\x00-\x1f\x7f]+", line), "control characters in a command"
        return line

    def _command(self, line: bytes) -> None:
        verb = line.partition(b" ")[0]
        if verb == b"RCPT":
            self._rcpt(line)
        elif verb == b"DATA":
            self._data(line)
        elif verb == b"BDAT":
            self._bdat(line)
        else:
            self._finish()
            self._between(verb, line)

    def _between(self, verb: bytes, line: bytes) -> None:
        if verb == b"MAIL":
            self._begin(line)
        elif verb in (b"EHLO", b"HELO"):
            assert line == verb + b" odmr.example.net"
            reply = self._answer()
            if verb == b"EHLO" and reply and reply.positive:
                lines = [one.strip().partition(" ") for one in reply.text.split("\n")[1:]]
                self.extensions = {keyword.upper() for keyword, _, _ in lines}
                for keyword, _, parameters in lines:
                    if keyword.upper() == "XFORWARD":
                        self.xforward = set(parameters.upper().split())
        elif verb == b"XFORWARD":
            assert len(line) + 2 <= 512
            self.forwarded.append(line)
            reply = self._answer()
            if reply is not None:
                self.taken = self.taken or reply.positive
                self.refused_for_good |= reply.permanent and not self.taken
        elif verb == b"RSET":
            assert line == b"RSET" and not self.forwarded, "it would have the server forget"
            reply = self._answer()
            if reply and not reply.positive:
                self.replies.clear()
        else:
            assert line == b"QUIT", f"a command that no one asked for: {line!r}"
            assert self.position == len(self.written), "something after QUIT"
            self._answer()
            self.replies.clear()

    # -- a message --------------------------------------------------------------------------------

    def _begin(self, line: bytes) -> None:
        while (reply := self._refusal(self.messages[0])) is not None:
            message = self.messages.popleft()
            if reply is not _UNTOLD:
                self.outcomes.append((message, (reply,) * len(message.envelope.recipients)))
        self.current = self.messages.popleft()
        mailbox = re.escape(self.current.envelope.reverse_path.encode())
        assert re.fullmatch(rb"MAIL FROM:<%s>%s" % (mailbox, _PARAMETERS), line), line
        self._identity(self.current.envelope.client)
        self.mail, self.rcpts = self._answer(), []

    def _identity(self, client: Client | None) -> None:
        """The server is told of this message's client, or of none."""
        forwarded, self.forwarded = self.forwarded, []
        said = [word for line in forwarded for word in line.split(b" ")[1:]]
        keys = [word.partition(b"=")[0].decode() for word in said]
        assert len(set(keys)) == len(keys) and self.xforward.issuperset(keys)
        assert all(re.fullmatch(rb"[A-Z]+=[!-~]{1,255}", word) for word in said)
        if client is None:
            assert not said, "another message's client"
        elif not self.refused_for_good and "ADDR" in self.xforward:
            assert [word for word in said if word.startswith(b"ADDR=")], "no one was told"

    def _refusal(self, message: Outgoing) -> Reply | None:
        """What is refused without asking the server: taken from the event, judged here."""
        envelope = message.envelope
        mailboxes = (envelope.reverse_path, *envelope.recipients)
        plain = all(mailbox.isascii() for mailbox in mailboxes)
        options = [envelope.mail_options.get(key, "-") for key in ("RET", "ENVID")]
        for one in envelope.rcpt_options.values():
            options += [one.get(key, "-") for key in ("NOTIFY", "ORCPT")]
        sayable = all(
            re.fullmatch(r"[^\x00-\x20=\x7f\ud800-\udfff]+", option)
            and (option.isascii() or "SMTPUTF8" in self.extensions)
            for option in options
            if "DSN" in self.extensions
        )
        if (
            all(_is_mailbox(mailbox, number == 0) for number, mailbox in enumerate(mailboxes))
            and sayable
            and (plain or "SMTPUTF8" in self.extensions)
            and (_octets(message).isascii() or "8BITMIME" in self.extensions)
            and not any(
                line.startswith(b"\0") and line.strip(b"\0") == b"."
                for line in re.split(rb"\r\n|\r|\n", _octets(message))
            )
        ):
            return None
        for event in self.events:
            if isinstance(event, Sent) and event.message is message:
                assert event.replies[0].permanent
                return event.replies[0]
        # In its turn: behind a message that has no answer yet, it has none.
        told = {id(event.message) for event in self.events if isinstance(event, Sent)}
        before = self.everyone[: self.everyone.index(message)]
        assert any(id(one) not in told for one in before), (
            "this peer cannot take the message, and no one was told"
        )
        return _UNTOLD

    def _rcpt(self, line: bytes) -> None:
        assert self.current is not None and len(self.rcpts) < len(
            self.current.envelope.recipients
        ), "a recipient that no one named"
        mailbox = re.escape(self.current.envelope.recipients[len(self.rcpts)].encode())
        assert re.fullmatch(rb"RCPT TO:<%s>%s" % (mailbox, _PARAMETERS), line), line
        self.rcpts.append(self._answer())

    @property
    def _accepted(self) -> list[int]:
        if not self.mail or not self.mail.positive:
            return []
        return [number for number, one in enumerate(self.rcpts) if one and one.positive]

    def _everyone_named(self) -> Outgoing:
        assert self.current is not None
        assert len(self.rcpts) == len(self.current.envelope.recipients)
        return self.current

    def _data(self, line: bytes) -> None:
        message = self._everyone_named()
        assert line == b"DATA"
        reply = self._answer(goes_on=(354,))
        if reply is None or reply.positive:
            # The session broke.  2yz to DATA is no answer: nothing was sent.
            self.replies.clear()
            self.current = None
            assert self.position == len(self.written)
        elif reply.code == 354:
            end = self.written.find(b"\r\n.\r\n", self.position - 2)
            assert end >= 0, "data without end"
            lines = self.written[self.position : end + 2].split(b"\r\n")
            self.position = end + 5
            assert not any(one == b"." for one in lines)
            content = b"\r\n".join(one[1:] if one.startswith(b".") else one for one in lines)
            self._content(message, content if self._accepted else None)
        else:
            self._end(reply)

    def _bdat(self, line: bytes) -> None:
        message = self._everyone_named()
        found = re.fullmatch(rb"BDAT ([0-9]+) LAST", line)
        assert found
        content = self.written[self.position : self.position + int(found[1])]
        self.position += int(found[1])
        self._content(message, content)

    def _content(self, message: Outgoing, content: bytes | None) -> None:
        if content is not None:
            expected = re.sub(rb"\r\n|\r|\n", b"\r\n", _octets(message))
            assert content == expected or (
                expected[-2:] != b"\r\n" and content == expected + b"\r\n"
            ), "the server has another message than we"
            assert content.isascii() or "8BITMIME" in self.extensions
        self._end(self._answer(goes_on=(353,) if self._accepted else ()))

    def _end(self, reply: Reply | None) -> None:
        """The server has spoken of the message: only this makes a 2yz."""
        final: list[Reply] = []
        if reply is not None and reply.code == 353:
            each = [self._answer() for _ in self._accepted]
            last = self._answer()
            if last is not None:
                final = [one if last.positive or not one.positive else last for one in each if one]
        elif reply is not None:
            final = [reply] * len(self._accepted)
        if reply is None or (self._accepted and not final):
            self.current = None
            return
        self._settle(dict(zip(self._accepted, final, strict=True)))

    def _settle(self, final: dict[int, Reply]) -> None:
        message, self.current = self._everyone_named(), None
        assert self.mail is not None
        if not self.mail.positive:
            replies = [self.mail] * len(self.rcpts)
        else:
            replies = [final.get(number, one) for number, one in enumerate(self.rcpts) if one]
        self.outcomes.append((message, tuple(replies)))

    def _finish(self) -> None:
        """The next command, or the end, tells that a transaction was given up after a refusal."""
        if self.current is not None and self.mail is not None:
            recipients = self.current.envelope.recipients
            if not self.mail.positive and not self.rcpts:
                self.outcomes.append((self.current, (self.mail,) * len(recipients)))
            elif len(self.rcpts) == len(recipients) and not self._accepted and all(self.rcpts):
                self.outcomes.append((self.current, tuple(one for one in self.rcpts if one)))
        self.current = None

    def _rest(self) -> None:
        """Messages behind the last that was written: refused on the spot, or never begun."""
        done = {id(message) for message, _ in self.outcomes}
        for event in self.events:
            if isinstance(event, Sent) and id(event.message) not in done:
                assert event.message in self.messages
                reply = self._refusal(event.message)
                assert reply is not None
                self.outcomes.append((event.message, event.replies))


def _octets(message: Outgoing) -> bytes:
    assert isinstance(message.data, bytes)
    return message.data


def _is_mailbox(mailbox: str, reverse: bool) -> bool:
    try:
        mailbox.encode()
        return parse_path(f"<{mailbox}>") == (mailbox, "") and bool(reverse or mailbox)
    except ValueError:
        return False


# -- the provider before the reversal -------------------------------------------------------------

ACCOUNTS = Accounts(
    [
        AccountSettings.model_validate({"password": "secret", **one})
        for one in (
            {"name": "customer", "domains": ["example.org", "b\u00fccher.example"]},
            {"name": "other", "domains": ["example.net"]},
        )
    ]
)
_CHALLENGE = re.compile(rb"^334 .*\r\n", re.MULTILINE)


@dataclass
class _Reversed:
    """A session before the reversal with its caller, and what came of it."""

    words: set[bytes]
    heard: bytes = b""
    events: list[object] = field(default_factory=list)

    def run(self, flights: list[bytes], sizes: list[int] | None) -> None:
        self.machine = turn.Turn(
            HOSTNAME, ACCOUNTS, starttls=b"tls" in self.words, tls=b"implicit" in self.words
        )
        self.handshake = self.over = False
        self.heard += self.machine.data_to_send()
        for flight in flights:
            for piece in [flight] if sizes is None else _pieces(flight, sizes):
                self._hear(self.machine.receive_bytes(piece))
                if self.handshake and self.machine.pending:
                    break
                if not self.over and not self.handshake:
                    assert len(self.machine._buffer) < turn.AUTH_LINE, "a line without end"
            if self.handshake and self.machine.pending:
                self.heard = self.heard.removesuffix(b"220 go ahead\r\n") + _INJECTED.encode()
                self.events[-1] = Quit(_INJECTED)
                self.over = True
                return
            if self.handshake:
                self.handshake = False
                self.machine.tls_started()
                self._hear(self.machine.advance())
        if self.over:
            before = len(self.machine._buffer)
            self._hear(self.machine.receive_bytes(b"NOOP\r\n\x00"))
            assert len(self.machine._buffer) <= before, "kept for nobody"

    def _hear(self, events: list[turn.Event]) -> None:
        assert not (self.over and events), "something happens after the end"
        self.events += events
        said = self.machine.data_to_send()
        assert not (self.over and said), "something is said after the end"
        self.heard += said
        for event in events:
            if isinstance(event, turn.AtrnRequest):
                assert set(event.domains) <= set(ACCOUNTS.customer(event.account).domains)
                assert event.domains
                assert b"\r\n235 " in self.heard.rpartition(b"\r\n220 ")[2], "no login"
                code = 250 if b"mail" in self.words else 453
                self.machine.answer(Reply(code, "now"))
                self._hear(self.machine.advance())
                self.over = self.over or code == 250
            elif isinstance(event, turn.StartTls):
                self.handshake = True
            elif isinstance(event, turn.LoginFailed):
                self.machine.refuse_login()
                self._hear(self.machine.advance())
            elif isinstance(event, turn.LoggedIn):
                continue
            else:
                self.over = True


def session(data: bytes) -> None:
    """The provider before the reversal; the input is a hostile customer.

    ``tls``       STARTTLS is offered; ``implicit``: the connection is TLS from the start.
    ``mail``      there is mail: ATRN is answered 250 and not 453.
    """
    words, sizes, dialogue = _read(data)
    flights = _flights(dialogue)
    whole, pieces = _Reversed(words), _Reversed(words)
    whole.run(flights, None)
    said = _said(whole.heard)
    assert len(said) <= b"".join(flights).count(b"\r\n") + 2
    codes = [code for code, _ in said]
    assert codes[0] == 220 and codes.count(535) < turn.MAX_LOGINS
    assert not {221, 421} & set(codes[:-1]), "replies after the last one"
    if b"implicit" not in words and 220 not in codes[1:]:
        assert not re.search(rb"^250.AUTH.*(PLAIN|LOGIN)", whole.heard, re.MULTILINE)
    if 235 in codes:
        words_said = re.split(rb"[ \r\n]+", b"".join(flights))
        assert any(b"secret" in _decoded(word) for word in words_said), "in without the password"
    pieces.run(flights, sizes)
    # A challenge is never twice the same.
    assert _CHALLENGE.sub(b"", pieces.heard) == _CHALLENGE.sub(b"", whole.heard)
    assert pieces.events == whole.events


def _decoded(word: bytes) -> bytes:
    try:
        return base64.b64decode(word)
    except ValueError:
        return b""


# -- before anything else --------------------------------------------------------------------------

_FAMILY = {0x11: ("!4s", ipaddress.IPv4Address, 8), 0x21: ("!16s", ipaddress.IPv6Address, 32)}


def proxy(data: bytes) -> None:
    """A load balancer's header, at once and in pieces, and read a second time.  No options."""
    _, sizes, said = _read(data)
    said = said.replace(MANY, b"x" * 4096)
    heard, known = b"", None
    for piece in _pieces(said, sizes):
        heard += piece
        now = _header(heard)
        assert known is None or now == known, "what follows changes what was said"
        known = now
    assert known == _header(said)
    most = 107 if said.startswith(b"PROXY") else 16 + 4096
    if known is None:
        assert len(said) < most, "it waits without end"
    elif isinstance(known, proxyheader.ProxyHeader):
        assert known.octets <= min(len(said), most)
        assert _header(said[: known.octets - 1]) is None, "a header that is longer than it needs"
        assert known.client == _client(said[: known.octets])


def _header(heard: bytes) -> proxyheader.ProxyHeader | str | None:
    try:
        return proxyheader.read_header(heard)
    except proxyheader.ProxyHeaderError as error:
        return str(error)


def _client(header: bytes) -> tuple[str, int] | None:
    """Read as simply as a header that is right allows."""
    if header.startswith(b"PROXY "):
        words = header.decode("latin-1").split()
        if words[1] == "UNKNOWN":
            return None
        address: object = ipaddress.ip_address(words[2])
        port = int(words[4])
    else:
        shape = _FAMILY.get(header[13])
        if header[12] != 0x21 or shape is None:
            return None
        packed, kind, both = shape
        [octets] = struct.unpack_from(packed, header, 16)
        address = kind(octets)
        [port] = struct.unpack_from("!H", header, 16 + both)
    assert 0 <= port <= 65535
    return str(getattr(address, "ipv4_mapped", None) or address), port


TARGETS: dict[str, Callable[[bytes], None]] = {
    "receiver": receiver,
    "sender": sender,
    "session": session,
    "replies": replies,
    "parser": parser,
    "proxy": proxy,
}
