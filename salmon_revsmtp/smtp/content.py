"""A message's octets where there are too many of them to be kept in memory: the shape of what the
machines are given for that.  Nothing here does I/O; who keeps a message somewhere implements it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Protocol

__all__ = [
    "PIECE",
    "Coming",
    "Content",
    "Octets",
    "Sink",
    "Traits",
    "beginning",
    "whole",
    "with_lf",
]


# Octets of a message in memory that are written at a time.
PIECE = 256 * 1024

# Octets of a message that comes that are kept to look at its header: more than 100 hops make.
BEGINNING = 256 * 1024

_BARE_CR = re.compile(rb"\r(?!\n)")


class Sink(Protocol):
    """Where a message goes while it comes.  Its methods do not raise: what went wrong is told when
    the message is to be made safe.

    ``size``    octets that have come.
    ``digest``  the SHA-256 of them.
    """

    @property
    def size(self) -> int:
        """See above."""

    @property
    def digest(self) -> bytes:
        """See above."""

    def write(self, data: bytes) -> None:
        """Take what has come next."""

    def beginning(self) -> bytes:
        """Its first octets, in which the header ends if it is no larger than most."""

    def discard(self) -> None:
        """There will be no message; forget what there is."""


class Content(Protocol):
    """A message that can be sent as it is: CRLF ends each of its lines, the last one too, and there
    is no other CR or LF, and no NUL.

    ``size``   octets.
    ``ascii``  none of them is above 127.
    """

    @property
    def size(self) -> int:
        """See above."""

    @property
    def ascii(self) -> bool:
        """See above."""

    def pieces(self) -> Iterator[bytes]:
        """All of it, in pieces of some size.  May raise :class:`OSError` at any of them."""

    def beginning(self, octets: int) -> bytes:
        """The first octets of it.  Raises :class:`OSError`."""


class Octets:
    """A message in memory as :class:`Content`, but for NULs, which it may have.

    ``data``  any octets.  That every line ends in CRLF is seen to here: of a large message that
              takes up to a second, so who has an event loop to run makes this in a thread.
    ``hides_an_end``  a line is a dot but for NULs, of which the first is before it.  Some servers
              drop NULs before they look for the end of data: to them this is one.
    """

    def __init__(self, data: bytes) -> None:
        self._data = _with_crlf(data)
        self.hides_an_end = b"\x00" in data and _hides_an_end(self._data)

    @property
    def size(self) -> int:
        return len(self._data)

    @property
    def ascii(self) -> bool:
        return self._data.isascii()

    def pieces(self) -> Iterator[bytes]:
        for start in range(0, len(self._data), PIECE):
            yield self._data[start : start + PIECE]

    def beginning(self, octets: int) -> bytes:
        return self._data[:octets]


def _with_crlf(data: bytes) -> bytes:
    """The message with CRLF and no other CR or LF, its last line ended."""
    ends = data.count(b"\r\n")
    if data.count(b"\r") != ends or data.count(b"\n") != ends:
        # Three passes over octets cost less than one over what a pattern finds: 50 MiB of bare LF
        # were 4.5 GB.
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    return data if data.endswith(b"\r\n") or not data else data + b"\r\n"


def _hides_an_end(data: bytes) -> bool:
    """In a message with CRLF: a dot that stands alone when the NULs are gone, and did not before.
    (A pattern takes five times as long.)"""
    dropped = (b"\n" + data).replace(b"\n.", b"\n..").replace(b"\x00", b"")
    return b"\n.\r\n" in dropped


def with_lf(data: bytes) -> bytes:
    """The same with LF for each CRLF; a bare CR or LF stays.

    Without a bare CR, as nearly all mail is, to look for one and to drop all of them takes half to
    four fifths of the time of a replacement, which copies line by line.
    """
    if _BARE_CR.search(data):
        return data.replace(b"\r\n", b"\n")
    return data.translate(None, b"\r")


def beginning(data: bytes | Content, octets: int) -> bytes:
    """The first octets of a message, wherever it is.  Raises :class:`OSError`."""
    return data[:octets] if isinstance(data, bytes) else data.beginning(octets)


def whole(data: bytes | Content) -> bytes:
    """All of a message, in memory.  Raises :class:`OSError`."""
    return data if isinstance(data, bytes) else b"".join(data.pieces())


class Coming:
    """What is kept in memory of a message that goes somewhere else as it comes.

    ``size``       octets that have come.
    ``beginning``  its header, or the first part of one that is larger than most.
    """

    def __init__(self) -> None:
        self.size = 0
        self.beginning = b""
        self._in_header = True
        self._digest = hashlib.sha256()

    def add(self, data: bytes) -> None:
        """What comes next."""
        self.size += len(data)
        self._digest.update(data)
        if self._in_header:
            begun = self.beginning + data[: BEGINNING - len(self.beginning)]
            end = begun.find(b"\r\n\r\n", max(0, len(self.beginning) - 3))
            self.beginning = begun if end < 0 else begun[: end + 4]
            self._in_header = end < 0 and len(begun) < BEGINNING

    @property
    def digest(self) -> bytes:
        """The SHA-256 of what has come."""
        return self._digest.digest()


class Traits:
    """What must be known of a message to send it from where it is, found while it goes there.

    ``size``   octets.
    ``ascii``  none of them is above 127.
    """

    def __init__(self) -> None:
        self.size = 0
        self.ascii = True
        self._clean = True
        self._last = b""  # a CR whose LF may come
        self._tail = b""

    def add(self, data: bytes) -> None:
        """What comes next."""
        if not data:
            return
        self.size += len(data)
        self.ascii = self.ascii and data.isascii()
        if self._clean:
            # A CRLF that is in two pieces is counted with the second.
            whole = self._last + data
            held = whole[:-1] if whole.endswith(b"\r") else whole
            ends = held.count(b"\r\n")
            self._clean = (
                held.count(b"\r") == ends and held.count(b"\n") == ends and b"\0" not in held
            )
            self._last = whole[len(held) :]
        self._tail = (self._tail + data[-2:])[-2:]

    @property
    def streams(self) -> bool:
        """It can be sent as it is: see :class:`Content`."""
        return self._clean and not self._last and self._tail == b"\r\n"
