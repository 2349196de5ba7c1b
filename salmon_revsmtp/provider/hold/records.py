"""How a store that has no structure for it writes down an envelope: as JSON, in ASCII."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from salmon_revsmtp.provider.hold.store import Arrival, Held, Spool
from salmon_revsmtp.smtp.addresses import domain_of
from salmon_revsmtp.smtp.content import Content
from salmon_revsmtp.smtp.envelope import Client, Envelope

__all__ = ["arrival_of", "envelope_of", "for_domains", "recipients_of", "said_text"]


def said_text(envelope: Envelope) -> str:
    """What the client said beside the addresses, and who it is."""
    said: list[Any] = [dict(envelope.mail_options), envelope.helo, envelope.esmtp]
    if envelope.client is not None:
        said.append(vars(envelope.client))
    return json.dumps(said)


def recipients_of(arrival: Arrival, account: str) -> str:
    """Those of an account, each with what the client said of it."""
    envelope = arrival.envelope
    theirs = [
        [one, envelope.rcpt_options.get(one)]
        for one, whose in zip(envelope.recipients, arrival.accounts, strict=True)
        if whose == account
    ]
    return json.dumps(theirs)


def arrival_of(held: Held, content: bytes | Content, spool: Callable[[], Spool]) -> Arrival:
    """What another store has held, as if it came.  A large one goes through a spool, whose errors
    are told by ``put``."""
    accounts = (held.account,) * len(held.envelope.recipients)
    if isinstance(content, bytes):
        return Arrival(held.envelope, accounts, [content])
    coming = spool()
    try:
        for piece in content.pieces():
            coming.write(piece)
    except BaseException:
        coming.discard()
        raise
    return Arrival(held.envelope, accounts, [], coming)


def envelope_of(sender: str, said: str, recipients: Sequence[Sequence[Any]]) -> Envelope:
    """The envelope of :func:`said_text` and :func:`recipients_of`, as JSON gives them back."""
    options, helo, esmtp, *known = json.loads(said)
    client = Client(**known[0]) if known else None
    names = tuple(one for one, _ in recipients)
    each = {one: said for one, said in recipients if said is not None}
    return Envelope(sender, names, options, each, helo, esmtp, client)


def for_domains(held: Held, domains: Collection[str] | None) -> Held | None:
    """A message for its recipients in the domains that were asked for, if it has any."""
    if domains is None:
        return held
    envelope = held.envelope
    recipients = tuple(one for one in envelope.recipients if domain_of(one) in domains)
    if recipients == envelope.recipients:
        return held
    if not recipients:
        return None
    return replace(held, envelope=replace(envelope, recipients=recipients))
