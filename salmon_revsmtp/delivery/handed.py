"""What a handler has in its hands: the message that it was given, as it came.

Salmon hands a handler a parsed message.  What parsing loses is still known: who sent it, the null
sender too, and each octet.
"""

from __future__ import annotations

import email.utils
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from salmon import encoding

from salmon_revsmtp.delivery.router import delivery_of
from salmon_revsmtp.delivery.trace import header_end, separator
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import without_surrogates

if TYPE_CHECKING:
    from salmon.mail import MailRequest

__all__ = ["handed_content", "handed_envelope", "handed_octets"]


def handed_envelope(
    message: MailRequest, sender: str | None = None, recipient: str | None = None
) -> Envelope:
    """Its envelope with one recipient: that of a message of ours if it is one, else what Salmon
    makes of it.  ``sender`` and ``recipient`` win if they are given."""
    to = recipient or without_surrogates(str(message.To or ""))
    found = delivery_of(message)
    if found is None:
        return Envelope(_sender(message) if sender is None else sender, (to,))
    came, routed = found
    if to == routed.lower():  # as Salmon has it
        to = routed
    options = {to: came.rcpt_options.get(to, {})}
    path = came.reverse_path if sender is None else sender
    # A handler may make several messages of one; none of them has its ident.
    client = replace(came.client, ident="") if came.client is not None else None
    return replace(came, reverse_path=path, recipients=(to,), rcpt_options=options, client=client)


def _sender(message: MailRequest) -> str:
    """The envelope's sender.  Salmon puts the header's in its place where it is null."""
    said = without_surrogates(str(message.From or ""))
    address = email.utils.parseaddr(said)[1]
    written_out = said.strip() not in (address, f"<{address}>")
    return "" if said in ("", "<>") or written_out else address


def handed_content(message: MailRequest) -> bytes:
    """The message with LF line ends, its last line ended: the octets that came, and what handlers
    have done to the header as :func:`handed_octets` has it."""
    content = _handed(message)
    if delivery_of(message) is not None:
        return content + b"\n"  # we always leave out the last line end, as Salmon's receivers do
    content = content.replace(b"\r\n", b"\n")
    return content if content.endswith(b"\n") else content + b"\n"


def handed_octets(message: MailRequest) -> bytes:
    """The message with CRLF line ends as it came.  Header fields that handlers have added go on
    top of it; where they have changed or deleted others the header is written anew."""
    return _handed(message).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def _handed(message: MailRequest) -> bytes:
    data = message.Data if isinstance(message.Data, bytes) else str(message.Data).encode()
    head = b""
    if not _as_it_came(message):
        added = _added(message, list(encoding.from_string(message.Data).items()))
        if added is not None:
            head = b"".join(f"{name}: {_one_line(value)}\n".encode() for name, value in added)
        else:
            data = str(message).encode("utf-8", "surrogateescape")
    between = separator(data) if head else b""
    return head + between + data


_Fields = list[tuple[str, Any]]


def _as_it_came(message: MailRequest) -> bool:
    """Its header is certainly that which came.  To parse the header alone takes no time, to parse
    the whole once more as long as the first time."""
    if not isinstance(message.Data, bytes):
        return False
    header = message.Data[: header_end(message.Data)]
    return _added(message, list(encoding.from_string(header).items())) == []


def _added(message: MailRequest, came: _Fields) -> _Fields | None:
    """The fields that handlers have added to those that came; ``None`` if they did anything else
    to the header."""
    now = list(message.items())
    added = [one for one in now if one not in came]
    kept = [one for one in now if one in came]
    # Salmon adds these itself where a message lacks them.
    had = {name.lower() for name, _ in came}
    added = [one for one in added if one[0].lower() not in {"from", "to"} - had]
    if kept != came or {name.lower() for name, _ in added} & had:
        return None
    return added


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
