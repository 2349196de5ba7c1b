"""What a handler has in its hands: the message that it was given, as it came.

Salmon hands a handler a parsed message.  What parsing loses is still known: who sent it, the null
sender too, and each octet.
"""

from __future__ import annotations

import email.utils
from dataclasses import replace
from typing import TYPE_CHECKING

from salmon import encoding

from salmon_revsmtp.delivery.router import delivery_of
from salmon_revsmtp.delivery.trace import separator
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
    content = handed_octets(message).replace(b"\r\n", b"\n")
    # Salmon's receivers, and ours, leave out the last line end.
    if delivery_of(message) is not None or not content.endswith(b"\n"):
        content += b"\n"
    return content


def handed_octets(message: MailRequest) -> bytes:
    """The message with CRLF line ends as it came.  Header fields that handlers have added go on
    top of it; where they have changed or deleted others the header is written anew."""
    data = message.Data if isinstance(message.Data, bytes) else str(message.Data).encode()
    now, came = list(message.items()), list(encoding.from_string(message.Data).items())
    added = [one for one in now if one not in came]
    kept = [one for one in now if one in came]
    # Salmon adds these itself where a message lacks them.
    had = {name.lower() for name, _ in came}
    added = [one for one in added if one[0].lower() not in {"from", "to"} - had]
    if kept == came and not {name.lower() for name, _ in added} & had:
        head = b"".join(f"{name}: {_one_line(value)}\n".encode() for name, value in added)
    else:
        head, data = b"", str(message).encode("utf-8", "surrogateescape")
    between = separator(data) if head else b""
    return (head + between + data).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
