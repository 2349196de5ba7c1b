"""SMTP replies: what a server says after each command (RFC 5321 4.2, RFC 2034, RFC 3463).

A :class:`Reply` is a value; :class:`ReplyParser` makes replies of a peer's bytes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from salmon_revsmtp.foreign import ERROR_TEXT, shortened

__all__ = [
    "Reply",
    "ReplyError",
    "ReplyParser",
    "is_about_mail",
    "without_surrogates",
]

# Refusals of a command that we did not get right, or of all that a session may do, say nothing of
# the mail (RFC 5321 4.2.2, RFC 3207 4, RFC 4954 6): as when a server wants a login.
_NOT_ABOUT_MAIL = frozenset({500, 502, 503, 504, 530, 534, 535, 538})

# RFC 5321 4.5.3.1.5: a reply line has 512 octets with its code and CRLF; peers send longer ones.
MAX_LINE = 8192
# An EHLO answer has a few dozen lines of a few dozen octets; this much is no reply any more.
MAX_REPLY = 64 * 1024
# What we write ourselves: 512 octets less "250-", an enhanced code and CRLF.
MAX_TEXT = 480
# Lines of it; no client needs to read more to know what to do.
MAX_LINES = 100
# Characters of a reply that a log line or an error quotes.
SHOWN = 500

_ENHANCED = re.compile(r"([245])\.[0-9]{1,3}\.[0-9]{1,3}(?: |$)", re.MULTILINE)
_STATUS = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}")
_LINE = re.compile(rb"([2-5][0-9][0-9])(?:([ -])(.*))?", re.DOTALL)
_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")


def without_surrogates(text: str) -> str:
    """``text`` without lone surrogates: they stand for octets that are no UTF-8, and neither a
    database nor a terminal takes them."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def is_about_mail(reply: Reply, doubted: Collection[int] = ()) -> bool:
    """Whether a 5yz to MAIL, RCPT or a message refuses this mail, and not a command or a session.

    ``doubted``  codes that are doubted beside those of a command or a session.

    The enhanced code can say that it is about an address, whatever the code is (RFC 3463 3.2).  So
    can others with 504: Postfix has ``504 5.5.2`` for an address without a whole domain, and 5.7.z
    is somebody's policy.
    """
    if reply.code not in _NOT_ABOUT_MAIL and reply.code not in doubted:
        return True
    status = reply.status
    if status.startswith("5.1."):
        return True
    return reply.code == 504 and (status == "5.5.2" or status.startswith("5.7."))


class ReplyError(ValueError):
    """A peer sent something that is no SMTP reply; the text quotes what it was."""


@dataclass(frozen=True)
class Reply:
    """One SMTP reply.

    ``code``: three digits, 200 to 599.

    ``text``: what a person reads; line feeds separate the lines of a multi-line reply.  Of a very
    long one the middle is left out, whoever wrote it: of a 4yz or 5yz, which is kept and shown, and
    which no one parses, after 2,000 characters; of any other after 64 KiB.

    ``enhanced``: an enhanced status code such as ``"5.7.1"`` (RFC 3463).  ``None``: the code in
    ``text`` if it begins with one, else ``"X.0.0"`` of the reply's class; ``""``: none at all, as
    greetings, EHLO answers and 3yz replies have it (RFC 2034 4).

    ``positive``: 2yz, the command was carried out.  ``transient``: 4yz, not now, the peer is to try
    again.  ``permanent``: 5yz, no, and not later either.  (RFC 5321 4.2.1)
    """

    code: int
    text: str
    enhanced: str | None = None
    positive: bool = field(init=False, repr=False, compare=False)
    transient: bool = field(init=False, repr=False, compare=False)
    permanent: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 200 <= self.code <= 599:
            raise ValueError(f"{self.code} is no SMTP reply code: 200 to 599")
        if self.enhanced and not _STATUS.fullmatch(self.enhanced):
            raise ValueError(f"{self.enhanced!r} is no enhanced status code: class.subject.detail")
        object.__setattr__(self, "positive", self.code < 300)
        object.__setattr__(self, "transient", 400 <= self.code < 500)
        object.__setattr__(self, "permanent", self.code >= 500)
        if not self.text.isascii():
            object.__setattr__(self, "text", without_surrogates(self.text))
        most = ERROR_TEXT if self.code >= 400 else MAX_REPLY
        if len(self.text) > most:
            object.__setattr__(self, "text", shortened(self.text, most))

    @property
    def status(self) -> str:
        """The enhanced status code, ``""`` where none applies."""
        if self.enhanced is not None:
            return self.enhanced
        klass = self.code // 100
        if klass == 3:
            return ""
        if found := _ENHANCED.match(self.text):
            return found[0].rstrip() if int(found[1]) == klass else f"{klass}.0.0"
        return f"{klass}.0.0"

    @property
    def message(self) -> str:
        """The text without an enhanced status code that its lines begin with (RFC 2034 4); a 3yz
        reply has none, whatever its text looks like."""
        found = _ENHANCED.match(self.text) if self.enhanced is None else None
        if found and self.code // 100 != 3:
            code = found[0].rstrip() + " "
            first, *more = self.text[found.end() :].split("\n")
            return "\n".join([first, *(line.removeprefix(code) for line in more)])
        return self.text

    def encode(self) -> bytes:
        """The reply's lines as they go on the wire, CRLF and all."""
        return self._encoded

    @functools.cached_property
    def _encoded(self) -> bytes:
        # Nearly all that a session says are the same few replies.
        prefix = f"{self.status} " if self.status else ""
        lines = [
            prefix + _NOT_PRINTABLE.sub("?", line)[:MAX_TEXT]
            for line in (self.message.splitlines()[:MAX_LINES] or [""])
        ]
        last = len(lines) - 1
        return "".join(
            f"{self.code}{'-' if number < last else ' '}{line}\r\n"
            for number, line in enumerate(lines)
        ).encode("ascii")

    def __str__(self) -> str:
        text = self.text if self.enhanced in (None, "") else f"{self.enhanced} {self.text}"
        line = f"{self.code} {' / '.join(text.splitlines())}".rstrip()
        return line if len(line) <= SHOWN else shortened(line, SHOWN)


class ReplyParser:
    """Makes replies of a peer's bytes, however they are split (RFC 5321 4.2.1).

    A line may end in a bare LF: that is all that some servers send, and nothing after a reply
    is ever taken for a command here.
    """

    __slots__ = (
        "_buffer",
        "_code",
        "_lines",
        "_size",
    )

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._lines: list[str] = []
        self._code = 0
        self._size = 0

    @property
    def pending(self) -> bytes:
        """Bytes that came and belong to no whole reply yet."""
        return bytes(self._buffer)

    @property
    def idle(self) -> bool:
        """Nothing has come that is not part of a reply already returned."""
        return not self._buffer and not self._lines

    def receive_bytes(self, data: bytes) -> None:
        """Take what came from the peer; :meth:`next_reply` gives what it makes."""
        self._buffer += data

    def next_reply(self) -> Reply | None:
        """The next whole reply, or ``None`` until more bytes come.

        Raises :class:`ReplyError` on a line that is no reply line, is too long, or has another
        code than the lines before it.
        """
        while (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            if reply := self._take(line):
                return reply
        if len(self._buffer) > MAX_LINE:
            raise ReplyError(f"a reply line of more than {MAX_LINE} octets")
        return None

    def _take(self, line: bytes) -> Reply | None:
        self._size += len(line)
        if len(line) > MAX_LINE or self._size > MAX_REPLY:
            raise ReplyError(f"a reply of more than {MAX_REPLY} octets")
        line = line.rstrip(b"\r")
        found = _LINE.fullmatch(line)
        if not found:
            raise ReplyError(f"{line[:80]!r} is no SMTP reply")
        code = int(found[1])
        if self._lines and code != self._code:
            raise ReplyError(f"{line[:80]!r} continues a reply that began with {self._code}")
        self._code = code
        self._lines.append((found[3] or b"").decode("utf-8", "replace"))
        if found[2] == b"-":
            return None
        reply = Reply(code, "\n".join(self._lines))
        self._lines, self._size = [], 0
        return reply
