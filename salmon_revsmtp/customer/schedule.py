"""When agents run: arithmetic on times, without a clock, without I/O.

Times are seconds of any clock that only goes forward.  The caller asks :meth:`Schedule.due`, runs
what it says, and reports with :meth:`Schedule.finished` or :meth:`Schedule.defer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Schedule"]

# The first collections begin this soon after start.
FIRST = 1.0
# At least this long between two starts, so that many agents do not dial in the same second; less
# where there are so many agents that they could not keep their times.
SPREAD = 1.0
# After a failure: this, doubled at each further one, never more than the agent's own interval.
RETRY = 60.0
# After a push session has ended: at once, varied over this; after one that did not last: doubled at
# each further one, never more than the agent's own interval.
DIAL_AGAIN = 2.0
# A push session that lasts so long did.
LASTING = 60.0
# Such a wait is varied by a factor between these, so that agents that failed together do not come
# back together.
VARIED = (0.8, 1.2)
# An agent that is held back (by a plugin, or disabled) is looked at again after this.
LOOK_AGAIN = 60.0


@dataclass
class _Agent:
    every: float
    due: float
    started: float = 0.0
    running: bool = False
    failures: int = 0
    drops: int = 0


class Schedule:
    """The next run of each agent.

    ``every``   agent -> seconds between the starts of its runs.
    ``now``     the time of the start.
    ``jitter``  varies the wait after a failure, so that agents that failed together do not come
                back together.
    """

    def __init__(
        self, every: Mapping[str, float], now: float, jitter: Callable[[float], float]
    ) -> None:
        self._jitter = jitter
        shortest = min(every.values(), default=SPREAD)
        self._spread = min(SPREAD, shortest / (2 * max(1, len(every))))
        self._agents = {
            name: _Agent(seconds, now + min(FIRST + number * self._spread, seconds))
            for number, (name, seconds) in enumerate(every.items())
        }
        self._last_start = now - self._spread

    def due(self, now: float) -> str | None:
        """An agent that is to run now, which counts as running from here on; ``None`` if there is
        none, or it is too soon after the last."""
        if now < self._last_start + self._spread:
            return None
        waiting = [one for one in self._agents.items() if not one[1].running and one[1].due <= now]
        if not waiting:
            return None
        name, agent = min(waiting, key=lambda one: one[1].due)
        agent.running, agent.started = True, now
        self._last_start = now
        return name

    def next_time(self) -> float | None:
        """When :meth:`due` should be asked again; ``None`` while everything runs."""
        times = [agent.due for agent in self._agents.values() if not agent.running]
        return max(min(times), self._last_start + self._spread) if times else None

    def next_run(self, name: str) -> float | None:
        """When an agent runs next; ``None`` if it runs now, or only on demand."""
        agent = self._agents.get(name)
        return None if agent is None or agent.running else agent.due

    def finished(self, name: str, good: bool, now: float) -> None:
        """A run has ended.  However late it was, the next comes one interval after its start: what
        was missed is made up for once."""
        agent = self._agents[name]
        agent.running = False
        agent.failures = 0 if good else agent.failures + 1
        if good:
            agent.due = max(agent.started + agent.every, now + self._spread)
        else:
            wait = RETRY * 2.0 ** min(agent.failures - 1, 30)
            agent.due = now + min(self._jitter(min(wait, agent.every)), agent.every)

    def dropped(self, name: str, lasted: float, now: float) -> None:
        """A run has ended with its push session, which lasted so many seconds: the next comes at
        once, unless it does not help."""
        agent = self._agents[name]
        agent.running, agent.failures = False, 0
        agent.drops = 0 if lasted >= LASTING else agent.drops + 1
        wait = DIAL_AGAIN * 2.0 ** min(max(agent.drops - 1, 0), 30)
        agent.due = now + min(self._jitter(min(wait, agent.every)), agent.every)

    def defer(self, name: str, now: float) -> None:
        """An agent that was due did not run; it is looked at again soon."""
        agent = self._agents[name]
        agent.running = False
        agent.due = now + min(LOOK_AGAIN, agent.every)
