"""The header lines that we add: Received, the envelope (RFC 5321 4.4, RFC 9228), and plugins'."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import NamedTuple, Protocol

from salmon_revsmtp.foreign import printable, shortened
from salmon_revsmtp.smtp.envelope import Client, Envelope
from salmon_revsmtp.smtp.xforward import told, words

__all__ = [
    "LONGEST_REASON",
    "MAX_HOPS",
    "AddedFields",
    "Named",
    "Origin",
    "envelope_lines",
    "forwarded_client",
    "header_end",
    "hops",
    "separator",
    "split_envelope",
    "stored_envelope",
    "undeliverable_envelope",
    "unpack",
    "unpack_undeliverable",
    "with_reason",
]

# RFC 5321 6.3: that many Received lines are a loop.
MAX_HOPS = 100

# RFC 5322 2.1.1: octets of a line, as they should be and as they must be.
FOLDED_LINE = 78
LONGEST_LINE = 998

# Characters of a reason that are kept: enough to act on, and one line (RFC 5322 2.1.1), whatever an
# exception quotes.
LONGEST_REASON = 300

# Octets of all that plugins add to one message; there are servers that take no header of 64 KiB.
MAX_ADDED = 16 * 1024

_UNSAFE = re.compile(r"[^A-Za-z0-9.:\[\]_-]")
# RFC 5322 2.2 and 4.5.8: what a line of a header begins with, where it is not a folded one.
_FIELD_NAME = rb"[!-9;-~]+[ \t]*:"
_FIRST_LINE = re.compile(_FIELD_NAME)
_AFTER_HEADER = re.compile(rb"\n(?![ \t]|" + _FIELD_NAME + rb")")
_RECEIVED = re.compile(rb"^received[ \t]*:", re.IGNORECASE | re.MULTILINE)
_NAME = re.compile(r"[!-9;-~]+")
_NOT_IN_A_VALUE = re.compile(r"[^\t -~]")
# What a sender says of notifications, on disk; the values as RFC 3461 4 has them on the wire.
_OF_MAIL = ("SMTPUTF8", "RET", "ENVID")
_OF_RCPT = ("NOTIFY", "ORCPT")
_WORD = re.compile(r"[A-Z0-9]+(?:=[^\x00-\x20=\x7f]+)?")
_FIELD = re.compile(rb"([!-9;-~]+):([^\n]*)\n")  # blanks are part of the value: see _BLANK

_FAILED = re.compile(rb"x-failed-recipients:([^\n]*(?:\n [^\n]*)*)\n", re.IGNORECASE)

# Around a field's value.  Not what Unicode calls a space: a mailbox may begin with one (RFC 6531).
_BLANK = " \t\r"


class Named(Protocol):
    """An agent, as far as it matters here; hooks get the whole of it."""

    @property
    def name(self) -> str:
        """Its name in the settings."""


@dataclass(frozen=True)
class Origin:
    """Where a message came from, and how.

    ``service``   the name of the service that took it.
    ``hostname``  what we call ourselves.
    ``agent``     the agent that collected it; ``None``: it came to a listening service.
    ``peer``      the client's address and port.
    ``tls``, ``authenticated``  how the connection was secured (RFC 3848).
    """

    service: str
    hostname: str
    agent: Named | None = None
    peer: tuple[str, int] = ("", 0)
    tls: bool = False
    authenticated: bool = False

    def over(self, peer: tuple[str, int], tls: bool) -> Origin:
        """The same over this connection."""
        return replace(self, peer=peer, tls=tls)

    @functools.cached_property
    def label(self) -> str:
        """For log lines."""
        return f"agent={self.agent.name}" if self.agent else f"service={self.service}"

    def label_of(self, envelope: Envelope) -> str:
        """The same for a message, with its client where it was forwarded."""
        if not envelope.forwarded_by:  # as most are, and each of their log lines comes here
            return self.label
        return self.label + forwarded_client(envelope.client)

    def received(self, envelope: Envelope, recipient: str) -> bytes:
        """A whole ``Received:`` header with LF line ends; ``recipient`` is empty where there are
        several, who need not know of each other."""
        helo = _UNSAFE.sub("?", envelope.helo)[:255] or "unknown"
        address = self.peer[0]
        peer = f"[IPv6:{address}]" if ":" in address else f"[{address}]"
        came = f"{helo} ({peer})"
        if envelope.forwarded_by:
            came = (
                f"{helo}{_seen(envelope)}\n\t(forwarded by {_host(envelope.forwarded_by)} {peer})"
            )
        # RFC 3848, RFC 6531 4.3: ESMTPSA and its kin.
        protocol = "SMTP"
        if envelope.esmtp:
            protocol = "UTF8SMTP" if envelope.smtputf8 else "ESMTP"
            protocol += ("S" if self.tls else "") + ("A" if self.authenticated else "")
        whom = f"\n\tfor <{recipient}>" if recipient else ""
        return (
            f"Received: from {came}\n"
            f"\tby {self.hostname} (salmon-revsmtp {self.label.replace('=', ' ', 1)})\n"
            f"\twith {protocol} id {os.urandom(8).hex()}{whom}; {_date(int(time.time()))}\n"
        ).encode()


def _seen(envelope: Envelope) -> str:
    """What is known of a client that we were told of: the TCP-info of RFC 5321 4.4.  The host that
    told us goes into a comment after it, for there is a place for one."""
    client = envelope.client
    if client is None or not client.address:
        return ""
    kind = "IPv6:" if ":" in client.address else ""
    name = f"{_host(client.name)} " if client.name else ""
    return f" ({name}[{kind}{client.address}])"


def _host(name: str) -> str:
    """What a host calls itself, with nothing in it that means something in a header."""
    return _UNSAFE.sub("?", name)[:255] or "unknown"


def forwarded_client(client: Client | None) -> str:
    """For log lines: the client that we were told of, after a space; nothing without one."""
    return "" if client is None else f" client={client.address or 'unknown'}"


class AddedFields:
    """The header fields that plugins add to one message.

    ``lines``  they, in the order in which they were added, with LF line ends.
    """

    def __init__(self) -> None:
        self.lines = b""

    def add(self, name: str, value: str) -> None:
        """Add one.  A long value is folded at its blanks.

        Raises :class:`ValueError` for what would be no field: a name with other characters than
        RFC 5322 2.2 has, a value with others than printable ASCII, blanks and tabs, a word in it
        that is longer than a line may be, or more than :data:`MAX_ADDED` octets in all.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a header field")
        if found := _NOT_IN_A_VALUE.search(value):
            raise ValueError(f"the value of {name} has {found[0]!r}; allowed: printable ASCII")
        lines = [f"{name}:"]
        for word in value.split():
            if len(lines[-1]) + 1 + len(word) <= FOLDED_LINE or lines == [f"{name}:"]:
                lines[-1] += f" {word}"
            else:
                lines.append(f"\t{word}")
        if max(map(len, lines)) > LONGEST_LINE:
            raise ValueError(f"a word in the value of {name} is longer than a line may be")
        added = "".join(f"{line}\n" for line in lines).encode()
        if len(self.lines) + len(added) > MAX_ADDED:
            raise ValueError(
                f"{name} would be more than the {MAX_ADDED:,} octets that may be added"
            )
        self.lines += added


@functools.lru_cache(maxsize=1)
def _date(second: int) -> str:
    """The same for all messages of a second."""
    return formatdate(second, localtime=True)


def header_end(content: bytes | memoryview) -> int:
    """Where the header of a message (with LF line ends) ends: after its last line, and before the
    empty line if there is one.

    It ends at the first line that is neither a field nor the continuation of one (RFC 5322 2.1,
    2.2).  So it is empty where the first line is none: 0.
    """
    if not _FIRST_LINE.match(content):
        return 0
    found = _AFTER_HEADER.search(content)
    return found.start() + 1 if found else len(content)


def separator(content: bytes | memoryview) -> bytes:
    """What goes between header lines of ours and a message (with LF line ends): an empty line, if
    its first line would otherwise continue ours, or stand among them."""
    follows = not content or content[:1] == b"\n" or _FIRST_LINE.match(content)
    return b"" if follows else b"\n"


def hops(content: bytes) -> int:
    """How many Received fields the header of a message (with LF line ends) has."""
    return len(_RECEIVED.findall(content, 0, header_end(content)))


def envelope_lines(reverse_path: str, recipient: str) -> bytes:
    """The envelope as header lines, to stand on top where only the message is kept.  A
    :func:`separator` goes between them and that."""
    return f"Return-Path: <{reverse_path}>\nDelivered-To: {recipient}\n".encode()


def stored_envelope(envelope: Envelope, recipient: str) -> bytes:
    """:func:`envelope_lines` for one recipient, and a third line, if there is anything to say in
    it: what the sender says of notifications, and the client, as XFORWARD would have it::

        X-Envelope-Parameters: MAIL ENVID=7 RCPT NOTIFY=NEVER XFORWARD NAME=... ADDR=203.0.113.9
    """
    lines = envelope_lines(envelope.reverse_path, recipient)
    # RFC 6531 3.4: what such an address needs, need not be said beside it.
    keys = _OF_MAIL if lines.isascii() else tuple(key for key in _OF_MAIL if key != "SMTPUTF8")
    of_mail = _words(envelope.mail_options, keys)
    of_rcpt = _words(envelope.rcpt_options.get(recipient, {}), _OF_RCPT)
    of_client = ["XFORWARD", *words(envelope.client)] if envelope.client is not None else []
    if not of_mail and not of_rcpt and not of_client:
        return lines
    said = " ".join(("MAIL", *of_mail, "RCPT", *of_rcpt, *of_client))
    return lines + f"X-Envelope-Parameters: {said}\n".encode("utf-8", "replace")


def _words(options: Mapping[str, str], keys: Sequence[str]) -> list[str]:
    """``KEY=VALUE``; what would not be a word by itself is left out."""
    said = (f"{key}={options[key]}".removesuffix("=") for key in keys if key in options)
    return [word for word in said if _WORD.fullmatch(word)]


def unpack(stored: bytes) -> tuple[Envelope, bytes]:
    """What :func:`stored_envelope` stands on top of: the envelope, and the message.

    The reverse-path or the recipient is empty where the first lines do not have it.
    """
    parts = _split(stored)
    return _envelope(parts), stored[parts.end :]


def _envelope(parts: _Parts) -> Envelope:
    of_mail, of_rcpt, client = _options(parts.parameters)
    reverse_path, recipient = parts.reverse_path or "", parts.recipient or ""
    if not (reverse_path + recipient).isascii():
        of_mail = {**of_mail, "SMTPUTF8": ""}
    helo = client.helo if client is not None else ""
    options = of_mail, {recipient: of_rcpt}
    return Envelope(reverse_path, (recipient,), *options, helo, client=client)


def split_envelope(stored: bytes) -> tuple[str | None, str | None, bytes]:
    """The same as reverse-path, recipient and message; ``None`` for what the first lines do not
    have."""
    parts = _split(stored)
    return parts.reverse_path, parts.recipient, stored[parts.end :]


# -- what is undeliverable ------------------------------------------------------------------------


def undeliverable_envelope(envelope: Envelope, recipients: Sequence[str], reason: str) -> bytes:
    """:func:`stored_envelope` for what no handler has taken, and why: for the first of
    ``recipients``, and a line that names them all where there are several.  The reason is the last
    line, so nothing that a sender has written below it is taken for one of ours."""
    first, *others = recipients
    lines = stored_envelope(envelope, first)
    if others:
        named = ",\n ".join(recipients)
        lines += f"X-Failed-Recipients: {named}\n".encode("utf-8", "replace")
    return lines + _reason_line(reason)


def with_reason(stored: bytes, reason: str) -> bytes:
    """A message with its envelope on top, if it has one, and the reason why it is undeliverable
    below that, instead of one that is there already."""
    parts = _split(stored)
    head = stored[: parts.above] + _reason_line(reason)
    rest = stored[parts.end :]
    return head + separator(rest) + rest


def unpack_undeliverable(stored: bytes) -> tuple[Envelope, str, bytes]:
    """What :func:`undeliverable_envelope` stands on top of: the envelope, why the message is
    undeliverable, and the message.

    The envelope has no recipients where there is no line of ours that names any, and the reason is
    empty where none was kept.
    """
    parts = _split(stored)
    envelope = replace(_envelope(parts), recipients=parts.failed)
    return envelope, parts.reason, stored[parts.end :]


def _reason_line(reason: str) -> bytes:
    text = shortened(printable(" ".join(reason.split())), LONGEST_REASON)
    return f"X-Undeliverable-Reason: {text}\n".encode("utf-8", "replace")


class _Parts(NamedTuple):
    """What our lines on top of a message say; where those before the reason end, and where all
    end.  ``failed``: all recipients that have not got it."""

    reverse_path: str | None
    recipient: str | None
    parameters: str
    failed: tuple[str, ...]
    above: int
    reason: str
    end: int


def _split(stored: bytes) -> _Parts:
    reverse_path = recipient = None
    parameters, reason, end = "", "", 0
    if value := _first_line(stored, end, b"return-path"):
        reverse_path, end = value
        reverse_path = reverse_path.removeprefix("<").removesuffix(">")
    if value := _first_line(stored, end, b"delivered-to"):
        recipient, end = value
        if value := _first_line(stored, end, b"x-envelope-parameters"):
            parameters, end = value
    failed: tuple[str, ...] = (recipient,) if recipient else ()
    above = end
    found = _FAILED.match(stored, end) if recipient else None
    if value := _first_line(stored, found.end() if found else end, b"x-undeliverable-reason"):
        reason, end = value
        if found:
            named = found[1].decode("utf-8", "replace").split(",\n ")
            failed, above = tuple(one.strip(_BLANK) for one in named), found.end()
    return _Parts(reverse_path, recipient, parameters, failed, above, reason, end)


def _first_line(stored: bytes, start: int, name: bytes) -> tuple[str, int] | None:
    """The value of the field that begins there, if it has this name, and where it ends."""
    found = _FIELD.match(stored, start)
    if not found or found[1].lower() != name:
        return None
    return found[2].decode("utf-8", "replace").strip(_BLANK), found.end()


def _options(
    parameters: str,
) -> tuple[Mapping[str, str], Mapping[str, str], Client | None]:
    """``MAIL word... RCPT word... XFORWARD word...`` as the options of each, and the client."""
    said, _, of_client = parameters.partition(" XFORWARD ")
    words = said.split(" ")
    middle = words.index("RCPT") if "RCPT" in words else len(words)
    client = None
    with contextlib.suppress(ValueError):  # someone has written in it
        client = Client(**told(of_client))
    return _named(words[:middle], _OF_MAIL), _named(words[middle:], _OF_RCPT), client


def _named(words: Sequence[str], keys: Sequence[str]) -> Mapping[str, str]:
    pairs = (word.partition("=") for word in words)
    return {key: value for key, _, value in pairs if key in keys}
