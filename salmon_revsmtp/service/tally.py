"""What a collection counts, live."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from salmon_revsmtp.delivery.dispatcher import PendingDelivery
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Tally"]

#: A message as the provider sees it: digest, reverse-path, recipients.
_Message = tuple[bytes, str, tuple[str, ...]]


@dataclass
class Tally:
    """Counts over all sessions of a collection, live."""

    messages: int = 0
    recipients: int = 0
    bytes: int = 0
    refused: int = 0
    #: How often each message (by its digest and envelope) was answered 250.
    accepted: Counter[_Message] = field(default_factory=Counter)
    #: The last 4yz that we gave for a recipient or a message.
    deferred: Reply | None = None

    def refuse(self, recipients: int, reply: Reply) -> None:
        """Recipients that were not taken, by their number."""
        self.refused += recipients
        if reply.transient:
            self.deferred = reply

    def add(self, delivery: PendingDelivery) -> bool:
        """A message that is settled.  Whether it was taken and brought the client forward: a repeat
        does so once, for the first 250 may not have arrived."""
        self.recipients += delivery.delivered
        if delivery.delivered:
            self.messages += 1
            self.bytes += len(delivery.data)
        for reply in delivery.replies:
            if not reply.positive:
                self.refuse(1, reply)
        assert delivery.reply is not None
        if delivery.reply.transient:  # whatever became of each, the client comes again
            self.deferred = delivery.reply
        if not delivery.reply.positive or delivery.key is None:
            return False
        seen = (delivery.key.digest, delivery.envelope.reverse_path, delivery.envelope.recipients)
        self.accepted[seen] += 1
        return self.accepted[seen] <= 2
