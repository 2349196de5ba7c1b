"""What a collection counts, live."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from salmon_revsmtp.delivery.dispatcher import Answer
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
    put_off: Reply | None = None

    def refuse(self, recipients: int, reply: Reply) -> None:
        """Recipients that were not taken, by their number."""
        self.refused += recipients
        if reply.transient:
            self.put_off = reply

    def add(self, answer: Answer, octets: int) -> None:
        """A message of so many octets, as it was answered."""
        self.recipients += answer.delivered
        if answer.delivered:
            self.messages += 1
            self.bytes += octets
        for reply in answer.each:
            if not reply.positive:
                self.refuse(1, reply)
        if answer.reply.transient:  # whatever became of each, the client comes again
            self.put_off = answer.reply
