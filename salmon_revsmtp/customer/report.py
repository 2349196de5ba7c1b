"""How a collection ends: one report with one outcome."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime

from salmon_revsmtp.foreign import printable
from salmon_revsmtp.net.outcome import Outcome

__all__ = ["Report", "counted", "iso"]


@dataclass
class Report:
    """What one collection did.

    ``messages``    messages accepted and safe; one that was redelivered is not counted again.
    ``recipients``  deliveries of them, one per recipient.
    ``bytes``       octets of those messages as they came.
    ``refused``     recipients that we answered with 4yz or 5yz.
    ``sessions``    connections on which the provider let us in.
    ``seconds``     how long it took.
    ``tls``         the TLS version of the last session, ``None`` without TLS.
    ``auth``        the SASL mechanism of the last session, ``None`` without.
    ``error``       a sentence for a person: what was being done, what came back, what to try.
    ``push``        since when a push session is open (ISO 8601); ``None``: there is none.
    ``answers``     what the server said to each request, for agent types that make several.
    """

    agent: str
    protocol: str
    outcome: Outcome = Outcome.FAILED
    messages: int = 0
    recipients: int = 0
    bytes: int = 0
    refused: int = 0
    sessions: int = 0
    seconds: float = 0.0
    tls: str | None = None
    auth: str | None = None
    error: str | None = None
    push: str | None = None
    answers: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """The report as JSON has it; the keys are stable, ``answers`` is there if there are any."""
        row = {**asdict(self), "outcome": self.outcome.value, "seconds": round(self.seconds, 3)}
        if not self.answers:
            del row["answers"]
        return row

    def summary(self) -> str:
        """The report as one line: ``isp: collected 3 messages ...``."""
        text = f"{self.agent}: {self.outcome}"
        if self.messages:
            text += f", {counted(self.messages, self.bytes)}"
            text += f" for {_number(self.recipients, 'recipient')}"
        if self.refused:
            text += f", {_number(self.refused, 'recipient')} refused"
        if self.sessions:
            how = " ".join(word for word in (self.tls, self.auth) if word) or "in the clear"
            text += f" ({_number(self.sessions, 'session')}, {how}, {self.seconds:.1f} s)"
        if self.push is not None:
            text += f"; a push session is open since {self.push}"
        details = [*self.answers, *([self.error] if self.error else [])]
        return "\n  ".join(printable(" ".join(one.split("\n"))) for one in (text, *details))


def iso(seconds: float) -> str:
    """A time since the epoch, in the local zone, as ISO 8601 has it."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def counted(messages: int, octets: int) -> str:
    """``3 messages, 21,503 bytes``."""
    return f"{_number(messages, 'message')}, {octets:,} bytes"


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
