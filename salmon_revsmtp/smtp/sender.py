"""The client role of SMTP, without I/O (RFC 5321).

How it is used, the mirror of ``receiver``::

    sender = Sender("odmr.example.net")
    sender.send(Outgoing(key, envelope, data))         # as often as there are messages
    sender.quit()
    for event in sender.receive_bytes(data):           # as often as bytes come
        if isinstance(event, Sent): ...                # what became of a message
        if isinstance(event, BeginTls): ...            # do the handshake, say tls_started()
    write(sender.data_to_send())

How it works.  Commands wait in ``_commands``, each with the method that takes its reply; those that
have been written wait for their replies in ``_expected``, in the same order.  ``_pump`` moves
commands from one to the other: all of them where the peer does PIPELINING (RFC 2920), one at a
time where not, and none past a command after which the client must wait.  The table ``REPLIES`` has
a row for each command: the replies that may come to it, whether anything may be written before they
are here, and what it means.  Any other reply breaks the session.

Transactions wait for their answers in ``_under_way``.  As a rule there is one at a time.  A peer
that does PIPELINING and CHUNKING gets several, whole, without a wait between them: neither BDAT
nor its content ends a group of commands (RFC 2920 3.1, RFC 3030), so a message costs no round trip.
Replies come in the order of the commands: the first under way is always the one that is answered,
and what breaks the session leaves it and all after it without a :class:`Sent`.

What is written ahead of an answer must be right whatever the answer is.  A peer that has refused
every recipient may still be in that transaction, refuse the next MAIL, and take the message after
it from the sender of this one; so RSET goes before a MAIL that is written ahead (RFC 5321 4.1.1.5).

A peer that lists XFORWARD is told before MAIL which host the message came from.  It is told anew
for each message, because the end of a transaction, and RSET, have it forget.  No message waits for
the reply, and none is lost if that is a refusal.

Content leaves here with CRLF line ends and nothing else, dot-stuffed for DATA, counted for BDAT: no
next hop, however lax, can find the end of the message anywhere but at its end.  A message with a
line that is a lone dot but for NULs (RFC 6152 3 has no NULs at all) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from salmon_revsmtp.smtp.addresses import parse_path
from salmon_revsmtp.smtp.content import PIECE, Content, Octets
from salmon_revsmtp.smtp.envelope import Client, Envelope
from salmon_revsmtp.smtp.limits import AheadLimits
from salmon_revsmtp.smtp.replies import Reply, ReplyError, ReplyParser
from salmon_revsmtp.smtp.xforward import ATTRIBUTES, command_lines

__all__ = [
    "BeginTls",
    "Broken",
    "Closed",
    "Event",
    "NotForwarded",
    "Outgoing",
    "Ready",
    "Sender",
    "Sent",
]

# RFC 5321 4.1.2 esmtp-param, with RFC 6531's UTF-8.
_WORD = re.compile(r"[A-Z]+=[^\x00-\x20=\x7f]+")

_NO_NUL = Reply(554, "a line of the message is a dot hidden by NULs", "5.6.0")
_NO_8BIT = Reply(554, "the message has 8-bit octets and the peer takes none", "5.6.3")
_NO_UTF8 = Reply(553, "the message needs SMTPUTF8 and the peer has it not", "5.6.7")
_NO_ENVELOPE = Reply(553, "no SMTP command can carry this envelope", "5.1.0")
# XFORWARDs that may be on their way to a peer that has not taken one.  It may refuse each, and
# servers send a client away after some errors: Postfix, and ours, after 20.
UNTRIED = 8

# Octets of a piece that is written together with those beside it.
SMALL = 1024

_NO_REPLY = Reply(451, "the peer answered nothing", "4.4.2")


@dataclass(frozen=True, eq=False)
class Outgoing:
    """A message to send; ``key`` is the caller's name for it.  ``data`` may be anything that is
    :class:`~salmon_revsmtp.smtp.content.Content`: then it is read while it goes out.  With
    ``None``, the peer is asked whom it would take a message for (MAIL, RCPT and RSET)."""

    key: Hashable
    envelope: Envelope
    data: bytes | Content | None


@dataclass(frozen=True)
class BeginTls:
    """The peer is ready for TLS: see that nothing is ``pending``, do the handshake, call
    :meth:`Sender.tls_started`.  Only where ``starttls`` was asked for."""


@dataclass(frozen=True)
class Ready:
    """The peer has greeted; ``extensions`` are its EHLO keywords with their parameters."""

    extensions: dict[str, str]


@dataclass(frozen=True)
class Sent:
    """What became of a message: one reply per recipient, in the envelope's order.

    There is one for each message, in the order in which they were sent.

    ``asked``  the peer was asked; if not, this is what we know of what it can take.
    """

    message: Outgoing
    replies: tuple[Reply, ...]
    asked: bool = True


@dataclass(frozen=True)
class NotForwarded:
    """The peer lists XFORWARD, and refuses one.  The message goes on, as if it came from us.  There
    is one of these in a session at most."""

    reply: Reply


@dataclass(frozen=True)
class Closed:
    """The peer answered our QUIT."""


@dataclass(frozen=True)
class Broken:
    """The session cannot go on; messages without a :class:`Sent` were not taken.

    ``reason``  a sentence's end.
    ``said_so`` the peer closes with a 421: it is not that it cannot bear what we sent.
    """

    reason: str
    said_so: bool = False


Event = BeginTls | Ready | Sent | NotForwarded | Closed | Broken

_OnReply = Callable[[Reply], None]


class Expected(NamedTuple):
    """A row of the table of replies.

    ``codes``  the replies that may come (RFC 5321 4.3.2); a 421 may come to anything (3.8).
    ``wait``   nothing may be written after it until its reply is here.
    """

    codes: Set[int]
    wait: bool = False


_2YZ, _4YZ, _5YZ = (frozenset(range(first, first + 100)) for first in (200, 400, 500))
_FINAL = _2YZ | _4YZ | _5YZ

#: What may come to what we say.
REPLIES: Mapping[str, Expected] = {
    "the connection": Expected({220}, wait=True),
    "EHLO": Expected(_2YZ | _5YZ, wait=True),  # 5yz: an old server (RFC 5321 3.2)
    "HELO": Expected(_2YZ, wait=True),
    "LHLO": Expected(_2YZ, wait=True),  # RFC 2033 4.1: there is no older one
    "STARTTLS": Expected({220} | _4YZ | _5YZ, wait=True),  # RFC 3207 4
    "XFORWARD": Expected(_FINAL),  # whatever it is, the mail goes on
    "MAIL": Expected(_FINAL),
    "RCPT": Expected(_FINAL),
    # Without the data having been sent, no 2yz can say that the message was taken.
    "DATA": Expected({354} | _4YZ | _5YZ, wait=True),
    # 353: a reply per recipient follows (draft-hall-prdr 3).
    "the message": Expected({353} | _FINAL),
    "BDAT": Expected({353} | _FINAL),
    "353": Expected(_FINAL),
    "RSET": Expected(_2YZ),
    "NOOP": Expected(_FINAL),  # whatever it is, the peer is there
    "QUIT": Expected(_FINAL, wait=True),
}


@dataclass
class _Command:
    name: str  # its row in REPLIES
    pieces: tuple[bytes, ...]
    on_reply: _OnReply
    content: Iterator[bytes] | None = None  # after the pieces, as there is room for it


class _Transaction:
    """A message under way, and what has been said of each recipient.

    ``octets``  of its content, as it is sent.
    ``over``    all has been said of it; it only waits for those before it.
    ``asked``   it has gone to the peer.
    """

    def __init__(self, message: Outgoing, octets: int) -> None:
        self.message = message
        self.octets = octets
        self.replies: dict[int, Reply] = {}
        self.accepted: list[int] = []
        self.sender_refused = False
        self.over = False
        self.asked = False

    def refuse(self, reply: Reply) -> None:
        """The reply is that to every recipient."""
        self.replies = dict.fromkeys(range(len(self.message.envelope.recipients)), reply)


class Sender:
    """One SMTP session in the client role.

    ``hostname``  what EHLO says.
    ``ahead``     how much is under way at a time where the peer lets us.
    ``starttls``  use STARTTLS where the peer offers it, and go on in the clear where it does not,
                  or says no (RFC 3207; RFC 7435).
    ``lmtp``      speak LMTP (RFC 2033).  Each message has one recipient then, so that there is one
                  reply to it.
    ``chunking``  use CHUNKING where the peer offers it.  Without it, content is sent only to a peer
                  that has asked for it (354), and so has not answered ahead of its time.
    """

    answers = False  # it reads replies while it writes, or both sides wait for ever
    secret = False

    __slots__ = (
        "_ahead",
        "_chunking",
        "_commands",
        "_content",
        "_events",
        "_expected",
        "_extensions",
        "_hostname",
        "_lmtp",
        "_messages",
        "_octets_under_way",
        "_out",
        "_over",
        "_parser",
        "_quitting",
        "_ready",
        "_starttls",
        "_under_way",
        "_xforward",
        "_xforward_refused",
        "_xforward_taken",
        "_xforwards",
        "content_octets",
        "steps",
    )

    def __init__(
        self,
        hostname: str,
        ahead: AheadLimits | None = None,
        *,
        starttls: bool = False,
        lmtp: bool = False,
        chunking: bool = True,
    ) -> None:
        self._hostname = hostname
        self._lmtp = lmtp
        self._chunking = chunking
        self._starttls = starttls
        self._ahead = ahead or AheadLimits()
        self._parser = ReplyParser()
        # Lists: they are short, and ten thousand of us that wait have them; an empty deque takes
        # 760 octets.
        self._commands: list[_Command] = []
        self._expected = [_Command("the connection", (), self._on_greeting)]
        self._out: list[bytes] = []
        self._content: Iterator[bytes] | None = None  # is going out
        self._events: list[Event] = []
        self._messages: list[Outgoing] = []
        self._under_way: list[_Transaction] = []
        self._octets_under_way = 0
        self._extensions: dict[str, str] = {}
        self._xforward: Sequence[str] = ()  # what the peer wants to know
        self._xforwards = 0  # without a reply
        self._xforward_taken = self._xforward_refused = False
        self._ready = False
        self._quitting = False
        self._over = False
        self.steps = 0  # replies that became whole
        self.content_octets = 0  # none comes to a client

    # -- what the caller sees ---------------------------------------------------------------

    def send(self, message: Outgoing) -> list[Event]:
        """Queue a message; it goes out when there is room among those whose replies are not here.

        Returns what happens at once: a message that this peer cannot take.  Raises
        :class:`ValueError` for one with several recipients by LMTP.
        """
        if self._lmtp and len(message.envelope.recipients) != 1:
            raise ValueError("by LMTP each message has one recipient here")
        self._messages.append(message)
        return self.advance()

    def withdraw(self, message: Outgoing) -> bool:
        """Forget a message of which nothing has gone out; ``False``: something has, and there will
        be a :class:`Sent`."""
        if message not in self._messages:
            return False
        self._messages.remove(message)
        return True

    @property
    def room(self) -> bool:
        """Another message would not have to wait for a reply to an earlier one.  (If it is so large
        that it has to, that is known when it is here.)"""
        return not self._over and not self._messages and (not self._ready or self._may_begin(0))

    @property
    def paused(self) -> bool:
        """A client reads whatever it is told."""
        return False

    @property
    def closed(self) -> bool:
        """The session is over: close the connection when all is written."""
        return self._over

    @property
    def pending(self) -> bool:
        """A part of a reply is here."""
        return not self._parser.idle

    @property
    def idle(self) -> bool:
        """The peer has greeted, and nothing that was said waits for a reply."""
        return self._ready and not (self._messages or self._under_way or self._expected)

    def tls_started(self) -> None:
        """The handshake is done: what the peer said before is forgotten (RFC 3207 4.2).
        :meth:`advance` then goes on."""
        self._extensions.clear()
        self._say_ehlo()

    def noop(self) -> list[Event]:
        """See whether the peer is still there."""
        self._command("NOOP", b"NOOP", self._on_noop)
        return self.advance()

    def quit(self) -> list[Event]:
        """Say QUIT when everything queued has been sent."""
        self._quitting = True
        return self.advance()

    @property
    def streaming(self) -> bool:
        """There is more content of a message to write than :meth:`data_to_send` gives at a time:
        ask it again when that has gone out."""
        return self._content is not None and not self._over

    def data_to_send(self) -> list[bytes]:
        """The pieces to write now, in order; each is returned once."""
        if not self._out and self.streaming:
            self._go_on_with_content()
        pieces, self._out = self._out, []
        return _together(pieces) if len(pieces) > 1 else pieces

    def _go_on_with_content(self) -> None:
        assert self._content is not None
        try:
            piece = next(self._content, None)
        except OSError as error:
            # Half a message is on its way: only the end of the connection stops it.
            self._break(f"the message cannot be read: {error}")
            return
        if piece is not None:
            self._out.append(piece)
        else:
            self._content = None
            self._pump()

    def receive_bytes(self, data: bytes) -> list[Event]:
        """Take what came from the peer; returns what happened, in order."""
        if self._over:
            return []
        self._parser.receive_bytes(data)
        try:
            while not self._over and (reply := self._parser.next_reply()):
                self.steps += 1
                self._take(reply)
                self._advance()
        except ReplyError as error:
            self._break(str(error))
        return self.advance()

    # -- the loop -----------------------------------------------------------------------------

    def _take(self, reply: Reply) -> None:
        if reply.code == 421:
            # RFC 5321 3.8: the peer is closing, whatever was asked.
            self._break(f"the peer closes: {reply}", said_so=True)
        elif not self._expected:
            self._break(f"a reply to nothing: {reply}")
        else:
            command = self._expected.pop(0)
            if reply.code in REPLIES[command.name].codes:
                command.on_reply(reply)
            else:
                self._break(f"the peer answers {command.name} with {reply}")

    def advance(self) -> list[Event]:
        """Go on with what is queued; returns what happens at once."""
        self._advance()
        events, self._events = self._events, []
        return events

    def _advance(self) -> None:
        if self._over:
            return
        while self._ready and self._messages and self._may_begin(_size(self._messages[0].data)):
            self._begin(self._messages.pop(0))
        self._pump()
        if self._ready and not self._under_way and not self._commands and self._quitting:
            self._quitting = False
            self._command("QUIT", b"QUIT", self._on_quit)
            self._pump()

    def _may_begin(self, octets: int) -> bool:
        """Whether a message of so many octets may go out now."""
        if not self._under_way:
            return True
        if not (self._has("PIPELINING") and self._has("CHUNKING")):
            return False
        if self._xforwards >= UNTRIED and not self._xforward_taken:
            return False
        return (
            len(self._under_way) < self._ahead.messages
            and self._octets_under_way + octets <= self._ahead.octets
        )

    def _pump(self) -> None:
        while self._commands and self._content is None:
            if self._expected and self._must_wait(self._expected[-1]):
                return
            command = self._commands.pop(0)
            self._expected.append(command)
            self._out += command.pieces
            self._content = command.content

    def _must_wait(self, last: _Command) -> bool:
        return REPLIES[last.name].wait or not self._has("PIPELINING")

    def _command(
        self, name: str, line: bytes, on_reply: _OnReply, content: Content | None = None
    ) -> None:
        pieces: tuple[bytes, ...] = (line + b"\r\n",)
        if isinstance(content, Octets) and content.size <= PIECE:
            self._commands.append(_Command(name, (*pieces, *content.pieces()), on_reply))
        else:
            stream = None if content is None else content.pieces()
            self._commands.append(_Command(name, pieces, on_reply, stream))

    def _has(self, keyword: str) -> bool:
        return keyword in self._extensions

    def _break(self, reason: str, said_so: bool = False) -> None:
        self._over = True
        self._commands.clear()
        self._events.append(Broken(reason, said_so))

    # -- greeting -------------------------------------------------------------------------------

    def _on_greeting(self, reply: Reply) -> None:
        self._say_ehlo()

    def _say_ehlo(self) -> None:
        name = "LHLO" if self._lmtp else "EHLO"
        self._command(name, f"{name} {self._hostname}".encode(), self._on_ehlo)

    def _on_ehlo(self, reply: Reply) -> None:
        if reply.permanent:
            self._command("HELO", f"HELO {self._hostname}".encode(), self._on_helo)
        else:
            for line in reply.text.split("\n")[1:]:
                keyword, _, parameters = line.strip().partition(" ")
                self._extensions[keyword.upper()] = parameters
            if not self._chunking:
                self._extensions.pop("CHUNKING", None)
            if self._starttls and self._has("STARTTLS"):
                self._starttls = False
                self._command("STARTTLS", b"STARTTLS", self._on_starttls)
            else:
                self._get_ready()

    def _on_starttls(self, reply: Reply) -> None:
        if reply.positive:
            self._events.append(BeginTls())
        else:
            self._get_ready()

    def _on_helo(self, reply: Reply) -> None:
        self._get_ready()

    def _get_ready(self) -> None:
        listed = self._extensions.get("XFORWARD", "").upper().split()
        self._xforward = tuple(one for one in ATTRIBUTES if one in listed)
        self._ready = True
        self._events.append(Ready(dict(self._extensions)))

    def _on_quit(self, reply: Reply) -> None:
        self._over = True
        self._events.append(Closed())

    # -- a transaction --------------------------------------------------------------------------

    def _begin(self, message: Outgoing) -> None:
        data = message.data
        content = Octets(data) if isinstance(data, bytes) else data
        transaction = _Transaction(message, content.size if content is not None else 0)
        ahead = bool(self._under_way)
        self._under_way.append(transaction)
        self._octets_under_way += transaction.octets
        if refusal := self._cannot_take(message.envelope, content):
            transaction.refuse(refusal)
            transaction.over = True
            self._settle()
            return
        transaction.asked = True
        if ahead:
            self._command("RSET", b"RSET", self._on_rset)
        if self._xforward and message.envelope.client is not None:
            self._forward(message.envelope.client)
        self._command("MAIL", self._mail(message.envelope, content), self._on_mail)
        for number, recipient in enumerate(message.envelope.recipients):
            line = f"RCPT TO:<{recipient}>{self._dsn(message.envelope, recipient)}"
            self._command("RCPT", line.encode(), self._on_rcpt(number))
        if content is None:
            self._command("RSET", b"RSET", self._on_end_of_asking)
        elif self._has("CHUNKING"):  # RFC 3030: one round trip for all of it
            self._command("BDAT", b"BDAT %d LAST" % content.size, self._on_end, content)
        else:
            self._command("DATA", b"DATA", self._on_data(content))

    def _cannot_take(self, envelope: Envelope, content: Content | None) -> Reply | None:
        if not self._can_be_said(envelope):
            return _NO_ENVELOPE
        if self._needs_utf8(envelope) and not self._has("SMTPUTF8"):
            return _NO_UTF8
        if content is None:
            return None
        if not content.ascii and not self._has("8BITMIME"):
            return _NO_8BIT
        if isinstance(content, Octets) and content.hides_an_end:  # any other has no NUL
            return _NO_NUL
        return None

    def _can_be_said(self, envelope: Envelope) -> bool:
        """Nothing in the envelope ends the command that it stands in, or adds to it."""
        mailboxes, words = (envelope.reverse_path, *envelope.recipients), self._dsn_words(envelope)
        try:
            "".join((*mailboxes, *words)).encode()
            paths_hold = all(parse_path(f"<{one}>") == (one, "") for one in mailboxes)
        except ValueError:
            return False
        return paths_hold and all(envelope.recipients) and all(map(_WORD.fullmatch, words))

    def _needs_utf8(self, envelope: Envelope) -> bool:
        words = (envelope.reverse_path, *envelope.recipients, *self._dsn_words(envelope))
        return envelope.smtputf8 or not all(word.isascii() for word in words)

    def _dsn_words(self, envelope: Envelope) -> list[str]:
        if not self._has("DSN"):
            return []
        words = _parameters(envelope.mail_options, "RET", "ENVID")
        for recipient in envelope.recipients:
            words += _parameters(envelope.rcpt_options.get(recipient, {}), "NOTIFY", "ORCPT")
        return words

    def _mail(self, envelope: Envelope, content: Content | None) -> bytes:
        words = [f"MAIL FROM:<{envelope.reverse_path}>"]
        if content is None:
            if self._has("SIZE"):  # as its own sender has it
                words += _parameters(envelope.mail_options, "SIZE")
        elif self._has("SIZE"):
            words.append(f"SIZE={content.size}")
        if content is not None and not content.ascii:
            words.append("BODY=8BITMIME")
        if self._needs_utf8(envelope):
            words.append("SMTPUTF8")
        if self._has("PRDR") and len(envelope.recipients) > 1:
            words.append("PRDR")
        if self._has("DSN"):
            words += _parameters(envelope.mail_options, "RET", "ENVID")
        return " ".join(words).encode()

    def _dsn(self, envelope: Envelope, recipient: str) -> str:
        if not self._has("DSN"):
            return ""
        options = envelope.rcpt_options.get(recipient, {})
        return "".join(f" {word}" for word in _parameters(options, "NOTIFY", "ORCPT"))

    @property
    def _transaction(self) -> _Transaction:
        """The one that is being answered."""
        return self._under_way[0]

    def _forward(self, client: Client) -> None:
        """Tell the peer whom the next message came from."""
        for line in command_lines(client, self._xforward):
            self._xforwards += 1
            self._command("XFORWARD", line, self._on_xforward)

    def _on_xforward(self, reply: Reply) -> None:
        self._xforwards -= 1
        self._xforward_taken = self._xforward_taken or reply.positive
        if reply.positive:
            return
        if reply.permanent and not self._xforward_taken:
            self._xforward = ()  # it is not for us, whatever it lists
        if not self._xforward_refused:
            self._xforward_refused = True
            self._events.append(NotForwarded(reply))

    def _on_mail(self, reply: Reply) -> None:
        if reply.positive:
            return
        transaction = self._transaction
        transaction.sender_refused = True
        transaction.refuse(reply)
        self._give_up()

    def _on_rcpt(self, number: int) -> _OnReply:
        def on_reply(reply: Reply) -> None:
            transaction = self._transaction
            if transaction.sender_refused:
                return
            if reply.positive:
                transaction.accepted.append(number)
            if not reply.positive or transaction.message.data is None:
                transaction.replies[number] = reply
            recipients = len(transaction.message.envelope.recipients)
            if number == recipients - 1 and not transaction.accepted:
                self._give_up()

        return on_reply

    def _give_up(self) -> None:
        """Nobody takes it: what has not been written of this transaction never will be.  (Where
        there are others after it everything has been, but for the content that is going out, and
        what waits is theirs.)"""
        if self._commands and len(self._under_way) == 1:
            self._commands.clear()
            if not self._expected:
                self._finish()

    def _on_data(self, content: Content) -> _OnReply:
        def on_reply(reply: Reply) -> None:
            if reply.code >= 400:
                self._on_end(reply)
            else:
                # RFC 2920 3.1: no one may be there, and it wants data all the same.
                accepted = bool(self._transaction.accepted)
                command = _Command("the message", (b".\r\n",), self._on_end)
                if accepted and isinstance(content, Octets) and content.size <= PIECE:
                    data = content.beginning(content.size)
                    command = _Command("the message", (_stuffed(data), b".\r\n"), self._on_end)
                elif accepted:
                    command = _Command("the message", (), self._on_end, _stream(content))
                self._commands.append(command)

        return on_reply

    def _on_end(self, reply: Reply) -> None:
        """The reply to the whole message, or the 353 that announces one per recipient."""
        transaction = self._transaction
        if reply.code == 353:
            if not transaction.accepted:
                self._break(f"the peer answers a message for no one with {reply}")
                return
            each = [_Command("353", (), self._on_each(number)) for number in transaction.accepted]
            # Before the replies to what has been written after it.
            self._expected[:0] = [*each, _Command("353", (), self._on_message)]
            return
        transaction.replies.update(dict.fromkeys(transaction.accepted, reply))
        self._finish()

    def _on_each(self, number: int) -> _OnReply:
        def on_reply(reply: Reply) -> None:
            self._transaction.replies[number] = reply

        return on_reply

    def _on_message(self, reply: Reply) -> None:
        """draft-hall-prdr 3: a last reply that refuses, refuses for everyone."""
        if not reply.positive:
            for number in self._transaction.accepted:
                if self._transaction.replies[number].positive:
                    self._transaction.replies[number] = reply
        self._finish()

    def _on_end_of_asking(self, reply: Reply) -> None:
        """The peer is in no transaction any more."""
        self._transaction.over = True
        self._settle()

    def _finish(self) -> None:
        transaction = self._transaction
        transaction.over = True
        taken = any(reply.positive for reply in transaction.replies.values())
        self._settle()
        if not taken and not self._under_way:
            # The peer may still be in a transaction (RFC 5321 4.1.1.5).
            self._command("RSET", b"RSET", self._on_rset)

    def _settle(self) -> None:
        """Tell of every message of which all has been said, in order."""
        while self._under_way and self._under_way[0].over:
            transaction = self._under_way.pop(0)
            self._octets_under_way -= transaction.octets
            recipients = range(len(transaction.message.envelope.recipients))
            replies = tuple(transaction.replies.get(number, _NO_REPLY) for number in recipients)
            self._events.append(Sent(transaction.message, replies, transaction.asked))

    def _on_noop(self, reply: Reply) -> None:
        """It is."""

    def _on_rset(self, reply: Reply) -> None:
        """The peer is in no transaction any more."""


def _parameters(options: Mapping[str, str], *keys: str) -> list[str]:
    return [f"{key}={options[key]}" for key in keys if key in options]


def _together(pieces: Sequence[bytes]) -> list[bytes]:
    """The same octets in fewer pieces: each is a call of the system, or a TLS record, which costs
    more than to copy a few commands.  Content is not copied, unless there is little of it."""
    found: list[bytes] = []
    small: list[bytes] = []
    for piece in pieces:
        if len(piece) <= SMALL:
            small.append(piece)
            continue
        if small:
            found.append(b"".join(small))
            small.clear()
        found.append(piece)
    if small:
        found.append(b"".join(small))
    return found


def _size(data: bytes | Content | None) -> int:
    if data is None:
        return 0
    return len(data) if isinstance(data, bytes) else data.size


def _stream(content: Content) -> Iterator[bytes]:
    """A message for DATA, dots stuffed, with its end (RFC 5321 4.5.2).  Whatever the pieces are, a
    line end and the dot after it are stuffed in one."""
    last, begun = b"\r\n", False  # as if a line had ended before
    for piece in content.pieces():
        whole = last + piece
        # What may be the beginning of "CRLF ." waits for what comes after it.
        keep = 2 if whole.endswith(b"\r\n") else 1 if whole.endswith(b"\r") else 0
        last = whole[len(whole) - keep :]
        out = whole[: len(whole) - keep].replace(b"\r\n.", b"\r\n..")
        if out:
            yield out if begun else out[2:]
            begun = True
    yield (last if begun else b"") + b".\r\n"


def _stuffed(content: bytes) -> bytes:
    """RFC 5321 4.5.2: a dot before each line that begins with one."""
    content = content.replace(b"\r\n.", b"\r\n..")
    return b"." + content if content.startswith(b".") else content
