"""Mail that waits in a Maildir: what no handler has taken, notifications that the relay has not
taken, and what queue mode has not handled yet.

Whoever only looks needs neither Salmon nor :mod:`mailbox`: a folder of 100,000 messages is counted
by its names, and a message is read when it is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.utils import getaddresses
from pathlib import Path
from typing import NamedTuple

from salmon_revsmtp.delivery.trace import header_end, unpack_undeliverable
from salmon_revsmtp.files import sync_folder
from salmon_revsmtp.smtp.envelope import Envelope

__all__ = [
    "KEPT_MARK",
    "NOTIFICATION_MARK",
    "Count",
    "Message",
    "WaitingMail",
    "by_age",
    "is_notification",
]

#: What the names end with of what we keep as undeliverable, and of a notification of ours there.
#: Others put mail into that folder, too, and a stranger may have written what looks like our lines
#: on top of it; the name of its file no stranger can choose.
KEPT_MARK = ",kept"
NOTIFICATION_MARK = ",kept,notification"

# Octets of a message that are read to say what it is.
BEGINNING = 64 * 1024
# Of a field's value, octets: enough for a list, and for a few addresses.
MOST_VALUE = 2000

_FIELDS = re.compile(
    rb"^(subject|from|to)[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)", re.IGNORECASE | re.MULTILINE
)


class Count(NamedTuple):
    """How many messages there are, and since when the oldest waits (seconds since the epoch), as
    far as the names say."""

    messages: int = 0
    oldest: float | None = None


@dataclass(frozen=True)
class Message:
    """A message that waits.

    ``key``         its name.
    ``since``       since when it waits, in seconds since the epoch.
    ``sender``      the envelope's, empty for the null sender.
    ``recipients``  those that have not got it; none where that is not known.
    ``size``        octets, with our lines on top.
    ``subject``     as its sender wrote it, decoded.
    ``reason``      why it waits, as far as that was kept.
    ``envelope``    sender and recipients are those of the envelope.  Otherwise they are what the
                    header has: Salmon's own receivers keep nothing else.
    """

    key: str
    since: float
    sender: str
    recipients: tuple[str, ...]
    size: int
    subject: str
    reason: str
    envelope: bool


class WaitingMail:
    """A Maildir, which need not be there.  Its methods raise :class:`OSError` where they cannot
    read or write it; a message that is gone meanwhile is none.

    ``shared``  others store mail in it, too: lines on top are ours only where the name says so.
    """

    def __init__(self, folder: Path, *, shared: bool = True) -> None:
        self.folder = folder
        self._shared = shared

    def count(self) -> Count:
        """How many there are, without a look at any."""
        messages, oldest = 0, None
        for file in self._names():
            messages += 1
            since = _since(file)
            if since is not None and (oldest is None or since < oldest):
                oldest = since
        return Count(messages, oldest)

    def keys(self) -> list[str]:
        """Their keys, the oldest first."""
        return by_age([name.partition(":")[0] for name in self._names()])

    def find(self, key: str) -> Message | None:
        """What a message is."""
        path = self.path(key)
        try:
            if path is None:
                return None
            found = path.stat()
            with path.open("rb") as file:
                start = file.read(BEGINNING)
        except FileNotFoundError:
            return None
        return _message(key, self.unpack(key, start), found.st_size, _since(key) or found.st_mtime)

    def unpack(self, key: str, stored: bytes) -> tuple[Envelope, str, bytes]:
        """The envelope of a message, why it waits, and the message.  The envelope has no recipients
        if none was kept."""
        if self.is_ours(key):
            return unpack_undeliverable(stored)
        return Envelope("", ()), "", stored

    def is_ours(self, key: str) -> bool:
        """Whether the lines on top of a message are ours."""
        return not self._shared or _marked(key, KEPT_MARK)

    def read(self, key: str) -> bytes | None:
        """All of a message, with our lines on top."""
        path = self.path(key)
        try:
            return path.read_bytes() if path is not None else None
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int | None:
        """Its octets."""
        path = self.path(key)
        try:
            return path.stat().st_size if path is not None else None
        except FileNotFoundError:
            return None

    def drop(self, key: str) -> bool:
        """Delete it for good; ``False`` if it is not there."""
        path = self.path(key)
        if path is None:
            return False
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        sync_folder(path.parent)
        return True

    def path(self, key: str) -> Path | None:
        """Where it is.  A key is a name, and never leads out of the folder."""
        if not key or "/" in key or "\0" in key or key.startswith("."):
            return None
        for part in ("new", "cur"):
            if (path := self.folder / part / key).is_file():
                return path
        # A reader of Maildirs may have put flags after its name.
        flagged = (name for name in self._names("cur") if name.partition(":")[0] == key)
        return next((self.folder / "cur" / name for name in flagged), None)

    def _names(self, *parts: str) -> Iterator[str]:
        for part in parts or ("new", "cur"):
            try:
                entries = os.scandir(self.folder / part)
            except (FileNotFoundError, NotADirectoryError):
                continue
            with entries:
                yield from (one.name for one in entries if not one.name.startswith("."))


def is_notification(key: str) -> bool:
    """Whether what is undeliverable under this key is a notification of ours, which was given
    up."""
    return _marked(key, NOTIFICATION_MARK)


def _marked(key: str, mark: str) -> bool:
    return set(mark.split(",")) - {""} <= set(key.split(",")[1:])


def by_age(keys: Sequence[str]) -> list[str]:
    """Maildir keys (``seconds.MmicrosecondsPpidQnumber.host``), oldest first."""
    return sorted(keys, key=lambda key: [int(number) for number in re.findall(r"\d+", key)[:4]])


def _since(name: str) -> float | None:
    """The time in a Maildir's name."""
    seconds = name.partition(".")[0]
    return float(seconds) if seconds.isascii() and seconds.isdigit() else None


def _message(key: str, parts: tuple[Envelope, str, bytes], size: int, since: float) -> Message:
    envelope, reason, message = parts
    message = message.replace(b"\r\n", b"\n").lstrip(b"\n")
    fields: dict[bytes, bytes] = {}
    for name, value in _FIELDS.findall(message[: header_end(message)]):
        fields.setdefault(name.lower(), value[:MOST_VALUE])
    subject = _decoded(fields.get(b"subject", b""))
    if envelope.recipients:
        known = envelope.reverse_path, envelope.recipients
        return Message(key, since, *known, size, subject, reason, True)
    senders = _addresses(fields.get(b"from", b""))
    return Message(
        key,
        since,
        envelope.reverse_path or next(iter(senders), ""),
        _addresses(fields.get(b"to", b"")),
        size,
        subject,
        reason,
        False,
    )


def _decoded(value: bytes) -> str:
    text = " ".join(value.decode("utf-8", "replace").split())
    try:
        return str(make_header(decode_header(text)))
    except (HeaderParseError, LookupError, UnicodeError, ValueError):
        return text


def _addresses(value: bytes) -> tuple[str, ...]:
    text = " ".join(value.decode("utf-8", "replace").split())
    return tuple(dict.fromkeys(one for _, one in getaddresses([text]) if "@" in one))
