"""What a transaction says beside its data: sender, recipients, parameters (RFC 5321 2.3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from salmon_revsmtp.smtp.xtext import decode_utf8_address, decode_xtext

__all__ = ["Client", "Envelope"]


@dataclass(frozen=True)
class Client:
    """The host that a message came from, as whoever took it from there saw it: we, or who tells us
    of it by XFORWARD.  Then it is harmless: addresses are addresses, names are host names, and the
    rest is ASCII that one can see, of 255 characters at most.

    ``address``   its IP address, without brackets; ``""`` where that is not known.
    ``port``      its TCP port; 0 where that is not known.
    ``name``      its host name by DNS; ``""`` where no one asked, or it has none.
    ``protocol``  how it spoke: ``"SMTP"`` or ``"ESMTP"``; ``""`` where that is not known.
    ``helo``      what it called itself in EHLO or HELO.
    ``ident``     what tells its message from others, for who took it; ``""``: nothing does.
    """

    address: str = ""
    port: int = 0
    name: str = ""
    protocol: str = ""
    helo: str = ""
    ident: str = ""


@dataclass(frozen=True)
class Envelope:
    """Sender and recipients of one transaction.

    ``reverse_path``  the sender's mailbox; ``""`` is the null reverse-path ``<>`` of a bounce.
    ``recipients``    the accepted recipients' mailboxes, in the order of their RCPTs.
    ``mail_options``  the parameters of MAIL, keys in upper case, ``""`` for a key without value.
    ``rcpt_options``  per recipient, the parameters of its RCPT (RFC 3461: NOTIFY, ORCPT).
    ``helo``          what the client called itself in EHLO or HELO; ``""`` where that is not known.
    ``esmtp``         whoever sent it to us said EHLO.
    ``client``        the host that it came from; ``None`` where that is not known.
    ``forwarded_by``  what the host called itself that told us of ``client`` (XFORWARD); ``""``: it
                      is the client itself that sent it to us.
    ``prdr``          the client wants one reply per recipient after the data (draft-hall-prdr).
    ``smtputf8``      addresses or headers may be UTF-8 (RFC 6531).
    """

    reverse_path: str
    recipients: tuple[str, ...]
    mail_options: Mapping[str, str] = field(default_factory=dict)
    rcpt_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    helo: str = ""
    esmtp: bool = True
    client: Client | None = None
    forwarded_by: str = ""
    prdr: bool = field(init=False, repr=False, compare=False)
    smtputf8: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prdr", "PRDR" in self.mail_options)
        object.__setattr__(self, "smtputf8", "SMTPUTF8" in self.mail_options)

    @property
    def peer(self) -> tuple[str, int] | None:
        """The client's address and port; ``None`` where the address is not known."""
        client = self.client
        return (client.address, client.port) if client is not None and client.address else None

    @property
    def forwarded(self) -> Client | None:
        """The client, where it is another host that has told us of it."""
        return self.client if self.forwarded_by else None

    @property
    def envelope_id(self) -> str | None:
        """ENVID as the sender means it (RFC 3461 4.4), ``None`` without."""
        envid = self.mail_options.get("ENVID")
        return None if envid is None else decode_xtext(envid)

    @property
    def returns_full(self) -> bool:
        """RET=FULL: a sender who is told of a failure wants the whole message back (RFC 3461
        4.3)."""
        return self.mail_options.get("RET", "").upper() == "FULL"

    def original_recipient(self, recipient: str) -> tuple[str, str] | None:
        """ORCPT of a recipient as type and address (RFC 3461 4.2), ``None`` without."""
        kind, colon, address = self.rcpt_options.get(recipient, {}).get("ORCPT", "").partition(";")
        if not colon:
            return None
        address = decode_xtext(address)
        kind = kind.lower()
        return kind, decode_utf8_address(address) if kind == "utf-8" else address

    def wants(self, recipient: str, action: str) -> bool:
        """Whether the sender is to be told what became of a recipient (RFC 3461 4.1).

        ``action``  ``"failed"``, ``"delayed"``, or one of those that are no failure.  Without
                    NOTIFY, failures and delays are told.
        """
        asked = self.rcpt_options.get(recipient, {}).get("NOTIFY", "FAILURE,DELAY")
        word = {"failed": "FAILURE", "delayed": "DELAY"}.get(action, "SUCCESS")
        return word in asked.upper().split(",")

    def spelled(self, spell: Callable[[str], str]) -> Envelope:
        """The same with each recipient as ``spell`` has it."""
        recipients = tuple(map(spell, self.recipients))
        if recipients == self.recipients:
            return self
        options = {spell(one): said for one, said in self.rcpt_options.items()}
        return replace(self, recipients=recipients, rcpt_options=options)
