"""One message, all its recipients: what is added, what is refused, and how the replies add up.

Every recipient is delivered on its own, and has a reply of its own.  A client that asked for PRDR
hears each; for the others they are put together so that nobody is served twice and nobody is
forgotten (RFC 5321 4.1.1.4 knows one reply only):

- all succeeded: 250;
- a temporary failure among them: that one.  Who has been served is remembered, so that the
  client's retry serves only the rest;
- permanent failures beside successes: 250, after a delivery status notification for the failed
  ones (RFC 3464) has gone to the sender;
- only permanent failures: the first of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from salmon_revsmtp.delivery.bounce import Bouncer
from salmon_revsmtp.delivery.served import Served, ServedMemory
from salmon_revsmtp.delivery.trace import MAX_HOPS, Hop, hops
from salmon_revsmtp.service import Answer
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

if TYPE_CHECKING:
    from salmon_revsmtp.agents.base import Agent
    from salmon_revsmtp.plugins import Plugins

__all__ = ["Courier", "Delivery", "as_salmon_has_it"]

log = logging.getLogger(__name__)

LOOP = Reply(554, f"{MAX_HOPS} hops, this message runs in a circle", "5.4.6")


class Delivery(Protocol):
    """How one message for one recipient is handed to Salmon."""

    def deliver(
        self, peer: tuple[str, int], envelope: Envelope, recipient: str, content: bytes
    ) -> Reply:
        """Make it safe, then return 2yz; else the reply that says why not."""


def as_salmon_has_it(data: bytes) -> bytes:
    """A message in the form in which Salmon's own receivers give it to handlers: LF line ends,
    the last line without one."""
    return data.replace(b"\r\n", b"\n").removesuffix(b"\n")


class Courier:
    """Delivers the messages of one service; called in the delivery thread."""

    def __init__(
        self,
        service: str,
        delivery: Delivery,
        memory: ServedMemory,
        plugins: Plugins,
        bouncer: Bouncer,
    ) -> None:
        self._service = service
        self._delivery = delivery
        self._memory = memory
        self._plugins = plugins
        self._bouncer = bouncer

    def deliver(
        self, agent: Agent | None, peer: tuple[str, int], hop: Hop, envelope: Envelope, data: bytes
    ) -> Answer:
        """Deliver a message to every recipient; returns when all of them are safe or refused.

        ``agent`` is for hooks and the log; ``None``: it came to a listening service.
        """
        digest = Served.digest_of(data)
        content = as_salmon_has_it(data)
        if hops(content) >= MAX_HOPS:
            return self._same_for_all(envelope, LOOP, digest)
        replies: list[Reply] = []
        delivered = 0
        for recipient in envelope.recipients:
            served = Served(self._service, envelope.reverse_path, recipient, digest)
            reply = self._memory.reply_to(served)
            if reply is None:
                message = hop.received(envelope, recipient) + content
                reply = self._hand_over(agent, peer, envelope, recipient, message)
                self._memory.record(served, reply)
                delivered += reply.positive
            replies.append(reply)
        reply = self._put_together(envelope, replies, content)
        return Answer(reply, tuple(replies), delivered, digest)

    def _hand_over(
        self,
        agent: Agent | None,
        peer: tuple[str, int],
        envelope: Envelope,
        recipient: str,
        message: bytes,
    ) -> Reply:
        reply = self._asked(agent, envelope, message)
        if reply is None:
            reply = self._delivery.deliver(peer, envelope, recipient, message)
        log.log(
            logging.INFO if reply.positive else logging.WARNING,
            "%s=%s from=<%s> to=<%s> bytes=%d reply=%r",
            *(("agent", agent.name) if agent else ("service", self._service)),
            envelope.reverse_path,
            recipient,
            len(message),
            str(reply),
        )
        if self._plugins.implemented("message_delivered"):
            self._plugins.call(
                "message_delivered",
                agent=agent,
                envelope=envelope,
                recipient=recipient,
                reply=reply,
            )
        return reply

    def _asked(self, agent: Agent | None, envelope: Envelope, message: bytes) -> Reply | None:
        """Whether a plugin refuses the message."""
        if not self._plugins.implemented("message_received"):
            return None
        said = self._plugins.call(
            "message_received", agent=agent, envelope=envelope, message=message
        )
        if said is None or (isinstance(said, Reply) and (said.transient or said.permanent)):
            return said
        log.error("hook=message_received returned %r, which refuses nothing; ignored", said)
        return None

    @staticmethod
    def _same_for_all(envelope: Envelope, reply: Reply, digest: bytes) -> Answer:
        return Answer(reply, (reply,) * len(envelope.recipients), 0, digest)

    def _put_together(self, envelope: Envelope, replies: Sequence[Reply], content: bytes) -> Reply:
        positive = [reply for reply in replies if reply.positive]
        transient = [reply for reply in replies if reply.transient]
        permanent = [reply for reply in replies if reply.permanent]
        if envelope.prdr and positive:
            # Each recipient's own reply stands; this one says that the message came over.
            return Reply(250, f"taken for {len(positive)} of {len(replies)} recipients", "2.0.0")
        if transient:
            return transient[0]
        if not positive:
            return permanent[0]
        if permanent:
            failed = {
                recipient: reply
                for recipient, reply in zip(envelope.recipients, replies, strict=True)
                if reply.permanent
            }
            return self._bouncer.bounce(envelope, failed, content) or positive[0]
        return positive[0]
