"""The header lines that we add: Received, and the envelope (RFC 5321 4.4, RFC 9228)."""

from __future__ import annotations

import functools
import re
import secrets
import time
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Protocol

from salmon_revsmtp.smtp.envelope import Envelope

__all__ = ["MAX_HOPS", "Named", "Origin", "envelope_lines", "hops", "split_envelope"]

# RFC 5321 6.3: that many Received lines are a loop.
MAX_HOPS = 100

_UNSAFE = re.compile(r"[^A-Za-z0-9.:\[\]_-]")
_RECEIVED = re.compile(rb"^received:", re.IGNORECASE | re.MULTILINE)
_FIELD = re.compile(rb"([!-9;-~]+):[ \t]*([^\n]*)\n")

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

    def received(self, envelope: Envelope, recipient: str) -> bytes:
        """A whole ``Received:`` header with LF line ends."""
        helo = _UNSAFE.sub("?", envelope.helo)[:255] or "unknown"
        address = self.peer[0]
        client = f"IPv6:{address}" if ":" in address else address
        # RFC 3848, RFC 6531 4.3: ESMTPSA and its kin.
        protocol = "SMTP"
        if envelope.esmtp:
            protocol = "UTF8SMTP" if envelope.smtputf8 else "ESMTP"
            protocol += ("S" if self.tls else "") + ("A" if self.authenticated else "")
        return (
            f"Received: from {helo} ([{client}])\n"
            f"\tby {self.hostname} (salmon-revsmtp {self.label.replace('=', ' ', 1)})\n"
            f"\twith {protocol} id {secrets.token_hex(8)}\n"
            f"\tfor <{recipient}>; {_date(int(time.time()))}\n"
        ).encode()


@functools.lru_cache(maxsize=1)
def _date(second: int) -> str:
    """The same for all messages of a second."""
    return formatdate(second, localtime=True)


def hops(content: bytes) -> int:
    """How many Received headers a message (with LF line ends) has."""
    end = content.find(b"\n\n")
    return len(_RECEIVED.findall(content, 0, end if end >= 0 else len(content)))


def envelope_lines(reverse_path: str, recipient: str) -> bytes:
    """The envelope as header lines, to stand on top where only the message is kept."""
    return f"Return-Path: <{reverse_path}>\nDelivered-To: {recipient}\n".encode()


def split_envelope(stored: bytes) -> tuple[str | None, str | None, bytes]:
    """What :func:`envelope_lines` stands on top of: reverse-path, recipient, message.

    ``None`` for what the first lines do not have.
    """
    reverse_path = recipient = None
    if (found := _FIELD.match(stored)) and found[1].lower() == b"return-path":
        reverse_path = found[2].decode("utf-8", "replace").strip(_BLANK).removeprefix("<")
        reverse_path = reverse_path.removesuffix(">")
        stored = stored[found.end() :]
    if (found := _FIELD.match(stored)) and found[1].lower() == b"delivered-to":
        recipient = found[2].decode("utf-8", "replace").strip(_BLANK)
        stored = stored[found.end() :]
    return reverse_path, recipient, stored
