"""Who fails: one line in the log when an agent begins to, and one when it recovers, not one a try.

It does not matter how an agent ran: on schedule, because someone asked the server, or in a process
of its own while no server runs.  The journal, which all of them write, knows who has been failing
already; while it cannot be written, each process remembers by itself.
"""

from __future__ import annotations

import logging
import time

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.journal.collections import AgentState
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.safelog import log_safely

__all__ = ["Failing"]

log = logging.getLogger(__name__)


class Failing:
    """The agents of a process that fail, and since when."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._unrecorded: set[str] = set()

    @property
    def since(self) -> dict[str, float]:
        """Those that fail, and since when (seconds since the epoch)."""
        return dict(self._since)

    def recall(self, agent: str, since: float) -> None:
        """It was failing when the last process ended: its recovery is news."""
        self._since[agent] = since

    def note(self, report: Report, before: AgentState | None = None) -> None:
        """A collection has ended.  ``before`` is what the journal had of its agent until then;
        ``None`` if that is not written in the journal."""
        if report.outcome in (Outcome.BUSY, Outcome.DISABLED):
            return
        agent, since = report.agent, self._since.get(report.agent)
        if before is None:
            self._unrecorded.add(agent)
        elif agent not in self._unrecorded or before.failing_since is not None:
            since = before.failing_since  # another process may have seen more
            self._unrecorded.discard(agent)
        if report.outcome.good:
            if since is None:
                self._since.pop(agent, None)  # the process that saw it recover has said so
            else:
                self._since[agent] = since
            self.recovered(agent)
            return
        self._since[agent] = time.time() if since is None else since
        if since is None:
            reason = f"{report.outcome}: {report.error}"
            log_safely(log, logging.WARNING, "agent=%s fails: %s", agent, reason)

    def recovered(self, agent: str) -> None:
        """It does not fail any more, also if its collection goes on."""
        self._unrecorded.discard(agent)
        since = self._since.pop(agent, None)
        if since is not None:
            minutes = (time.time() - since) / 60
            log.warning("agent=%s recovered after %.0f minutes", agent, minutes)
