"""The SMTP dialogue for a person: commands and replies, and of content only its octets.

The dialogue is on only where it was asked for, with ``-v`` or by its logger's name: a project's log
may have the level DEBUG for everything, and anyone may be able to read it.  Of a running server it
may be asked for one collection (:data:`hearing`); what others say is not heard then.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextvars import ContextVar

from salmon_revsmtp.foreign import printable

__all__ = ["ENOUGH", "Hearer", "Trace", "dialogue", "hearer", "hearing", "tell"]

#: Takes a line of a dialogue, on the event loop; returns at once, and may say :data:`ENOUGH`.
Hearer = Callable[[str], object]

#: Who hears a session wants to hear no more of it, and it is traced no more.
ENOUGH = object()

# Its lines never hold a secret.
dialogue = logging.getLogger("salmon_revsmtp.dialogue")
if dialogue.level == logging.NOTSET:
    dialogue.setLevel(logging.INFO)

#: Who hears the connections that are made in this context, beside the log.
hearing: ContextVar[Hearer | None] = ContextVar("hearing", default=None)

# Octets of a line that are shown, and of one line's beginning that are kept until its end comes.
SHOWN = 300
KEPT = 4096

# What is a command for sure is shown; anything else may be content that came too early.
_COMMAND = re.compile(
    rb"(?:MAIL FROM:|RCPT TO:|BDAT \d"
    rb"|(?:EHLO|HELO|LHLO|AUTH|ATRN|ETRN|XFORWARD|XHOLD|NOOP|VRFY|HELP)(?: |$)"
    rb"|(?:DATA|RSET|QUIT|STARTTLS|TURN)\s*$)",
    re.IGNORECASE,
)
_CHUNK = re.compile(rb"BDAT (\d{1,18})(?: |$)", re.IGNORECASE)
_END = b"\r\n.\r\n"


def hearer() -> Hearer | None:
    """Who hears a connection that is made now; ``None``: no one."""
    asked = hearing.get()
    if not dialogue.isEnabledFor(logging.DEBUG):
        return asked

    def both(line: str) -> None:  # the log never has enough
        dialogue.debug("%s", line)
        if asked is not None:
            asked(line)

    return both


def tell(text: str, *arguments: object) -> None:
    """Have a line heard, if anyone hears this context.  It holds no secret."""
    if (hears := hearer()) is not None:
        hears(text % arguments if arguments else text)


class Trace:
    """One connection.  It is told every octet that goes either way, in order."""

    def __init__(self) -> None:
        self._line = b""  # a client's command that has not ended
        self._chunk = 0  # octets of a chunk to come
        self._in_data = False
        self._tail = b""  # the last octets of content, where its end may begin

    def server(self, data: bytes) -> str:
        """What the server said."""
        if re.search(rb"^354[ \r\n]", data, re.MULTILINE):
            self._in_data, self._tail = True, b"\r\n"
        return _shown(data)

    def client(self, data: bytes, content: int | None = None) -> str:
        """What the client said.  ``content``: as many octets of it were content for the machine."""
        view, pieces, hidden = data, [], 0
        while view:
            if self._chunk or self._in_data:
                size = self._content(view)
                pieces.append(f"[{size} octets of a message]")
                hidden += size
                view = view[size:]
                continue
            line, end, view = view.partition(b"\n")
            self._line = (self._line + line)[:KEPT]
            if not end:
                break
            pieces.append(self._command(self._line.rstrip(b"\r")))
            self._line = b""
        if content and not hidden:
            return f"[{len(data)} octets]"
        return " / ".join(pieces)

    def _content(self, data: bytes) -> int:
        """The octets at the beginning of ``data`` that are content."""
        if self._chunk:
            size = min(self._chunk, len(data))
            self._chunk -= size
            return size
        found = (self._tail + data).find(_END)
        if found < 0:
            self._tail = (self._tail + data)[-len(_END) + 1 :]
            return len(data)
        self._in_data = False
        return found + len(_END) - len(self._tail)

    def _command(self, line: bytes) -> str:
        if chunk := _CHUNK.match(line):
            self._chunk = int(chunk[1])
        return _shown(line) if _COMMAND.match(line) else f"[{len(line)} octets]"


def _shown(data: bytes) -> str:
    """Wire bytes for a person: lines with / between them, and no more than a few."""
    text = data[:SHOWN].decode("utf-8", "backslashreplace").replace("\r\n", " / ").rstrip(" /")
    more = f" ... [{len(data)} octets]" if len(data) > SHOWN else ""
    return printable(text) + more
