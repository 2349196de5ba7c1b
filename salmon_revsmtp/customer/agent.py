"""What an agent type is: a settings model, and a coroutine that runs one collection.

A plugin author subclasses :class:`Agent`; the built-in types use nothing but what is here, in
``customer.settings``, and what the :class:`~salmon_revsmtp.Collection` that they are handed offers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from salmon_revsmtp.customer.settings import AgentSettings
from salmon_revsmtp.smtp.addresses import to_ascii

if TYPE_CHECKING:
    from salmon_revsmtp.customer.collection import Collection
    from salmon_revsmtp.net.outcome import Outcome
    from salmon_revsmtp.service.policy import Service

__all__ = ["Agent", "Check"]


@dataclass
class Check:
    """What ``salmon-revsmtp check`` found out, without asking for any mail.

    ``offers``    the server's EHLO keywords after logging in, with their parameters.
    ``problems``  sentences: what would fail, and the setting to change.
    ``fingerprint``  that of the server's certificate, as the key ``fingerprint`` has it; ``None``:
                  it has shown none.
    """

    tls: str | None = None
    auth: str | None = None
    offers: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    fingerprint: str | None = None


class Agent(ABC):
    """One configured collection.  Subclass it, and register the class with the hook
    ``register_agent_types``.

    ``protocol``  the word for it in the settings.
    ``Settings``  the model of its settings, an :class:`AgentSettings`.
    """

    protocol: ClassVar[str]
    Settings: ClassVar[type[AgentSettings]] = AgentSettings

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    def name(self) -> str:
        """Its name in the settings."""
        return str(self.settings.name)

    @property
    def title(self) -> str:
        """Its name as lists show it: ``isp``, or ``isp (Disabled)``."""
        return self.name if self.settings.enabled else f"{self.name} (Disabled)"

    @property
    def address(self) -> str:
        """Where it collects, ``server:port``; empty if the type has no such thing."""
        server, port = (getattr(self.settings, key, None) for key in ("server", "port"))
        if not server:
            return ""
        return f"[{server}]:{port}" if ":" in server else f"{server}:{port}"

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that it asks for, as IDNA A-labels: whose recipients are accepted when the
        service names no domains itself."""
        return tuple(to_ascii(domain) for domain in getattr(self.settings, "domains", ()))

    @property
    def senders(self) -> tuple[str, ...]:
        """The hosts that connect to us, when it has asked for its mail: the listening service keeps
        places for them."""
        return ()

    def problems(self, service: Service) -> list[str]:
        """What is wrong with these settings together with those of the service, a sentence each:
        ``key: what, and what to do``.  Asked before any connection is made."""
        return []

    @abstractmethod
    async def collect(self, collection: Collection) -> Outcome:
        """Run one collection; returns its outcome, or raises
        :class:`~salmon_revsmtp.CollectionError`.

        It may be cancelled at any time.  Any other exception is a bug and reported as failed.
        """

    async def check(self, service: Service) -> Check:
        """Try all that can be tried without collecting.  Raises
        :class:`~salmon_revsmtp.CollectionError` when it does not get that far."""
        return Check(problems=[f"the agent type {self.protocol!r} has no check"])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"
