"""What a transaction says beside its data: sender, recipients, parameters (RFC 5321 2.3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Envelope"]


@dataclass(frozen=True)
class Envelope:
    """Sender and recipients of one transaction.

    ``reverse_path``  the sender's mailbox; ``""`` is the null reverse-path ``<>`` of a bounce.
    ``recipients``    the accepted recipients' mailboxes, in the order of their RCPTs.
    ``mail_options``  the parameters of MAIL, keys in upper case, ``""`` for a key without value.
    ``rcpt_options``  per recipient, the parameters of its RCPT (RFC 3461: NOTIFY, ORCPT).
    ``helo``          what the client called itself in EHLO or HELO.
    ``esmtp``         it said EHLO.
    """

    reverse_path: str
    recipients: tuple[str, ...]
    mail_options: Mapping[str, str] = field(default_factory=dict)
    rcpt_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    helo: str = ""
    esmtp: bool = True

    @property
    def prdr(self) -> bool:
        """The client wants one reply per recipient after the data (draft-hall-prdr)."""
        return "PRDR" in self.mail_options

    @property
    def smtputf8(self) -> bool:
        """Addresses or headers may be UTF-8 (RFC 6531)."""
        return "SMTPUTF8" in self.mail_options
