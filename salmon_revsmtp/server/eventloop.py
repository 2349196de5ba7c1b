"""The event loop of a process that runs foreign code: handlers, hooks, agent types."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from salmon_revsmtp.forks import ours_alone
from salmon_revsmtp.threads import LoopThreads

__all__ = ["Lag", "run"]

# Threads of the loop, in which names are looked up and agent types may do what blocks.  asyncio has
# six of them on two cores, which as many dead name servers would hold.
MOST_THREADS = 64

# Seconds between two looks at how late the loop is, and seconds of which the worst is kept.
LAG_EVERY = 0.5
LAG_KEPT = 15.0

Result = TypeVar("Result")


class Lag:
    """How late the running event loop does what is due: the time for which something has kept it
    from its work.  Counts from its making until :meth:`close`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # The worst of the last whole window, and of the one that has begun.
        self._before = self._worst = 0.0
        self._until = self._loop.time() + LAG_KEPT
        self._next()

    def _next(self) -> None:
        self._due = self._loop.time() + LAG_EVERY
        self._timer = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        self._worst = max(self._worst, now - self._due)
        if now >= self._until:
            self._before, self._worst, self._until = self._worst, 0.0, now + LAG_KEPT
        self._next()

    @property
    def seconds(self) -> float:
        """The worst of the last 15 to 30 seconds."""
        return max(self._before, self._worst)

    def close(self) -> None:
        self._timer.cancel()


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """As :func:`asyncio.run`; but its end waits for no thread, and a child that a handler forks
    keeps nothing open that the loop has.

    It is asyncio's own loop, whatever a boot module has set for others (``uvloop.install()``): of
    no other is it known what it has open, and a connection that a child keeps does not end.
    """
    if sys.version_info >= (3, 11):
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            return runner.run(_prepared(main))
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
    try:
        return asyncio.run(_prepared(main))
    finally:
        asyncio.set_event_loop_policy(before)


async def _prepared(main: Coroutine[Any, Any, Result]) -> Result:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(LoopThreads("eventloop", MOST_THREADS))
    with ours_alone(lambda: _descriptors(loop)):
        return await main


def _descriptors(loop: asyncio.AbstractEventLoop) -> set[int]:
    """Those of its connections, also where it does not read just now, of what listens, and of what
    wakes it."""
    inside: Any = loop
    found: set[int] = set()
    if (selector := getattr(inside, "_selector", None)) is not None:
        found.update(key.fd for key in list((selector.get_map() or {}).values()))
        if hasattr(selector, "fileno"):
            found.add(selector.fileno())
    if (waking := getattr(inside, "_csock", None)) is not None:
        found.add(waking.fileno())
    for transport in list(getattr(inside, "_transports", {}).values()):
        if (connection := transport.get_extra_info("socket")) is not None:
            found.add(connection.fileno())
    return found - {-1}
