"""A client of the receiver, without a connection between them."""

from __future__ import annotations

from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.receiver import Event, Receiver, Transaction
from salmon_revsmtp.smtp.replies import Reply, ReplyParser

OK = Reply(250, "delivered")


def only_example(mailbox: str) -> Reply | None:
    if mailbox.lower().endswith("@example.org") or mailbox.lower() == "postmaster":
        return None
    return Reply(550, "not one of our domains", "5.7.1")


class Client:
    """Speaks to a receiver and answers each transaction at once."""

    def __init__(self, limits: Limits | None = None, answer: Reply = OK) -> None:
        self.receiver = Receiver("mail.example.org", limits, only_example)
        self.answer = answer
        self.messages: list[Transaction] = []
        self.events: list[Event] = []
        self.heard = self.receiver.data_to_send()

    def say(self, data: bytes) -> str:
        """Send bytes; returns the codes that came back, "250 250 354"."""
        before = len(self.heard)
        events = self.receiver.receive_bytes(data)
        self.heard += self.receiver.data_to_send()
        while events:
            event = events.pop(0)
            self.events.append(event)
            if isinstance(event, Transaction):
                self.messages.append(event)
                each = [self.answer] * len(event.envelope.recipients)
                self.receiver.answer(event, self.answer, each)
                events += self.receiver.advance()
                self.heard += self.receiver.data_to_send()
        return codes(self.heard[before:])

    def begin(self, *recipients: str) -> None:
        assert self.say(b"EHLO provider.example.net\r\n") == "250"
        assert self.say(b"MAIL FROM:<a@example.com>\r\n") == "250"
        for recipient in recipients or ("b@example.org",):
            assert self.say(f"RCPT TO:<{recipient}>\r\n".encode()) == "250"


def replies(data: bytes) -> list[Reply]:
    parser = ReplyParser()
    parser.receive_bytes(data)
    found = []
    while reply := parser.next_reply():
        found.append(reply)
    assert parser.idle
    return found


def codes(data: bytes) -> str:
    return " ".join(str(reply.code) for reply in replies(data))


def transactions(events: list[Event]) -> list[Transaction]:
    """These events, which are all transactions."""
    found = [event for event in events if isinstance(event, Transaction)]
    assert found == events
    return found
