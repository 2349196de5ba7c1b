"""How a collection ends: one report with one outcome.  Also the errors that end it early."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum

__all__ = ["CollectionError", "Deferred", "Failed", "Outcome", "Refused", "Report"]


class Outcome(str, Enum):
    """The one word for how a collection ended."""

    COLLECTED = "collected"  #: mail came, and the provider has no more
    NO_MAIL = "no-mail"  #: the provider has none (ODMR 453, ETRN 251)
    REQUESTED = "requested"  #: ETRN accepted: the provider will connect to us
    REFUSED = "refused"  #: the provider said no for good (5yz)
    DEFERRED = "deferred"  #: the provider said later (4yz)
    FAILED = "failed"  #: network, TLS or protocol; or what we refuse ourselves
    DISABLED = "disabled"  #: the agent is disabled
    BUSY = "busy"  #: a collection of this agent is running

    @property
    def good(self) -> bool:
        """Nothing for a person to do."""
        return self in (
            Outcome.COLLECTED,
            Outcome.NO_MAIL,
            Outcome.REQUESTED,
            Outcome.DISABLED,
        )

    def __str__(self) -> str:
        return self.value


@dataclass
class Report:
    """What one collection did.

    ``messages``    messages accepted and safe; a message that came again is not counted again.
    ``recipients``  deliveries of them, one per recipient.
    ``bytes``       octets of those messages as they came.
    ``refused``     recipients that we did not take (each a 4yz or 5yz answer of ours).
    ``sessions``    connections on which the provider let us in.
    ``seconds``     how long it took.
    ``tls``         the TLS version of the last session, ``None`` without TLS.
    ``auth``        the SASL mechanism of the last session, ``None`` without.
    ``error``       a sentence for a person: what was being done, what came back, what to try.
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
    answers: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """The report as JSON has it; the keys are stable, ``answers`` is there if there are any."""
        row = {**asdict(self), "outcome": self.outcome.value, "seconds": round(self.seconds, 3)}
        if not self.answers:
            del row["answers"]
        return row


class CollectionError(Exception):
    """A collection cannot go on.  The text is the report's ``error``; ``outcome`` its outcome."""

    outcome = Outcome.FAILED


class Refused(CollectionError):
    """The provider said no for good (5yz)."""

    outcome = Outcome.REFUSED


class Deferred(CollectionError):
    """The provider said later (4yz)."""

    outcome = Outcome.DEFERRED


class Failed(CollectionError):
    """The network, TLS or the protocol failed, or we refused to go on ourselves."""

    outcome = Outcome.FAILED
