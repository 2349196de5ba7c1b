"""The check of one agent: ``check NAME``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from salmon_revsmtp.customer.agent import Agent, Check
from salmon_revsmtp.net.outcome import CollectionError, NotTrusted
from salmon_revsmtp.service.policy import Service

__all__ = ["Checked", "checked"]


@dataclass
class Checked:
    """What the check of one agent has found.  ``outcome``: how a collection would end now, as far
    as that is known to be badly."""

    agent: Agent
    result: Check
    outcome: str | None = None

    def row(self) -> dict[str, Any]:
        """As ``check NAME --json`` has it."""
        return {
            "agent": self.agent.name,
            "protocol": self.agent.protocol,
            "outcome": self.outcome,
            "error": self.result.problems[0] if self.outcome else None,
            **asdict(self.result),
        }


async def checked(agent: Agent, service: Service) -> Checked:
    """Try one agent for as long as it takes."""
    try:
        return Checked(agent, await agent.check(service))
    except CollectionError as error:
        result = Check(problems=[str(error)])
        if isinstance(error, NotTrusted):
            result.fingerprint = error.fingerprint
        return Checked(agent, result, error.outcome.value)
