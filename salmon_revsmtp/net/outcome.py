"""How asking a server ends: one word for it, and the errors that end it early."""

from __future__ import annotations

from enum import Enum

__all__ = ["CollectionError", "Deferred", "Failed", "NotTrusted", "Outcome", "Refused"]


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


class NotTrusted(Failed):
    """The server's certificate is not one that we trust.

    ``fingerprint``  that of the certificate that it has; ``None`` where that is not known.
    """

    def __init__(self, text: str, fingerprint: str | None = None) -> None:
        super().__init__(text)
        self.fingerprint = fingerprint
