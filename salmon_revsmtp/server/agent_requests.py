"""What a plugin, or a command, asks the running server of its agents.

    {"do": "state"}
        {"next": {"isp": 1795498202.5}, "push": {}, "running": ["isp"]}
                                                        times in seconds since the epoch
    {"do": "agents"}
        {"agent": {...}}                                as `agents --json`
    {"do": "history", "agent": "isp", "outcome": "failed", "limit": 50}
        {"collection": {...}}                           as `history --json`; agent and outcome may
                                                        be null
    {"do": "enable", "agent": "isp"}                    or disable
    {"do": "check", "agent": "isp"}
        {"busy": true}                                  every few seconds
        {"check": {...}}                                as `check NAME --json`
    {"do": "settings", "agent": "isp"}
        {"settings": {...}}                             those in force, without secrets
    {"do": "dialogue", "agent": "isp"}
        {"line": "C: ATRN"}                             of its last collection
    {"do": "traffic", "agent": "isp", "seconds": 86400, "buckets": 96}
        {"start": 1795498202.5, "messages": 2, "bytes": 4711}

Each ends with ``{"end": true}``.  An agent that there is not: ``{"error": "...", "unknown":
true}``.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from salmon_revsmtp.customer.agent import Agent
from salmon_revsmtp.journal.collections import TRAFFIC_SPAN
from salmon_revsmtp.server.agent_check import checked
from salmon_revsmtp.server.agent_rows import Now, agent_rows, collection_row
from salmon_revsmtp.server.control import Answers
from salmon_revsmtp.server.overheard import Outline
from salmon_revsmtp.server.waiting_requests import patiently
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.settings import shown_settings

if TYPE_CHECKING:
    from salmon_revsmtp.server.collector import Collector

__all__ = ["AgentRequests"]

# What is answered at most: rows of a history, and parts of a time.
MOST_ROWS = 10_000
MOST_BUCKETS = 10_000

Row = dict[str, Any]


class AgentRequests:
    """Answers requests about agents.

    ``now``       what the server knows of them.
    ``outlines``  the dialogue of each one's last collection.
    ``changed``   is called when an agent was enabled or disabled.
    ``note``      has the traffic up to now written.
    """

    def __init__(
        self,
        collector: Collector,
        *,
        now: Callable[[], Now],
        outlines: Mapping[str, Outline],
        changed: Callable[[], Any],
        note: Callable[[], Any],
    ) -> None:
        self._collector = collector
        self._now, self._outlines = now, outlines
        self._changed, self._note = changed, note
        self._agents = {agent.name: agent for agent in collector.configuration.agents}
        self._kinds: Mapping[str, Callable[[Row], AsyncIterator[Row]]] = {
            "agents": self._list,
            "history": self._history,
            "enable": self._enable,
            "disable": self._enable,
            "check": self._check,
            "settings": self._settings,
            "dialogue": self._dialogue,
            "traffic": self._traffic,
        }

    def knows(self, request: Row) -> bool:
        """Whether this is for us."""
        return str(request.get("do")) in self._kinds

    async def answer(self, request: Row) -> Answers:
        """The answers to a request."""
        name = request.get("agent")
        if name is not None and name not in self._agents:
            yield {"error": f"no agent is named {name!r}", "unknown": True}
            return
        async for answer in self._kinds[str(request["do"])](request):
            yield answer
        yield {"end": True}

    def _named(self, request: Row) -> Agent:
        return self._agents[str(request["agent"])]

    async def _list(self, request: Row) -> AsyncIterator[Row]:
        journal, agents = self._collector.journal, list(self._agents.values())
        for row in await self._collector.recorded(agent_rows, agents, journal, self._now()):
            yield {"agent": row}

    async def _history(self, request: Row) -> AsyncIterator[Row]:
        limit = min(int(request.get("limit", 50)), MOST_ROWS)
        name, outcome = request.get("agent"), request.get("outcome")
        history = self._collector.journal.history
        for entry in await self._collector.recorded(history, name, limit, None, (), outcome):
            yield {"collection": collection_row(entry)}

    async def _enable(self, request: Row) -> AsyncIterator[Row]:
        name, enabled = self._named(request).name, request["do"] == "enable"
        if not await self._collector.recorded(self._collector.journal.set_enabled, name, enabled):
            yield {"error": f"that {name} is to be {request['do']}d could not be written"}
        await self._changed()

    async def _check(self, request: Row) -> AsyncIterator[Row]:
        agent = self._named(request)
        settings = self._collector.configuration.services[agent.settings.service]
        service = Service(agent.settings.service, settings)
        service.listens = bool(settings.listen)
        async for answer in patiently(checked(agent, service)):
            yield {"busy": True} if answer is None else {"check": answer.row()}

    async def _settings(self, request: Row) -> AsyncIterator[Row]:
        agent = self._named(request)
        enabled = await self._collector.enabled(agent)
        yield {"settings": {**shown_settings(agent.settings), "enabled": enabled}}

    async def _dialogue(self, request: Row) -> AsyncIterator[Row]:
        if (outline := self._outlines.get(self._named(request).name)) is not None:
            for line in outline.lines():
                yield {"line": line}

    async def _traffic(self, request: Row) -> AsyncIterator[Row]:
        seconds, buckets = float(request["seconds"]), int(request["buckets"])
        if not (0 < seconds < math.inf and 0 < buckets <= MOST_BUCKETS):
            raise ValueError(f"{buckets} parts of {seconds} seconds")
        await self._note()
        # It ends with the span that is under way, so that each span is in one bucket.
        end = (time.time() // TRAFFIC_SPAN + 1) * TRAFFIC_SPAN
        start, width = end - seconds, seconds / buckets
        traffic = self._collector.journal.traffic
        messages, octets = [0] * buckets, [0] * buckets
        found = await self._collector.recorded(traffic, request.get("agent"), start)
        for at, some, size in found:
            number = min(int((at - start) / width), buckets - 1)
            messages[number] += some
            octets[number] += size
        for number in range(buckets):
            at = start + number * width
            yield {"start": at, "messages": messages[number], "bytes": octets[number]}
