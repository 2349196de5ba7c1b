"""The server role of SMTP, without I/O (RFC 5321): a session that takes mail.

How it is used.  The caller owns the connection and the time; the machine owns the protocol::

    receiver = Receiver("mail.example.org", Limits(), accept_recipient)
    send(receiver.data_to_send())                      # the 220 greeting
    for event in receiver.receive_bytes(data):         # as often as bytes come
        if isinstance(event, Transaction):             # one whole message
            ...                                        # deliver it, at leisure
            receiver.answer(event, reply)              # only now does the client hear 250
        if isinstance(event, RecipientRequest):        # where that is decided later
            receiver.answer_recipient(event, None)     # or the reply that refuses it
        if isinstance(event, EtrnRequest):             # only where ETRN is offered
            receiver.answer_etrn(reply)                # until then nothing more is read
    for event in receiver.advance(): ...               # what had to wait for the answer
    send(receiver.data_to_send())

How it works: ``commands`` has the theory, and what all server roles share.  Here are the rows of
the table for mail, and the two readers of content: DATA up to CRLF.CRLF, BDAT by its number.

Replies go out in the order of the commands (RFC 2920 3.1), although a transaction is answered by
the caller when it pleases: reading goes on after an unanswered transaction, and the replies to what
was read wait in ``_waiting`` after its place.  ``paused`` says when the caller should stop reading
until something is answered.

A recipient may be decided later, too.  Those of one transaction that were sent ahead are asked for
together; what else comes waits until all are decided, for what it means depends on them: DATA wants
one that was accepted, BDAT throws its octets away without one.  They are accepted or refused in the
order of their RCPTs, whatever the order in which that is decided.

What is content?  Only CRLF.CRLF ends DATA (RFC 5321 4.1.1.4) and only CRLF ends a command: with
any laxer rule a line end that the previous hop took for text ends a message here, and what comes
after it is another message that no one sent (CVE-2023-51764 and its kin).  A bare CR or LF in
content stays where it is; in a command it is an error.  After BDAT come exactly as many octets as
it said, also when the command is refused (RFC 3030 4.2); what becomes of them is decided when the
command comes.

What it costs.  Content is searched and cut in blocks; each octet is copied into the input buffer,
into the message, and out of it, whatever the pieces it came in.  The memory of a session is bounded
by :class:`~salmon_revsmtp.smtp.limits.Limits`, that of many together by the
:class:`~salmon_revsmtp.smtp.budget.Budget` from which each takes what its messages need.  Where
that has no more the client hears 452, and comes again later.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, Final

from salmon_revsmtp.smtp.addresses import AddressError, parse_path
from salmon_revsmtp.smtp.budget import Budget
from salmon_revsmtp.smtp.commands import (
    NOT_IMPLEMENTED,
    OK,
    SEQUENCE,
    SYNTAX,
    CommandError,
    Commands,
    Quit,
    StartTls,
    State,
    Verb,
    stay,
    to,
)
from salmon_revsmtp.smtp.content import Sink
from salmon_revsmtp.smtp.envelope import Client, Envelope
from salmon_revsmtp.smtp.limits import RECIPIENT_COST, SINK_AT, Limits
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.xforward import ATTRIBUTES, told

__all__ = [
    "LATER",
    "EtrnRequest",
    "Event",
    "Later",
    "Quit",
    "Receiver",
    "RecipientRequest",
    "Refused",
    "StartTls",
    "Transaction",
    "Verdict",
]


class Later(Enum):
    """The type of :data:`LATER`."""

    LATER = auto()


#: It is not known yet whether a recipient is accepted.
LATER: Final = Later.LATER

#: What becomes of a recipient: accepted (``None``), refused with a reply, or decided later.
Verdict = Reply | Later | None


@dataclass(frozen=True, eq=False)
class Transaction:
    """A whole message; the client waits for :meth:`Receiver.answer`.

    ``envelope``  its accepted sender and recipients.
    ``data``      its octets as the client meant them: dots unstuffed, line ends as they came
                  (CRLF, and bare CR or LF where there were any).
    ``held``      octets of the session's memory that it takes until it is answered.
    ``sink``      where its octets went while they came, if there were many; then ``data`` has none.
    """

    envelope: Envelope
    data: bytes
    held: int = 0
    sink: Sink | None = None

    @property
    def beginning(self) -> bytes:
        """Its first octets."""
        return self.data if self.sink is None else self.sink.beginning()


@dataclass(frozen=True, eq=False)
class RecipientRequest:
    """Is this recipient accepted?  The client waits for :meth:`Receiver.answer_recipient`.

    ``envelope``   what is known of the transaction: its sender, and the recipients that have been
                   accepted so far.
    ``recipient``  the mailbox.
    ``options``    the parameters of its RCPT.
    ``held``       octets of the envelope that it takes.
    """

    envelope: Envelope
    recipient: str
    options: Mapping[str, str]
    held: int = 0


@dataclass(frozen=True)
class Refused:
    """A sender, recipient or message was refused; the client has the reply already.

    ``recipients`` whom it concerned; empty for a MAIL.
    ``forwarded``  the host that the mail came from, where the client told us of it.
    """

    recipients: tuple[str, ...]
    reply: Reply
    forwarded: Client | None = None


@dataclass(frozen=True)
class EtrnRequest:
    """The client asks us to send the mail that waits for a node (RFC 1985 5).  It waits for
    :meth:`Receiver.answer_etrn`.

    ``argument``  one word: a domain, ``@`` and a domain, or ``#`` and the name of a queue; or
                  anything else that a stranger may write.
    """

    argument: str


Event = Transaction | RecipientRequest | Refused | EtrnRequest | StartTls | Quit

SENDER_OK = Reply(250, "sender ok", "2.1.0")
RECIPIENT_OK = Reply(250, "recipient ok", "2.1.5")
CHUNK_OK = Reply(250, "chunk ok", "2.0.0")
_SEND_DATA = Reply(354, "end the message with <CRLF>.<CRLF>")

_CONNECTED, _IDLE, _MAIL, _RCPT, _CHUNKS = (
    State.CONNECTED,
    State.IDLE,
    State.MAIL,
    State.RCPT,
    State.CHUNKS,
)
_GREETED = (_IDLE, _MAIL, _RCPT, _CHUNKS)
_ANYWHERE = (_CONNECTED, *_GREETED)
_BOUNDARIES = (_CONNECTED, _IDLE, State.HANDSHAKE, State.STARTING, State.CLOSED)

# A letter that is another's other case by Unicode only ("\u017f" is an "s") is not it in SMTP.
_ANY_CASE = re.IGNORECASE | re.ASCII
_RCPT_COMMAND = re.compile(rb"RCPT", re.IGNORECASE)
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
# RFC 5321 4.5.2: a dot that a line begins with is not content.
_STUFFED = b"\r\n."
_OF_A_TRANSACTION = frozenset({"RCPT", "DATA", "BDAT"})
_NO_RECIPIENTS = Reply(554, "no valid recipients", SEQUENCE)
_TOO_MANY_RECIPIENTS = Reply(452, "too many recipients, send the rest again", "4.5.3")
# RFC 3463 3.4: mail system full.  RFC 1870 6.1: the sender tries again later.
_NO_MEMORY = Reply(452, "no memory for more messages now, try again later", "4.3.1")
# The session has ended before it was decided.
_NOT_DECIDED = Reply(451, "this recipient was not decided on, try again later", "4.3.2")


class Receiver(Commands):
    """One SMTP session in the server role.

    ``hostname``          what the greeting and EHLO name.
    ``limits``            what a session may cost.
    ``starttls``          offer STARTTLS (RFC 3207).
    ``accept_recipient``  asked for every RCPT, with the mailbox: ``None`` to accept it, the
                          :class:`Reply` that refuses it, or :data:`LATER`, and there will be a
                          :class:`RecipientRequest`.  It must not block.
    ``etrn``              offer ETRN (RFC 1985).
    ``xforward``          offer XFORWARD, and believe it.  It may be changed before the greeting is
                          answered.

    ``sinks``             makes the place where a large message goes while it comes, given its
                          envelope; without it, the whole of it is kept in memory.

    ``ahead``: the whole messages that are read ahead.  The caller may make it less than the limits
    have, where messages are delivered slowly.

    ``memory``: what its messages are counted in.  It may be changed before the first of them.

    ``client``: the address and port that its envelopes name, if any.
    """

    OUT_OF_ORDER: ClassVar[Mapping[State, str]] = {
        State.CONNECTED: "send EHLO first",
        State.IDLE: "send MAIL first",
        State.MAIL: "a transaction is under way, send RCPT or RSET",
        State.RCPT: "a transaction is under way, send the data or RSET",
        State.CHUNKS: "more BDAT is expected, or RSET",
    }
    # The octets of a chunk come whether or not BDAT is expected (RFC 3030 3): one that is not leads
    # back to where it came.
    ENDS: ClassVar[Mapping[str, Mapping[State, State]]] = {
        **Commands.ENDS,
        "CRLF.CRLF": to(_IDLE, (State.DATA,)),
        "the octets of BDAT": {**stay((_CONNECTED, _IDLE)), **to(_CHUNKS, (_MAIL, _RCPT, _CHUNKS))},
        "the octets of BDAT LAST": {**stay((_CONNECTED,)), **to(_IDLE, _GREETED)},
        "a transaction without recipients": to(_IDLE, (_IDLE, _MAIL)),
        "the answer to ETRN": to(_IDLE, (State.STARTING,)),
        "a recipient's acceptance": to(_RCPT, (_MAIL, _RCPT)),
    }
    # With a recipient accepted the message is as good as in hand: a 421 that answers the next RCPT,
    # and no answer to DATA, is to Exim 4.100.1 the success of the recipients before.
    NO_BOUNDARY = frozenset({State.RCPT, State.DATA, State.CHUNK, State.CHUNKS, State.CLOSED})

    def __init__(
        self,
        hostname: str,
        limits: Limits | None = None,
        accept_recipient: Callable[[str], Verdict] = lambda mailbox: None,
        *,
        starttls: bool = False,
        etrn: bool = False,
        xforward: bool = False,
        memory: Budget | None = None,
        sinks: Callable[[Envelope], Sink] | None = None,
    ) -> None:
        limits = limits or Limits()
        self._sinks = sinks
        self._sink: Sink | None = None
        self._line = 0  # octets of the line that the sink has not got to its end
        self._long_line = False
        self._begun = 0  # octets that the sink keeps in memory
        self._accept_recipient = accept_recipient
        self.ahead = limits.unanswered_messages
        self.client: tuple[str, int] | None = None
        self.xforward = xforward
        # Of the client of the next transaction, or of this one.
        self._told: dict[str, Any] = {}
        self.memory = memory or Budget()
        # In the order of the commands: transactions without an answer, and replies after them.
        self._waiting: deque[Transaction | RecipientRequest | bytearray] = deque()
        self._unanswered_messages = 0
        self._unanswered_octets = 0
        self._unanswered_sunk = 0
        self._refusals = 0  # since a message was taken
        self._etrn = etrn
        self._requests = 0  # ETRNs
        self._mail_refused = False  # the last MAIL
        self._cut_short = False  # the client was sent away with recipients accepted

        # Recipients that are decided later, in the order of their RCPTs, and what was decided.
        self._asked: dict[RecipientRequest, Verdict] = {}
        self._held_up = False  # what has come waits for them

        self._sender = ""
        self._recipients: list[str] = []
        self._mail_options: dict[str, str] = {}
        self._rcpt_options: dict[str, Mapping[str, str]] = {}
        self._content = bytearray()
        self._envelope = 0  # octets that it costs
        self._held = 0  # octets of memory that the transaction takes
        self._no_memory = False  # for its content
        self._stuffed = False  # what is here of it may have a dot that is not content
        # Octets of content (RFC 1870 4: without stuffed dots), also those that were thrown away.
        self._size = 0
        self._chunks = 0
        self._chunk_left = 0  # octets
        self._keep_chunk = False
        self._after_chunk = State.CHUNKS
        self._end_chunk: Callable[[Receiver], None] = Receiver._chunk_taken
        super().__init__(hostname, limits, f"{hostname} ESMTP", starttls=starttls)

    def _reset(self) -> None:
        """Forget the transaction (RFC 5321 4.1.1.5)."""
        if self._asked:
            self._forget_asked()
        self._sender = ""
        self._recipients = []
        self._mail_options = {}
        self._rcpt_options = {}
        self._content = bytearray()
        self._envelope = self._size = self._chunks = 0
        self._no_memory = self._stuffed = False
        self._told = {}
        self._drop_sink()
        self._let_go()

    def _forget_asked(self) -> None:
        """No one is interested any more in who is accepted."""
        for request in self._asked:
            self._put_in_place(request, _NOT_DECIDED.encode())
        self._asked.clear()
        self._held_up = False

    def _drop_sink(self) -> None:
        """What went into it is no message."""
        if self._sink is not None:
            self._sink.discard()
            self._sink = None
        self._line, self._long_line, self._begun = 0, False, 0

    def _let_go(self) -> None:
        """Give the transaction's memory back."""
        if self._held:
            self.memory.give(self._held)
            self._held = 0

    # -- what the caller sees ---------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Enough is unanswered: stop reading until :meth:`answer`, :meth:`answer_recipient` or
        :meth:`answer_etrn` (bytes that come all the same are kept)."""
        return (
            self._state is State.STARTING
            or self._held_up
            or self._unanswered_messages >= self.ahead
            or self._unanswered_octets > self.limits.unanswered_octets
            or self._unanswered_sunk >= self.limits.unanswered_sunk
        )

    @property
    def closed(self) -> bool:
        """The session is over and every reply is in :meth:`data_to_send`: close the connection."""
        return self._state is State.CLOSED and not self._waiting

    @property
    def at_boundary(self) -> bool:
        """No transaction is under way, and none waits for its answer."""
        return self._state in _BOUNDARIES and not self._waiting

    @property
    def owes_an_answer(self) -> bool:
        """Recipients were accepted, and what became of their message has not been said; of what is
        said after a 421 nothing is."""
        return bool(self._recipients) or self._cut_short or self._unanswered_messages > 0

    def answer(self, transaction: Transaction, reply: Reply, each: Sequence[Reply] = ()) -> None:
        """Answer a transaction.  :meth:`advance` then goes on with what waited for that.

        ``each`` is one reply per recipient, in order, and is sent when the client asked for that
        (PRDR): ``353``, each, then ``reply`` (draft-hall-prdr 3).  Raises :class:`KeyError` for a
        transaction that has been answered, or is not of this session.
        """
        answer = reply.encode()
        if each and transaction.envelope.prdr:
            replies = [Reply(353, "one reply per recipient follows"), *each, reply]
            answer = b"".join(one.encode() for one in replies)
        if not self._put_in_place(transaction, answer):
            raise KeyError("this transaction is answered, or of another session")
        self._unanswered_messages -= 1
        self._unanswered_octets -= transaction.held
        self._unanswered_sunk -= transaction.sink is not None
        self.memory.give(transaction.held)

    def _put_in_place(self, one: Transaction | RecipientRequest, answer: bytes) -> bool:
        """This goes out in its turn; ``False`` where it does not wait any more."""
        waiting = self._waiting
        if waiting and waiting[0] is one and len(waiting) == 1:  # as a rule
            waiting.popleft()
            self._ready += answer
            return True
        try:
            place = waiting.index(one)
        except ValueError:
            return False
        waiting[place] = bytearray(answer)
        self._unanswered_octets += len(answer)
        while waiting and isinstance(data := waiting[0], bytearray):
            waiting.popleft()
            self._unanswered_octets -= len(data)
            self._ready += data
        return True

    def answer_recipient(self, request: RecipientRequest, reply: Reply | None) -> None:
        """Accept a recipient (2yz; ``None``: in our own words), or refuse it.  :meth:`advance` then
        goes on with what waited for that.  One that no one waits for any more is ignored."""
        if self._asked.get(request) is not LATER:
            return
        self._asked[request] = reply
        while self._asked:
            first, verdict = next(iter(self._asked.items()))
            if isinstance(verdict, Later):
                return
            del self._asked[first]
            self._decide(first, verdict)
        self._held_up = False

    def _decide(self, request: RecipientRequest, reply: Reply | None) -> None:
        """What becomes of the first recipient that was asked for."""
        reply = reply or RECIPIENT_OK
        self._put_in_place(request, reply.encode())
        if reply.positive:
            self._recipients.append(request.recipient)
            self._rcpt_options[request.recipient] = request.options
            self._over("a recipient's acceptance")
        else:
            self._envelope -= request.held
            self._refuse((request.recipient,), reply)

    def answer_etrn(self, reply: Reply) -> None:
        """Answer an ETRN.  :meth:`advance` then goes on with what has come since.  One that its
        client should not have sent, or not so (5yz), counts as an error."""
        if self._state is not State.STARTING:  # the session has ended meanwhile
            return
        self._over("the answer to ETRN")
        if reply.permanent:
            self._refuse_command(reply)
        else:
            self._reply(reply)

    # -- replies ------------------------------------------------------------------------------

    def _reply(self, reply: Reply) -> None:
        data = reply.encode()
        if not self._waiting:
            self._ready += data
            return
        self._unanswered_octets += len(data)
        last = self._waiting[-1]
        if isinstance(last, bytearray):
            last += data
        else:
            self._waiting.append(bytearray(data))

    def _close(self, reply: Reply) -> None:
        self._cut_short = reply.transient and bool(self._recipients)
        self._reset()
        super()._close(reply)

    def tls_started(self) -> None:
        super().tls_started()
        self._told = {}

    def lost(self) -> None:
        """The connection is gone: no reply will be heard, and a message that was not whole is none.
        What waits for its answer still does."""
        self._state = State.CLOSED
        self._buffer.clear()
        self._reset()
        self._ready.clear()
        self._sinks = None  # which may know the session

    def _refuse(
        self, recipients: tuple[str, ...], reply: Reply, forwarded: Client | None = None
    ) -> Reply | None:
        """A refusal that is policy and not the client's error: the client knows more than before,
        and goes on with what else it has."""
        self._events.append(Refused(recipients, reply, forwarded or self._forwarded))
        return self._go_on_with(reply)

    def _refuse_mail(self, reply: Reply) -> Reply | None:
        """The same for a MAIL: what was said of its client is over with it, as at Postfix."""
        self._mail_refused = True
        said = self._refuse((), reply)
        self._told = {}
        return said

    def _go_on_with(self, reply: Reply) -> Reply | None:
        """``reply``, unless there were enough refusals in a row."""
        self._junk = 0
        self._refusals += 1
        if self._refusals > self.limits.refusals:
            too_many = Reply(421, f"{self.limits.refusals} refusals in a row, closing", "4.7.0")
            self._close(too_many)
            return None
        return reply

    def _wrong(self, name: str, reply: Reply) -> None:
        """After a MAIL that was refused, what a client has sent ahead for it is no error of the
        client's (RFC 2920 3.1).  A sender or a recipient that is refused for its form is one, and a
        refusal all the same."""
        if self._mail_refused and name in _OF_A_TRANSACTION and reply.code == 503:
            self._say(self._go_on_with(reply))
            return
        if name in ("MAIL", "RCPT") and reply.code != 503:
            self._events.append(Refused((), reply, self._forwarded))
        if name == "MAIL" and reply.code != 503:
            self._mail_refused = True
        # What is not recognized between transactions may have been the MAIL that it was said for.
        unknown = reply.code == 500 and self._state is _IDLE
        if unknown or (name == "MAIL" and reply.code != 503):
            self._told = {}
        self._refuse_command(reply)

    def _say(self, reply: Reply | None) -> None:
        """A reply to the end of content, unless the session has ended instead."""
        if reply is not None:
            self._reply(reply)

    # -- True if anything was consumed: a command in a transaction ----------------------------

    def _read_command(self) -> bool:
        """The next line is a command; while recipients are decided on, only if it is a RCPT."""
        if self._asked and not _RCPT_COMMAND.match(self._buffer):
            # Of less than a word it is not known yet.
            self._held_up = len(self._buffer) >= len("RCPT")
            return False
        return self._read_line()

    # -- content: True if anything was consumed ---------------------------------------------

    def _read_data(self) -> bool:
        # Search from where an end of data may begin in what was there before.
        old = len(self._content)
        start = max(0, old - 4)
        self.content_octets += len(self._buffer)
        self._content += self._buffer
        self._buffer.clear()
        # What every end of data begins with, and few other lines do, is looked for once.
        dot = self._content.find(_STUFFED, start)
        end = self._content.find(_END_OF_DATA, dot) if dot >= 0 else -1
        if end < 0:
            stuffed = 0
            if dot >= 0:
                # Of a dot before the last two octets it is known that it is not the end of data.
                stuffed = self._content.count(_STUFFED, dot, max(dot, len(self._content) - 2))
                self._stuffed = True
            self._size += len(self._content) - old - stuffed
            # Surely too big, whatever part of this is the end of data already.
            if self._size > self.limits.message + len(_END_OF_DATA) or not self._room():
                del self._content[:-4]
                self._drop_sink()
                self._let_go()
            elif self._sinks is not None and len(self._content) > SINK_AT:
                self._empty(self._stuffed_content())
            if self._size > self._read_through + len(_END_OF_DATA):
                self._close(self._far_too_big())
            return False
        self._buffer += memoryview(self._content)[end + 5 :]
        stuffed = self._content.count(_STUFFED, dot, end + 2)
        self._stuffed = self._stuffed or stuffed > 0
        self._size += end + 2 - old - stuffed
        del self._content[end + 2 :]
        if self._sink is None:
            del self._content[: 3 if self._content.startswith(_STUFFED) else 2]
        self._size -= 2
        if self._size > self._read_through:
            self._close(self._far_too_big())
            return True
        content = b""
        if self._size <= self.limits.message and self._room():
            content = bytes(self._content)
            self._content.clear()  # a large message is here twice at most
            if self._stuffed:
                content = content.replace(_STUFFED, b"\r\n")
        self.steps += 1
        self._over("CRLF.CRLF")
        self._finish(content)
        return True

    def _stuffed_content(self) -> bytes:
        """Take what is here of DATA, but for its last line: what begins there may be its end, or a
        dot that is not content."""
        content = self._content
        cut = content.rfind(b"\r\n", 0, len(content) - 4)
        if cut <= 0:  # a very long line
            cut = len(content) - 4
            cut -= content[cut - 1 : cut + 1] == b"\r\n"
        block = bytes(memoryview(content)[:cut])
        del content[:cut]
        if self._stuffed:
            block = block.replace(_STUFFED, b"\r\n")
            self._stuffed = _STUFFED in content
        return block if self._sink is not None else block[2:]  # the CRLF of DATA itself

    def _empty(self, block: bytes) -> None:
        """Content goes into a sink, and its memory is given back."""
        if self._sink is None:
            assert self._sinks is not None
            self._sink = self._sinks(self._so_far())
        self._count_line(block)
        self._sink.write(block)
        self._begun = len(self._sink.beginning())
        spare = self._held - self._envelope - len(self._content) - self._begun
        if spare > 0:
            self.memory.give(spare)
            self._held -= spare

    def _count_line(self, block: bytes) -> None:
        """Whether there is a line that is too long, over what the sink has got so far."""
        first, limit = block.find(b"\n"), self.limits.text_line
        if first < 0:
            self._line += len(block)
        else:
            self._long_line = self._long_line or self._line + first >= limit
            self._line = len(block) - block.rfind(b"\n") - 1
        self._long_line = self._long_line or self._line > limit or _has_long_line(block, limit)

    def _room(self) -> bool:
        """There is memory for what has come of the message.  Once there was none it is lost,
        whatever is given back later."""
        if self._no_memory:
            return False
        more = self._envelope + len(self._content) + self._begun - self._held
        if more > 0 and not self.memory.take(more):
            self._no_memory = True
            return False
        self._held += max(more, 0)
        return True

    def _read_chunk(self) -> bool:
        take = min(self._chunk_left, len(self._buffer))
        if self._keep_chunk:
            self._content += memoryview(self._buffer)[:take]
            self._keep_chunk = self._room()
            if not self._keep_chunk:
                self._content.clear()
                self._drop_sink()
                self._let_go()
            elif self._sinks is not None and len(self._content) > SINK_AT:
                self._empty(self._whole_content())
        del self._buffer[:take]
        self.content_octets += take
        self._chunk_left -= take
        if self._chunk_left == 0:
            self._end_of_chunk()
        return True

    READERS: ClassVar[Mapping[State, Callable[[Any], bool]]] = {
        **dict.fromkeys(_ANYWHERE, Commands._read_line),
        **dict.fromkeys((_MAIL, _RCPT), _read_command),
        State.DATA: _read_data,
        State.CHUNK: _read_chunk,
        State.HANDSHAKE: Commands._read_nothing,
        State.STARTING: Commands._read_nothing,
        State.CLOSED: Commands._ignore,
    }

    # -- commands ---------------------------------------------------------------------------

    def _keywords(self) -> Iterable[str]:
        return (
            f"SIZE {self.limits.message}",
            "8BITMIME",
            "PIPELINING",
            "ENHANCEDSTATUSCODES",
            "CHUNKING",
            "SMTPUTF8",
            "PRDR",
            "HELP",
            *(("ETRN",) if self._etrn else ()),
            *((f"XFORWARD {' '.join(ATTRIBUTES)}",) if self.xforward else ()),
            *super()._keywords(),
        )

    def _greet(self, argument: str, *, esmtp: bool) -> None:
        super()._greet(argument, esmtp=esmtp)
        self._reset()

    def _on_rset(self, argument: str) -> Reply:
        reply = super()._on_rset(argument)
        self._reset()
        return reply

    def _on_starttls(self, argument: str) -> Reply | None:
        if self._waiting and self._starttls:
            raise CommandError(503, "wait for the answer to your mail", SEQUENCE)
        return super()._on_starttls(argument)

    def _on_mail(self, argument: str) -> Reply | None:
        mailbox, options = self._path("FROM", argument, _MAIL_PARAMETERS)
        if not mailbox.isascii() and "SMTPUTF8" not in options:
            raise CommandError(553, "a UTF-8 address needs SMTPUTF8", "5.6.7")
        size = int(options.get("SIZE", "0"))
        if size > self.limits.message:
            return self._refuse_mail(self._too_big())  # RFC 1870 6.1
        if not self.memory.room_for(len(argument) + max(size, 1)):
            return self._refuse_mail(_NO_MEMORY)
        self._envelope = len(argument)
        self._sender, self._mail_options = mailbox, options
        self._mail_refused = False
        return SENDER_OK

    def _on_rcpt(self, argument: str) -> Reply | None:
        mailbox, options = self._path("TO", argument, _RCPT_PARAMETERS)
        if not mailbox:
            raise CommandError(501, "a recipient cannot be <>", "5.1.3")
        if not mailbox.isascii() and "SMTPUTF8" not in self._mail_options:
            raise CommandError(553, "a UTF-8 address needs SMTPUTF8", "5.6.7")
        before = len(self._recipients) + len(self._asked)
        if before >= self.limits.recipients:
            return self._refuse((mailbox,), _TOO_MANY_RECIPIENTS)
        verdict = self._accept_recipient(mailbox)
        if verdict is not None and verdict is not LATER:
            return self._refuse((mailbox,), verdict)
        held = len(argument) + RECIPIENT_COST
        envelope = self._envelope + held
        if before and envelope > self.limits.envelope:
            return self._refuse((mailbox,), _TOO_MANY_RECIPIENTS)
        self._envelope = envelope
        if verdict is not None or self._asked:
            self._ask(RecipientRequest(self._so_far(), mailbox, options, held), verdict)
            return None
        self._recipients.append(mailbox)
        self._rcpt_options[mailbox] = options
        return RECIPIENT_OK

    def _ask(self, request: RecipientRequest, verdict: Later | None) -> None:
        """It is decided later; one that is accepted now has its turn after those before it."""
        self._asked[request] = verdict
        self._waiting.append(request)
        if verdict is LATER:
            self._events.append(request)

    def _so_far(self) -> Envelope:
        """The envelope of the transaction that is under way.  The options of later recipients are
        added to it as they come."""
        forwarded = self._forwarded if self._told else None
        return Envelope(
            self._sender,
            tuple(self._recipients),
            self._mail_options,
            self._rcpt_options,
            self._helo if forwarded is None else forwarded.helo,
            self._esmtp,
            forwarded or self._client(),
            "" if forwarded is None else self._helo,
        )

    def _path(
        self, keyword: str, argument: str, known: Mapping[str, re.Pattern[str]]
    ) -> tuple[str, dict[str, str]]:
        """``FROM:<path> parameters`` -> mailbox and parameters."""
        if argument[: len(keyword) + 1].upper() != keyword + ":":
            raise CommandError(501, f"{keyword}:<address> is expected", SYNTAX)
        try:
            mailbox, rest = parse_path(argument[len(keyword) + 1 :])
        except AddressError:
            status = "5.1.7" if keyword == "FROM" else "5.1.3"
            raise CommandError(501, "malformed address, expected <user@domain>", status) from None
        if keyword == "TO" and "@" not in mailbox and mailbox.lower() not in ("", "postmaster"):
            raise CommandError(501, "an address needs a domain", "5.1.3")
        if rest and not self._esmtp:
            raise CommandError(555, "parameters need EHLO", SYNTAX)
        return mailbox, _parameters(rest, known)

    def _no_recipients(self) -> Reply | None:
        """RFC 5321 3.3: all were refused.  The client is not at fault, and the transaction is over
        for it: it may go on with MAIL or with RSET."""
        self._reset()
        self._over("a transaction without recipients")
        return self._unproductive(_NO_RECIPIENTS)

    def _on_data(self, argument: str) -> Reply | None:
        if argument:
            raise CommandError(501, "DATA takes no argument", SYNTAX)
        if not self._recipients:
            return self._no_recipients()
        if not self.memory.room_for(1):
            return self._refuse(tuple(self._recipients), _NO_MEMORY)
        # A lone dot may be the very first line: the CRLF of DATA itself goes before it.
        self._content += b"\r\n"
        self._size = 2
        return _SEND_DATA

    def _on_bdat(self, argument: str) -> None:
        found = _BDAT.fullmatch(argument)
        if not found:
            # There is no telling where the octets end: whatever comes next may be content.
            self._close(Reply(421, "BDAT takes a number of octets and LAST, closing", "4.5.4"))
            return
        octets, last = int(found[1]), found[2] is not None
        self._chunks += 1
        if self._size + octets > self._read_through:
            self._close(self._far_too_big())
        elif self._chunks > self.limits.chunks:
            self._close(Reply(421, f"more than {self.limits.chunks} chunks, closing", "4.7.0"))
        else:
            self._begin_chunk(octets, last)

    def _begin_chunk(self, octets: int, last: bool) -> None:
        """Decide what becomes of a chunk: whether its octets are kept, and what their end means
        (RFC 3030 3, 4.2)."""
        fits = self._size + octets <= self.limits.message
        self._size += octets
        self._chunk_left = octets
        self._keep_chunk = bool(self._recipients) and fits and not self._no_memory
        leads = self.ENDS["the octets of BDAT LAST" if last else "the octets of BDAT"]
        self._after_chunk = leads[self._state]
        if self._state in (State.CONNECTED, State.IDLE):
            self._end_chunk = Receiver._chunk_out_of_order
        elif last:
            taken = Receiver._message_taken
            self._end_chunk = taken if self._recipients else Receiver._message_for_no_one
        elif self._keep_chunk:
            self._end_chunk = Receiver._chunk_taken if octets else Receiver._empty_chunk_taken
        else:
            self._end_chunk = Receiver._chunk_refused
        self._state = State.CHUNK
        if octets == 0:
            if self._keep_chunk:
                self._room()  # for the envelope
            self._end_of_chunk()

    def _end_of_chunk(self) -> None:
        self.steps += 1
        self._state = self._after_chunk
        self._end_chunk(self)

    def _chunk_out_of_order(self) -> None:
        self._reset()
        self._wrong("BDAT", Reply(503, self.OUT_OF_ORDER[self._state], SEQUENCE))

    def _chunk_taken(self) -> None:
        if self._no_memory:
            self._chunk_refused()
        else:
            self._reply(CHUNK_OK)

    def _empty_chunk_taken(self) -> None:
        self._say(self._unproductive(CHUNK_OK))

    def _chunk_refused(self) -> None:
        """The message is lost, whatever else comes of it (RFC 3030 4.2)."""
        self._content.clear()
        self._drop_sink()
        self._let_go()
        if not self._recipients:
            self._reply(_NO_RECIPIENTS)
        else:
            too_big = self._size > self.limits.message
            self._reply(self._too_big() if too_big else _NO_MEMORY)

    def _whole_content(self) -> bytes:
        """Take what is here of BDAT."""
        block = bytes(self._content)
        self._content.clear()
        return block

    def _message_taken(self) -> None:
        self._finish(self._whole_content())

    def _message_for_no_one(self) -> None:
        self._say(self._no_recipients())

    def _finish(self, content: bytes) -> None:
        """The whole message is here."""
        envelope = self._so_far()
        if self._sink is not None:
            self._empty(content)
            content = b""
        if refusal := self._content_refusal(content):
            self._reset()
            self._say(self._refuse(envelope.recipients, refusal, envelope.forwarded))
            return
        transaction = Transaction(envelope, content, self._held, self._sink)
        self._held, self._sink = 0, None  # they are the transaction's now
        self._waiting.append(transaction)
        self._unanswered_messages += 1
        self._unanswered_octets += transaction.held
        self._unanswered_sunk += transaction.sink is not None
        self._events.append(transaction)
        self._junk = self._refusals = 0
        self._reset()

    @property
    def _forwarded(self) -> Client | None:
        """The host that the mail comes from, where we were told of it; then nothing of it is filled
        in from the connection (XFORWARD_README).  IDENT is of the message: by itself it says
        nothing of a host."""
        return Client(**self._told) if self._told.keys() - {"ident"} else None

    def _client(self) -> Client | None:
        """The host that sends us the mail."""
        ident = self._told.get("ident", "")
        if self.client is None:
            return Client(ident=ident) if ident else None
        protocol = "ESMTP" if self._esmtp else "SMTP"
        return Client(*self.client, protocol=protocol, helo=self._helo, ident=ident)

    def _content_refusal(self, content: bytes) -> Reply | None:
        if self._size > self.limits.message:
            return self._too_big()
        if self._no_memory:
            return _NO_MEMORY
        if self._long_line or _has_long_line(content, self.limits.text_line):
            return Reply(554, f"a line of more than {self.limits.text_line} octets", "5.6.0")
        return None

    @property
    def _read_through(self) -> int:
        return max(self.limits.read_through, self.limits.message)

    def _far_too_big(self) -> Reply:
        """No 552: no one waits for the end of it to say so."""
        text = f"{self.limits.message} octets are taken, not this many, closing"
        return Reply(421, text, "4.3.4")

    def _too_big(self) -> Reply:
        return Reply(552, f"more than {self.limits.message} octets are not taken", "5.3.4")

    def _on_vrfy(self, argument: str) -> Reply:
        if not argument:
            raise CommandError(501, "VRFY takes an address", SYNTAX)
        # RFC 5321 3.5.3: we do not say who is there.
        return Reply(252, "send some mail, we will try to deliver it", "2.5.0")

    def _on_etrn(self, argument: str) -> None:
        if not self._etrn:
            raise CommandError(*NOT_IMPLEMENTED)
        if not self._esmtp:
            raise CommandError(503, "send EHLO first", SEQUENCE)
        if not argument or " " in argument:
            raise CommandError(501, "ETRN takes one name", SYNTAX)  # RFC 1985 5.2
        self._requests += 1
        if self._requests > self.limits.requests:
            self._close(Reply(421, f"more than {self.limits.requests} ETRN, closing", "4.7.0"))
            return
        self._state = State.STARTING
        self._events.append(EtrnRequest(argument))

    def _on_xforward(self, argument: str) -> Reply:
        """Several add up; they hold for one transaction."""
        if not self.xforward:
            raise CommandError(550, "not authorized to use XFORWARD", "5.7.0")
        try:
            self._told.update(told(argument))
        except ValueError as error:
            raise CommandError(501, str(error), SYNTAX) from None
        return OK

    # RFC 5321 4.1.4, RFC 3030 3, RFC 3207 4, RFC 1985 5, XFORWARD_README.
    VERBS: ClassVar[Mapping[str, Verb]] = {
        # verb      may come in, and leads to                     by
        "EHLO": Verb(to(_IDLE, _ANYWHERE), Commands._on_ehlo, junk=True),
        "HELO": Verb(to(_IDLE, _ANYWHERE), Commands._on_helo, junk=True),
        "MAIL": Verb(to(_MAIL, (_IDLE,)), _on_mail),
        "RCPT": Verb(to(_RCPT, (_MAIL, _RCPT)), _on_rcpt),
        "DATA": Verb(to(State.DATA, (_MAIL, _RCPT)), _on_data),
        "BDAT": Verb(to(State.CHUNK, _ANYWHERE), _on_bdat),
        "RSET": Verb({**stay((_CONNECTED,)), **to(_IDLE, _GREETED)}, _on_rset, junk=True),
        "NOOP": Verb(stay(_ANYWHERE), Commands._on_noop, junk=True),
        "VRFY": Verb(stay(_GREETED), _on_vrfy, junk=True),
        "ETRN": Verb(to(State.STARTING, (_IDLE,)), _on_etrn),
        # It may stand before each MAIL.
        "XFORWARD": Verb(stay((_IDLE,)), _on_xforward, junk=True),
        "HELP": Verb(stay(_ANYWHERE), Commands._on_help, junk=True),
        "QUIT": Verb(to(State.CLOSED, _ANYWHERE), Commands._on_quit),
        # RFC 3207 4 allows it elsewhere too; no one needs that.
        "STARTTLS": Verb(to(State.HANDSHAKE, (_IDLE,)), _on_starttls),
    }


def _parameters(text: str, known: Mapping[str, re.Pattern[str]]) -> dict[str, str]:
    """The ESMTP parameters of MAIL or RCPT (RFC 5321 4.1.2)."""
    options: dict[str, str] = {}
    for word in filter(None, text.split(" ")):  # and not at what Unicode calls a space
        found = _PARAMETER.fullmatch(word)
        if not found:
            raise CommandError(501, "malformed parameter, expected KEY=VALUE", SYNTAX)
        key, value = found[1].upper(), found[2] or ""
        if key not in known:
            raise CommandError(555, f"parameter {key[:40]} not implemented", SYNTAX)
        if key in options:
            raise CommandError(501, f"parameter {key} twice", SYNTAX)
        if not known[key].fullmatch(value):
            raise CommandError(501, f"parameter {key} has a wrong value", SYNTAX)
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
