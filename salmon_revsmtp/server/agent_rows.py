"""Agents as ``agents --json`` and ``history --json`` have them, and a plugin of the server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from salmon_revsmtp.customer.report import iso

if TYPE_CHECKING:
    from salmon_revsmtp.customer.agent import Agent
    from salmon_revsmtp.journal.collections import AgentState, Entry, Journal

__all__ = ["Now", "agent_rows", "collection_row"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Now:
    """What only the running server knows of its agents.  Times in seconds since the epoch.

    ``next``     when each runs next.
    ``push``     since when those have a push session that have one.
    ``running``  those that collect, or have a push session.
    """

    next: Mapping[str, float] = field(default_factory=dict)
    push: Mapping[str, float] = field(default_factory=dict)
    running: tuple[str, ...] = ()

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Now:
        """As the control socket answers it; a server of before may say less."""
        return cls(
            dict(answer.get("next", {})),
            dict(answer.get("push", {})),
            tuple(answer.get("running", ())),
        )


def agent_rows(agents: Iterable[Agent], journal: Journal, now: Now) -> list[Row]:
    """A row for each agent, in their order.  Reads the journal."""
    chosen = list(agents)
    kept = journal.latest(agent.name for agent in chosen)
    return [_agent_row(agent, *kept[agent.name], now) for agent in chosen]


def _agent_row(agent: Agent, state: AgentState, last: Entry | None, now: Now) -> Row:
    name = agent.name
    enabled = agent.settings.enabled if state.enabled is None else state.enabled
    return {
        "agent": name,
        "title": name if enabled else f"{name} (Disabled)",
        "protocol": agent.protocol,
        "enabled": enabled,
        "server": getattr(agent.settings, "server", None),
        "port": getattr(agent.settings, "port", None),
        "every": agent.settings.every,
        "outcome": last.outcome if last else None,
        "ended": iso(last.ended) if last else None,
        "next": iso(now.next[name]) if enabled and name in now.next else None,
        "push": iso(now.push[name]) if name in now.push else None,
        "running": name in now.running,
    }


def collection_row(entry: Entry) -> Row:
    """A collection that has ended."""
    return {
        **asdict(entry),
        "started": iso(entry.started),
        "ended": iso(entry.ended),
        "seconds": round(entry.ended - entry.started, 3),
    }
