"""What an agent is handed to work with.

An agent either gives a transport away (:meth:`Collection.receive`, after a reversal) or hands over
messages that it fetched in its own way (:meth:`Collection.deliver`).  Either way the service's
policy and delivery are the same, and the counts go into the same report.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.delivery.dispatcher import Dispatcher, PendingDelivery
from salmon_revsmtp.delivery.trace import Named, Origin
from salmon_revsmtp.hooks import HookCaller
from salmon_revsmtp.net.handover import Handover
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.session import Session, Tally
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.limits import COMMAND_TIMEOUT
from salmon_revsmtp.smtp.replies import Reply, without_surrogates

__all__ = ["Collecting", "Collection"]


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
    """

    # What the agent does until a session has been reversed, and after that.
    _doing = "beginning"

    def __init__(
        self,
        agent: Collecting,
        service: Service,
        dispatcher: Dispatcher,
        plugins: HookCaller,
    ) -> None:
        self.agent = agent
        self.service = service
        self.report = Report(agent.name, agent.protocol)
        self.tally = Tally()
        self._dispatcher = dispatcher
        self._plugins = plugins
        self._policy = service.recipient_policy(agent.domains)
        self._session: Session | None = None
        self._since = time.monotonic()
        self.stopping = False

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

    async def receive(self, answer: Handover, idle_timeout: float = COMMAND_TIMEOUT) -> Session:
        """Reverse the roles: be the SMTP server on the transport that ``answer`` waits on, until
        the connection ends.

        ``idle_timeout`` in seconds.  Returns the ended session.  Raises
        :class:`~salmon_revsmtp.Failed` when the transport cannot be had.
        """
        session = Session(
            self.service, self._policy, self._dispatcher, self._origin(), self.tally, idle_timeout
        )
        # The hook comes before our 220: a session whose plugins are not ready has not begun.
        session.peer, session.tls = answer.peer, answer.tls
        await self.call("connection_reversed", session=session)
        answer.hand_over(session)
        self._session = session
        try:
            await session.ended
        except asyncio.CancelledError:
            session.abort("the collection was cancelled")
            raise
        finally:
            self._session = None
            self.does("ending the session")
        return session

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
        replies = {one: self._refusal(one, data) for one in envelope.recipients}
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
            )
            origin = self._origin(authenticated=False).over(peer, tls=False)
            pending = PendingDelivery(origin, accepted, data)
            reply = await self._dispatcher.delivered(pending)
            self.tally.add(pending)
            replies.update(zip(wanted, pending.replies, strict=True))
        return tuple(replies[one] or reply for one in envelope.recipients)

    def _refusal(self, recipient: str, data: bytes) -> Reply | None:
        if len(data) > self.service.limits.message:
            return Reply(552, f"more than {self.service.limits.message} octets", "5.3.4")
        return self._policy(recipient)

    def _origin(self, *, authenticated: bool = True) -> Origin:
        return Origin(
            self.service.name,
            self.service.hostname,
            self.agent,
            authenticated=authenticated,
        )

    async def call(self, hook: str, **arguments: Any) -> None:
        """A hook, in a thread of its own: it may block, and only this collection waits."""
        if self._plugins.implemented(hook):
            await asyncio.to_thread(self._plugins.call, hook, agent=self.agent, **arguments)
