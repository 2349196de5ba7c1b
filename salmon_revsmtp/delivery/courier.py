"""One message, all its recipients: what is added, what is refused, and how the replies add up.

Every recipient is delivered on its own, and has a reply of its own.  A client that asked for PRDR
hears each; for the others they are put together so that nobody is served twice and nobody is
forgotten (RFC 5321 4.1.1.4 knows one reply only):

- all succeeded: 250;
- a temporary failure among them: that one.  The journal remembers who has been served, so that
  the client's retry serves only the rest;
- permanent failures beside successes: 250, after a delivery status notification for the failed
  ones (RFC 3464) is safe on disk, on its way to the sender;
- only permanent failures: the first of them.

The order for each recipient is: handled, recorded, told to the plugins, answered.  Between the
first two a crash makes a repeat when the client sends the message again, and loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from salmon_revsmtp.delivery.bounce import Bouncer
from salmon_revsmtp.delivery.served import DeliveryJournal, MessageKey, Served
from salmon_revsmtp.delivery.trace import MAX_HOPS, Hop, hops
from salmon_revsmtp.service import Answer, Service
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

if TYPE_CHECKING:
    from salmon_revsmtp.agents.base import Agent
    from salmon_revsmtp.plugins import Plugins

__all__ = ["Courier", "Delivery", "Errand"]

log = logging.getLogger(__name__)

LOOP = Reply(554, f"{MAX_HOPS} hops, this message runs in a circle", "5.4.6")


#: A message without its trace, in the form in which Salmon's own receivers give it to handlers: LF
#: line ends, the last line without one.  A view, as a rule, so that a large one is not copied.
Content = bytes | memoryview


class Delivery(Protocol):
    """How one message for one recipient is handed to Salmon."""

    def deliver(
        self,
        peer: tuple[str, int],
        envelope: Envelope,
        recipient: str,
        trace: bytes,
        content: Content,
    ) -> Reply:
        """Make ``trace`` and ``content``, the message, safe, then return 2yz; else the reply that
        says why not."""


@dataclass
class Errand:
    """A message to be delivered, and how far that is.

    ``agent``  for hooks and the log; ``None``: it came to a listening service.
    ``peer``   the client's address and port.
    ``hop``    for the ``Received:`` line.
    """

    agent: Agent | None
    peer: tuple[str, int]
    hop: Hop
    envelope: Envelope
    data: bytes
    replies: list[Reply] = field(default_factory=list)
    delivered: int = 0
    digest: bytes = b""
    abandoned: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, reply: Reply, *, delivered: bool) -> None:
        """Note the reply for the next recipient, if anybody still waits for it."""
        with self.lock:
            if not self.abandoned:
                self.replies.append(reply)
                self.delivered += delivered

    def abandon(self, reply: Reply) -> Answer:
        """Wait no longer: the answer is ``reply`` for whoever has not been served so far."""
        with self.lock:
            self.abandoned = True
            left = len(self.envelope.recipients) - len(self.replies)
            each = (*self.replies, *([reply] * left))
        return Answer(_for_all(self.envelope, each) or reply, each, self.delivered, self.digest)


def _for_all(envelope: Envelope, each: Sequence[Reply]) -> Reply | None:
    """The reply that a client hears behind those of the recipients, if it hears those."""
    taken = sum(reply.positive for reply in each)
    if not (envelope.prdr and taken):
        return None
    return Reply(250, f"taken for {taken} of {len(each)} recipients", "2.0.0")


class Courier:
    """Delivers the messages of one service, one after another, in the thread of ``executor``."""

    def __init__(
        self,
        service: Service,
        delivery: Delivery,
        journal: DeliveryJournal,
        plugins: Plugins,
        bouncer: Bouncer,
        executor: Executor,
    ) -> None:
        self._service = service
        self._delivery = delivery
        self._journal = journal
        self._plugins = plugins
        self._bouncer = bouncer
        self._executor = executor

    async def deliver(self, errand: Errand) -> Answer:
        """Deliver a message to every recipient; returns when all of them are safe or refused.

        Past the service's ``handler_timeout`` the answer is 451 for those that are not.  A message
        whose turn has not come by then is not handled at all; a handler that is running goes on,
        and what comes of it is recorded for the client's retry, which waits behind it.
        """
        submitted = self._executor.submit(self._deliver, errand)
        timeout = self._service.settings.handler_timeout
        await asyncio.wait({asyncio.wrap_future(submitted)}, timeout=timeout)
        if submitted.done() and (answer := submitted.result()):
            return answer
        late = Reply(451, f"not done in {timeout:g} seconds, try again later", "4.3.0")
        started = not submitted.cancel()
        log.warning(
            "%s from=<%s> reply=%r %s",
            self._via(errand),
            errand.envelope.reverse_path,
            str(late),
            "its handler goes on" if started else "its turn did not come",
        )
        submitted.add_done_callback(_ended_late)
        return errand.abandon(late)

    # -- in the thread ----------------------------------------------------------------------------

    def _deliver(self, errand: Errand) -> Answer | None:
        """``None``: the errand was abandoned, and nobody waits for an answer."""
        envelope = errand.envelope
        key = MessageKey.of(self._service.name, envelope.reverse_path, errand.data)
        errand.digest = key.digest
        lines = errand.data.replace(b"\r\n", b"\n")
        if hops(lines) >= MAX_HOPS:
            return errand.abandon(LOOP)
        content = memoryview(lines)[: len(lines) - lines.endswith(b"\n")]
        known = self._journal.served(key, self._service.settings.repeat_seconds)
        for recipient in envelope.recipients:
            if errand.abandoned:
                return None
            if served := known.get(recipient):
                errand.add(served.reply, delivered=False)
                continue
            served = self._hand_over(errand, key, recipient, content)
            errand.add(served.reply, delivered=served.reply.positive)
            known[recipient] = served
        if errand.abandoned:
            return None
        reply = self._put_together(errand, key, known, lines)
        return Answer(reply, tuple(errand.replies), errand.delivered, key.digest)

    def _hand_over(
        self, errand: Errand, key: MessageKey, recipient: str, content: Content
    ) -> Served:
        envelope = errand.envelope
        trace = errand.hop.received(envelope, recipient)
        reply = self._asked(errand.agent, envelope, trace, content)
        if reply is None:
            reply = self._delivery.deliver(errand.peer, envelope, recipient, trace, content)
        window = self._service.settings.repeat_seconds
        served = self._journal.record(key, recipient, reply, window)
        log.log(
            logging.INFO if reply.positive else logging.WARNING,
            "%s from=<%s> to=<%s> bytes=%d reply=%r",
            self._via(errand),
            envelope.reverse_path,
            recipient,
            len(trace) + len(content),
            str(reply),
        )
        if self._plugins.implemented("message_delivered"):
            self._plugins.call(
                "message_delivered",
                agent=errand.agent,
                envelope=envelope,
                recipient=recipient,
                reply=reply,
            )
        return served

    def _via(self, errand: Errand) -> str:
        return f"agent={errand.agent.name}" if errand.agent else f"service={self._service.name}"

    def _asked(
        self, agent: Agent | None, envelope: Envelope, trace: bytes, content: Content
    ) -> Reply | None:
        """Whether a plugin refuses the message."""
        if not self._plugins.implemented("message_received"):
            return None
        said = self._plugins.call(
            "message_received", agent=agent, envelope=envelope, message=b"".join((trace, content))
        )
        if said is None or (isinstance(said, Reply) and (said.transient or said.permanent)):
            return said
        log.error("hook=message_received returned %r, which refuses nothing; ignored", said)
        return None

    def _put_together(
        self, errand: Errand, key: MessageKey, known: Mapping[str, Served], content: bytes
    ) -> Reply:
        replies: Sequence[Reply] = errand.replies
        positive = [reply for reply in replies if reply.positive]
        transient = [reply for reply in replies if reply.transient]
        permanent = [reply for reply in replies if reply.permanent]
        if total := _for_all(errand.envelope, replies):
            return total
        if transient:
            return transient[0]
        if not positive:
            return permanent[0]
        if permanent:
            return self._notify(errand.envelope, key, known, content) or positive[0]
        return positive[0]

    def _notify(
        self, envelope: Envelope, key: MessageKey, known: Mapping[str, Served], content: bytes
    ) -> Reply | None:
        """Have the sender told of the failures that it has not been told of; ``None`` when that is
        safe, else the 4yz for the message."""
        failed = {
            recipient: served
            for recipient, served in known.items()
            if served.reply.permanent and not served.notified and recipient in envelope.recipients
        }
        if not failed:
            return None
        replies = {recipient: served.reply for recipient, served in failed.items()}
        refusal = self._bouncer.bounce(envelope, replies, content)
        if refusal is None:
            self._journal.record_notified(key, failed)
        return refusal


def _ended_late(submitted: Future[Answer | None]) -> None:
    """What nobody waits for any more is recorded already; a bug is at least in the log."""
    if not submitted.cancelled() and (error := submitted.exception()):
        log.error("a late delivery failed", exc_info=error)
