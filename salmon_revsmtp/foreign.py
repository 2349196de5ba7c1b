"""What strangers wrote, made harmless for a terminal and for a log.

Addresses, replies, certificates and errors come from a peer.  A terminal obeys some characters of
them (ESC, the C1 controls, those that turn the direction of writing), and a log reader takes others
for the end of a line or of a field.  Everything that is shown goes through here.
"""

from __future__ import annotations

import io
import re

__all__ = [
    "ERROR_TEXT",
    "angle",
    "escape_what_cannot_be_shown",
    "printable",
    "printable_lines",
    "shortened",
    "without_login",
]

# Characters of an error that are kept, logged and shown: enough for what a person reads of it, and
# a peer that says more fills neither the journal nor a terminal.
ERROR_TEXT = 2000

# What stands before a host: a name, a password, or both.  A password may have an "@", too, so it is
# the last one that counts; what comes after the host in a URL may be a token.
_LOGIN = re.compile(r"(?s)\A(\w+://)?.+@")
_IN_A_URL = re.compile(r"(?s)(://[^?#]*)[?#].*")


# A log line's fields are separated by spaces, and an address ends at ">".
_ENDS_A_FIELD = re.compile(r"[ <>\\]")


def printable(text: object) -> str:
    """``text`` with "?" for what no one can see: control and format characters, line separators,
    lone surrogates."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "?" for char in text)


def printable_lines(text: object) -> str:
    """The same, but line feeds stay: of a text that has lines of ours."""
    return "\n".join(map(printable, str(text).split("\n")))


def shortened(text: str, most: int = ERROR_TEXT) -> str:
    """``text`` in at most ``most`` characters (32 or more): of a longer one the beginning and the
    end, and between them the number of those left out, without a space that could end a field."""
    if len(text) <= most:
        return text
    kept = most - 24
    head, tail = kept - kept // 4, kept // 4
    return f"{text[:head]}...[{len(text) - kept}_more]...{text[-tail:]}"


def escape_what_cannot_be_shown(stream: object) -> None:
    """Have a text stream write ``\\u20ac`` where its encoding lacks the character, and not fail."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def without_login(text: str) -> str:
    """What a person wrote where a host or a URL belongs, with ``***`` for whatever may be a
    password: all before an ``@``, and all that a URL has after ``?`` or ``#``."""
    return _IN_A_URL.sub(r"\1?***", _LOGIN.sub(r"\1***@", text))


def angle(address: str | None) -> str:
    """An address in angle brackets as a value in a log line, in which it cannot end the field:
    ``<"ann\\x20b\\x3e"@example.net>``."""
    return f"<{_ENDS_A_FIELD.sub(_escaped, printable(address or ''))}>"


def _escaped(found: re.Match[str]) -> str:
    return f"\\x{ord(found[0]):02x}"
