"""What an agent is handed to work with.

An agent either gives a transport away (:meth:`Collection.receive`, after a reversal) or hands over
messages that it fetched in its own way (:meth:`Collection.deliver`).  Either way the service's
policy and delivery are the same, and the counts go into the same report.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any, Protocol

from salmon_revsmtp.customer.report import Report, iso
from salmon_revsmtp.delivery.dispatcher import Deliverer, PendingDelivery, delivered
from salmon_revsmtp.delivery.trace import Named, Origin
from salmon_revsmtp.hooks import HookCaller
from salmon_revsmtp.net.driver import DEAD_AFTER
from salmon_revsmtp.net.handover import Handover
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.safelog import LogBudget, log_safely
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.recipients import Recipients
from salmon_revsmtp.service.session import PATIENCE, Session, Tally
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.limits import COMMAND_TIMEOUT
from salmon_revsmtp.smtp.receiver import Later, RecipientRequest
from salmon_revsmtp.smtp.replies import Reply, without_surrogates

__all__ = ["Collecting", "Collection"]

log = logging.getLogger(__name__)


class Collecting(Named, Protocol):
    """An agent, as far as it matters here."""

    @property
    def protocol(self) -> str:
        """The word for its type in the settings."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that it asks for."""


class Collection:
    """What an agent's ``collect`` works with.

    ``agent``    the agent.
    ``service``  the inbound service that receives; ``service.hostname`` is our name.
    ``report``   the report in the making.  The agent sets ``sessions``, ``tls`` and ``auth``.
    ``tally``    the counts, live.
    ``stopping`` a stop was asked for: an agent begins nothing new.
    ``may_push`` someone is there to keep a push session open; otherwise the collection has to end.
    ``push_since``  when its push session began, in seconds since the epoch, if it had one.
    ``pushing``  that is open now.
    ``noted``    of the tally, the messages and octets that the journal's traffic has already.
    """

    # What the agent does until a session has been reversed, and after that.
    _doing = "beginning"

    def __init__(
        self,
        agent: Collecting,
        service: Service,
        deliverer: Deliverer,
        plugins: HookCaller,
        recipients: Recipients | None = None,
    ) -> None:
        self.agent = agent
        self.service = service
        self.report = Report(agent.name, agent.protocol)
        self.tally = Tally()
        self._deliverer = deliverer
        self._plugins = plugins
        self._recipients = recipients or Recipients(service.recipient_policy(agent.domains))
        self._session: Session | None = None
        self._log = LogBudget()
        self._since = time.monotonic()
        self.stopping = False
        self.may_push = False
        self.push_since: float | None = None
        self.noted = (0, 0)

    @property
    def unnoted(self) -> tuple[int, int]:
        """The messages and octets of :attr:`tally` that are not in :attr:`noted`."""
        return self.tally.messages - self.noted[0], self.tally.bytes - self.noted[1]

    def does(self, what: str) -> None:
        """Say what the agent does now, or waits for: a person sees it when it takes long.

        Begins with a verb: ``waiting for the answer of odmr.example.net:366 to ATRN``.
        """
        self._doing, self._since = what, time.monotonic()

    @property
    def doing(self) -> tuple[str, float]:
        """What goes on, and for how many seconds."""
        session = self._session
        what, since = session.doing if session is not None else (self._doing, self._since)
        return what, max(0.0, time.monotonic() - since)

    async def receive(
        self,
        answer: Handover,
        idle_timeout: float = COMMAND_TIMEOUT,
        silence: float | None = None,
    ) -> Session:
        """Reverse the roles: be the SMTP server on the transport that ``answer`` waits on, until
        the connection ends.

        ``idle_timeout`` in seconds; after ``silence``, if given, the system sees whether the
        provider is there.  Returns the ended session.  Raises
        :class:`~salmon_revsmtp.Failed` when the transport cannot be had.
        """
        session = Session(
            self.service,
            self._recipients,
            self._deliverer,
            self._origin(),
            self.tally,
            idle_timeout,
            log=self._log,
            patience=PATIENCE if silence is None else None,
        )
        # The hook comes before our 220: a session whose plugins are not ready has not begun.
        session.peer, session.tls = answer.peer, answer.tls
        await self.call("connection_reversed", session=session)
        answer.hand_over(session)
        if silence is not None:
            session.keep_alive(silence)
        self._session = session
        try:
            await session.ended
        except asyncio.CancelledError:
            session.abort("the collection was cancelled")
            raise
        finally:
            self._session = None
            self._log.close(log)
            self.does("ending the session")
        return session

    async def receive_pushed(self, answer: Handover, silence: float) -> Session:
        """:meth:`receive`, in a session that stays open when the mail that waits has come: the
        provider says something every ``silence`` seconds at least."""
        self.push_since = time.time()
        session = await self.receive(answer, DEAD_AFTER * silence, silence)
        minutes = (time.time() - self.push_since) / 60
        if not self.stopping:
            log_safely(
                log,
                logging.INFO,
                "agent=%s the push session ended after %.1f minutes and %d messages: %s",
                *(self.agent.name, minutes, self.tally.messages, session.broken or "by QUIT"),
            )
        return session

    @property
    def pushing(self) -> bool:
        """A push session is open."""
        return self.push_since is not None and self._session is not None

    def so_far(self) -> Report:
        """What a push session has brought up to now."""
        tally = self.tally
        return replace(
            self.report,
            outcome=Outcome.COLLECTED if tally.messages else Outcome.NO_MAIL,
            messages=tally.messages,
            recipients=tally.recipients,
            bytes=tally.bytes,
            refused=tally.refused,
            seconds=time.time() - (self.push_since or time.time()),
            push=None if self.push_since is None else iso(self.push_since),
        )

    def stop(self) -> bool:
        """End at the next message boundary: the message in hand is answered, a new one gets 421.

        ``False``: no message can be in hand, the collection may as well be cancelled.
        """
        self.stopping = True
        if self._session is None:
            return False
        self._session.shut_down()
        return True

    async def deliver(
        self, envelope: Envelope, data: bytes, peer: tuple[str, int] = ("127.0.0.1", 0)
    ) -> tuple[Reply, ...]:
        """Deliver a message that the agent has fetched itself; returns one reply per recipient.

        2yz: the message is safe.  4yz: keep it and try again later.  5yz: it will never be taken.
        The service's domains and limits hold here, too.  ``data`` may have any line ends.
        """
        replies = {one: await self._refusal(one, envelope, data) for one in envelope.recipients}
        wanted = tuple(one for one, refusal in replies.items() if refusal is None)
        for refusal in replies.values():
            if refusal is not None:
                self.tally.refuse(1, refusal)
        if wanted:
            accepted = Envelope(
                without_surrogates(envelope.reverse_path),
                tuple(without_surrogates(one) for one in wanted),
                {**envelope.mail_options, "PRDR": ""},  # every recipient has a reply of its own
                envelope.rcpt_options,
                envelope.helo,
                envelope.esmtp,
                envelope.client,
            )
            origin = self._origin(authenticated=False).over(peer, tls=False)
            pending = PendingDelivery(origin, accepted, data, log=self._log)
            reply = await delivered(self._deliverer, pending)
            self.tally.add(pending)
            replies.update(zip(wanted, pending.replies, strict=True))
        return tuple(replies[one] or reply for one in envelope.recipients)

    async def _refusal(self, recipient: str, envelope: Envelope, data: bytes) -> Reply | None:
        if len(data) > self.service.limits.message:
            return Reply(552, f"more than {self.service.limits.message} octets", "5.3.4")
        verdict = self._recipients.verdict(recipient)
        if isinstance(verdict, Later):
            options = envelope.rcpt_options.get(recipient, {})
            request = RecipientRequest(replace(envelope, recipients=()), recipient, options)
            reply = await self._recipients.decide(request)
            return None if reply is None or reply.positive else reply
        return verdict

    def _origin(self, *, authenticated: bool = True) -> Origin:
        return Origin(
            self.service.name,
            self.service.hostname,
            self.agent,
            authenticated=authenticated,
        )

    async def call(self, hook: str, **arguments: Any) -> None:
        """A hook, in a thread of its own: it may block, and only this collection waits."""
        await self._plugins.call_apart(hook, self.agent, **arguments)
