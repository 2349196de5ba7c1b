"""What a transaction says beside its data: sender, recipients, parameters (RFC 5321 2.3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

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
    ``prdr``          the client wants one reply per recipient after the data (draft-hall-prdr).
    ``smtputf8``      addresses or headers may be UTF-8 (RFC 6531).
    """

    reverse_path: str
    recipients: tuple[str, ...]
    mail_options: Mapping[str, str] = field(default_factory=dict)
    rcpt_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    helo: str = ""
    esmtp: bool = True
    prdr: bool = field(init=False, repr=False, compare=False)
    smtputf8: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prdr", "PRDR" in self.mail_options)
        object.__setattr__(self, "smtputf8", "SMTPUTF8" in self.mail_options)

    def spelled(self, spell: Callable[[str], str]) -> Envelope:
        """The same with each recipient as ``spell`` has it."""
        recipients = tuple(map(spell, self.recipients))
        if recipients == self.recipients:
            return self
        options = {spell(one): said for one, said in self.rcpt_options.items()}
        return replace(self, recipients=recipients, rcpt_options=options)
