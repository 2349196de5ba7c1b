"""One run of an agent: what the agent is handed to work with, and what comes of it.

An agent either gives a transport away (:meth:`Collection.receive`, after a reversal) or hands over
messages that it fetched in its own way (:meth:`Collection.deliver`).  Either way the service's
policy and delivery are the same, and the counts go into the same report.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salmon_revsmtp.delivery.courier import Courier, Errand
from salmon_revsmtp.delivery.trace import Hop
from salmon_revsmtp.locks import only_one
from salmon_revsmtp.report import CollectionError, Outcome, Report
from salmon_revsmtp.service import COMMAND_TIMEOUT, Answer, Service, Session, Tally
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.receiver import Transaction
from salmon_revsmtp.smtp.replies import Reply, sound

if TYPE_CHECKING:
    from salmon_revsmtp.agents.base import Agent
    from salmon_revsmtp.client import LastAnswer
    from salmon_revsmtp.plugins import Plugins

__all__ = ["Collection", "run"]

log = logging.getLogger(__name__)

LOCKS = Path("run")


class Collection:
    """What an agent's ``collect`` works with.

    ``agent``    the agent.
    ``service``  the inbound service that receives; ``service.hostname`` is our name.
    ``report``   the report in the making.  The agent sets ``sessions``, ``tls`` and ``auth``.
    ``tally``    the counts, live.
    ``stopping`` somebody wants it to end: an agent begins nothing new.
    """

    def __init__(
        self,
        agent: Agent,
        service: Service,
        courier: Courier,
        plugins: Plugins,
    ) -> None:
        self.agent = agent
        self.service = service
        self.report = Report(agent.name, agent.protocol)
        self.tally = Tally()
        self._courier = courier
        self._plugins = plugins
        self._policy = service.recipient_policy(agent.domains)
        self._session: Session | None = None
        self.stopping = False

    async def receive(self, answer: LastAnswer, idle_timeout: float = COMMAND_TIMEOUT) -> Session:
        """Reverse the roles: be the SMTP server on the transport that ``answer`` waits on, until
        the connection ends.

        ``idle_timeout`` in seconds.  Returns the ended session.  Raises
        :class:`~salmon_revsmtp.report.Failed` when the transport cannot be had.
        """
        session = Session(
            self.service, self._policy, self._deliver_transaction, self.tally, idle_timeout
        )
        # The hook comes before our 220: a session whose plugins are not ready has not begun.
        session.peer, session.tls = answer.peer, answer.tls
        await self._call("connection_reversed", session=session)
        answer.hand_over(session)
        self._session = session
        try:
            await session.ended
        except asyncio.CancelledError:
            session.abort("the collection was cancelled")
            raise
        finally:
            self._session = None
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
                sound(envelope.reverse_path),
                tuple(sound(one) for one in wanted),
                {**envelope.mail_options, "PRDR": ""},  # every recipient has a reply of its own
                envelope.rcpt_options,
                envelope.helo,
                envelope.esmtp,
            )
            hop = self._hop(peer, tls=False, authenticated=False)
            answer = await self._courier.delivered(Errand(self.agent, peer, hop, accepted, data))
            self.tally.add(answer, len(data))
            replies.update(zip(wanted, answer.each, strict=True))
        return tuple(replies[one] or answer.reply for one in envelope.recipients)

    def _refusal(self, recipient: str, data: bytes) -> Reply | None:
        if len(data) > self.service.limits.message:
            return Reply(552, f"more than {self.service.limits.message} octets", "5.3.4")
        return self._policy(recipient)

    def _deliver_transaction(
        self,
        transaction: Transaction,
        session: Session,
        answered: Callable[[Answer | RuntimeError], None],
    ) -> None:
        hop = self._hop(session.peer, tls=session.tls, authenticated=True)
        errand = Errand(self.agent, session.peer, hop, transaction.envelope, transaction.data)
        self._courier.deliver(errand, answered)

    def _hop(self, peer: tuple[str, int], *, tls: bool, authenticated: bool) -> Hop:
        return Hop(peer[0], self.service.hostname, f"agent {self.agent.name}", tls, authenticated)

    async def _call(self, hook: str, **arguments: Any) -> None:
        """A hook, in a thread of its own: it may block, and only this collection waits."""
        if self._plugins.implemented(hook):
            await asyncio.to_thread(self._plugins.call, hook, agent=self.agent, **arguments)


async def run(collection: Collection) -> Report:
    """Run a collection to its end; returns the report, whatever happens.

    Two collections of one agent never run at once, in whatever process: the second is ``busy``.
    """
    report, agent = collection.report, collection.agent
    started = time.monotonic()
    with only_one(LOCKS / f"agent-{agent.name}.lock") as ours:
        if not ours:
            report.outcome = Outcome.BUSY
            report.error = "another collection of this agent is running; wait for it to end"
            return report
        await collection.service.find_hostname()
        await collection._call("collection_started")
        try:
            report.outcome = await agent.collect(collection)
        except CollectionError as error:
            report.outcome, report.error = error.outcome, sound(str(error))
        except asyncio.CancelledError:
            report.outcome, report.error = Outcome.FAILED, "interrupted"
            raise
        except Exception as error:
            log.exception("agent=%s the agent type has a bug", agent.name)
            report.outcome = Outcome.FAILED
            report.error = sound(
                f"bug in agent type {agent.protocol!r}: {type(error).__name__}: {error}"
            )
        finally:
            tally = collection.tally
            report.messages, report.recipients = tally.messages, tally.recipients
            report.bytes, report.refused = tally.bytes, tally.refused
            report.seconds = time.monotonic() - started
            quiet = report.outcome in (Outcome.NO_MAIL, Outcome.BUSY) or not report.outcome.good
            level = logging.DEBUG if quiet else logging.INFO
            log.log(level, "agent=%s %s", agent.name, _line(report))
        await collection._call("collection_finished", report=report)
    return report


def _line(report: Report) -> str:
    shown = {key: value for key, value in report.as_dict().items() if key != "agent"}
    return " ".join(f"{key}={value!r}" for key, value in shown.items() if value is not None)
