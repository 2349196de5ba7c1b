"""Live: while a customer's session is open, a sender hears what the customer itself says.

At RCPT the customer is asked for the recipient, and at the end of data the message goes down its
session before the sender hears anything.  Then nothing has to be held, and no one has to be told
later that it was refused.

What the customer says for good (2yz, 5yz) is the sender's answer.  Whatever else comes of it (4yz,
no answer in time, a session that breaks or is replaced, a provider that stops) leads to what is
done without a session: the recipient is accepted, the message is held, and pushed as soon as that
can be.  A 5yz never comes from here: where it is the protocol's or ours, and not the customer's
word on this mail, the message is held, too.

The question and the message are two transactions, so that a sender that takes its time for the data
is in no one's way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from salmon_revsmtp.foreign import ERROR_TEXT, angle, shortened
from salmon_revsmtp.provider.accounts import Account, Accounts
from salmon_revsmtp.provider.handover import HandOver, Passing
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.addresses import domain_of
from salmon_revsmtp.smtp.content import Content
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.receiver import LATER, RecipientRequest, Verdict
from salmon_revsmtp.smtp.replies import Reply, is_about_mail
from salmon_revsmtp.smtp.sender import Sent

__all__ = ["Live", "Said"]

log = logging.getLogger(__name__)

# Seconds that a sender waits for the customer's word on a recipient, and on a message.  RFC 5321
# 4.5.3.2 has it wait for 5 and for 10 minutes; what is late is held, and pushed.  A large message
# has the time that it takes on a line of so many octets a second, too, within bounds.
RECIPIENT_IN = 15.0
MESSAGE_IN = 60.0
MESSAGE_AT_MOST = 300.0
LEAST_RATE = 64 * 1024

# While a sender waits, a refusal of a command's form or parameters is in doubt as well: the message
# is held, and goes out again.
_IN_DOUBT = frozenset({501, 555})
# What a 2yz to RCPT, or to a message, may be (RFC 5321 4.3.2).
_POSITIVE = frozenset({250, 251, 252})

#: The session of an account that passes on what there is for a domain, if there is one.
Find = Callable[[str, str], HandOver | None]


@dataclass(frozen=True)
class Said:
    """What a customer said of a message, by recipient in the envelope's order.

    ``replies``  its 2yz or 5yz; ``None``: the message is to be held for this one.
    ``reason``   why there is none; ``""`` where there are all.
    """

    replies: Sequence[Reply | None]
    reason: str = ""


class Live:
    """Passes transactions on to customers that are there.

    ``find``    their sessions.
    ``counts``  what became of messages: ``"live"``, ``"fell back"``; and of recipients that were
                asked for: ``"recipient"``, ``"recipient refused"``, ``"recipient fell back"``.
    """

    def __init__(self, accounts: Accounts, find: Find) -> None:
        self._accounts, self._find = accounts, find
        self._under_way: dict[Passing, HandOver] = {}
        self._stopped = False
        self.counts: Counter[str] = Counter()

    def verdict(self, mailbox: str) -> Verdict:
        """Whether there is anyone to ask."""
        return LATER if self._session(mailbox) is not None else None

    def _session(self, mailbox: str) -> HandOver | None:
        account = self._accounts.of_domain(domain_of(mailbox)) if "@" in mailbox else None
        return self._session_of(account, mailbox)

    def _session_of(self, account: Account | None, mailbox: str) -> HandOver | None:
        if account is None or "@" not in mailbox or not account.settings.live or self._stopped:
            return None
        return self._find(account.name, domain_of(mailbox))

    async def decide(self, request: RecipientRequest) -> Reply | None:
        """The customer's 2yz or 5yz for a recipient; ``None``, it is accepted, where it says
        neither."""
        session = self._session(request.recipient)
        if session is None:
            return None
        one = request.recipient
        envelope = replace(
            request.envelope, recipients=(one,), rcpt_options={one: dict(request.options)}
        )
        said = await self._pass_on(session, envelope, None, RECIPIENT_IN)
        [reply] = said.replies
        what = "recipient fell back" if reply is None else "recipient"
        if reply is not None and reply.permanent:
            what = "recipient refused"
        self.counts[what] += 1
        if reply is None:
            log_safely(
                log,
                logging.INFO,
                "from=%s to=%s accepted, to be held: %s",
                *(angle(envelope.reverse_path), angle(one), said.reason),
            )
        return reply

    def takes(self, owners: Sequence[Account | None], envelope: Envelope) -> HandOver | None:
        """The session that a message can go down now, whose recipients have these ``owners``: they
        are of one account."""
        both = zip(owners, envelope.recipients, strict=True)
        sessions = {self._session_of(*one) for one in both}
        return sessions.pop() if len(sessions) == 1 else None

    async def send(self, session: HandOver, envelope: Envelope, content: bytes | Content) -> Said:
        """Send a message; returns what the customer says, or why it says nothing."""
        octets = len(content) if isinstance(content, bytes) else content.size
        seconds = min(MESSAGE_IN + octets / LEAST_RATE, max(MESSAGE_IN, MESSAGE_AT_MOST))
        said = await self._pass_on(session, envelope, content, seconds)
        if any(reply is not None for reply in said.replies):
            session.passed_on += 1
            self.counts["live"] += 1
        else:
            session.fell_back += 1
            self.counts["fell back"] += 1
        return said

    async def _pass_on(
        self,
        session: HandOver,
        envelope: Envelope,
        content: bytes | Content | None,
        seconds: float,
    ) -> Said:
        passing = session.pass_on(envelope, content)
        self._under_way[passing] = session
        try:
            sent = await asyncio.wait_for(asyncio.shield(passing.answer), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            session.give_up(passing)
            return _nothing(envelope, f"the customer did not answer in {seconds:.3g} seconds")
        except asyncio.CancelledError:  # the sender is gone
            session.forget(passing)
            raise
        finally:
            self._under_way.pop(passing, None)
        if sent is None:
            why = "this server is stopping" if self._stopped else "the customer's session ended"
            return _nothing(envelope, why)
        return _said(sent)

    def stop(self) -> None:
        """Pass nothing on any more; whoever waits for an answer waits no longer."""
        self._stopped = True
        for passing, session in list(self._under_way.items()):
            session.forget(passing)


def _nothing(envelope: Envelope, reason: str) -> Said:
    return Said([None] * len(envelope.recipients), reason)


def _said(sent: Sent) -> Said:
    """What is the customer's own word, and for good."""
    if not sent.asked:
        return _nothing(sent.message.envelope, f"the customer cannot be sent it: {sent.replies[0]}")
    replies = [
        None if reply.transient or not is_about_mail(reply, _IN_DOUBT) else _passed_on(reply)
        for reply in sent.replies
    ]
    missing = [was for was, reply in zip(sent.replies, replies, strict=True) if reply is None]
    return Said(replies, f"the customer says {missing[0]}" if missing else "")


def _passed_on(reply: Reply) -> Reply:
    """A reply as the sender hears it.  A 5yz is short by itself; a 2yz of thousands of lines, or
    one that greets or says goodbye, is nothing that a sender has to expect."""
    if not reply.positive:
        return reply
    code = reply.code if reply.code in _POSITIVE else 250
    return replace(reply, code=code, text=shortened(reply.text, ERROR_TEXT))
