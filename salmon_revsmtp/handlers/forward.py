"""Hands a message on to the next server, whose reply becomes ours."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from salmon.server import SMTPError

from salmon_revsmtp.delivery.handed import handed_content, handed_envelope
from salmon_revsmtp.delivery.trace import header_end
from salmon_revsmtp.smtp.addresses import AddressError, to_ascii

if TYPE_CHECKING:
    from salmon.mail import MailRequest

    from salmon_revsmtp.handlers.nexthop import NextHop
    from salmon_revsmtp.smtp.envelope import Envelope

__all__ = ["forward"]


def forward(message: MailRequest, to: NextHop) -> None:
    """Hand a message on for its recipient; returns when the next server has taken it.  Raises
    :class:`~salmon.server.SMTPError` with that server's refusal, or with 451."""
    content = handed_content(message)
    envelope = _on_the_wire(handed_envelope(message), content)
    reply = to.hand_on(envelope, content)
    if not reply.positive:
        raise SMTPError(reply.code, f"{reply.status} {reply.message}")


def _on_the_wire(envelope: Envelope, content: bytes) -> Envelope:
    """An envelope for the next server: the recipient's domain in A-labels, and SMTPUTF8 only where
    addresses or the header need it (RFC 6531 3.4), for many LMTP servers do not offer it."""
    [recipient] = envelope.recipients
    local, at, domain = recipient.rpartition("@")
    try:
        wire = f"{local}@{to_ascii(domain)}" if at else recipient
    except AddressError:
        wire = recipient
    options = dict(envelope.mail_options)
    if content[: header_end(content)].isascii():
        options.pop("SMTPUTF8", None)
    return replace(envelope.spelled(lambda one: wire), mail_options=options)
