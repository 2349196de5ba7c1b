"""The agents' locks: two processes never collect from one agent at once.

A lock lives as long as the work that it protects.  A collection may end while a handler that it
started still runs, because the provider was answered 451 in time or the line broke.  Another
process that collected then would get the message again, and would not find it in the journal.  So
each message that is under way has a share of the lock, and the last one unlocks it.  This process
may collect again meanwhile: a message that comes again here waits for its handler.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from salmon_revsmtp.files import exclusive_lock

__all__ = ["AgentLocks"]


class AgentLocks:
    """The locks that this process has, in a folder.  Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._lock = threading.Lock()
        self._held: dict[str, contextlib.ExitStack] = {}
        self._shares: Counter[str] = Counter()
        self._collecting: set[str] = set()

    @contextlib.contextmanager
    def collecting(self, agent: str) -> Iterator[bool]:
        """Hold the lock of an agent for a collection.  ``False``: another collection of it is
        running, or another process still handles what it brought."""
        if not self._begin(agent):
            yield False
            return
        try:
            yield True
        finally:
            with self._lock:
                self._collecting.discard(agent)
            self._give_back(agent)

    def _begin(self, agent: str) -> bool:
        with self._lock:
            if agent in self._collecting:
                return False
            if not self._shares[agent]:
                with contextlib.ExitStack() as stack:
                    path = self._folder / f"agent-{agent}.lock"
                    if not stack.enter_context(exclusive_lock(path)):
                        return False
                    self._held[agent] = stack.pop_all()
            self._shares[agent] += 1
            self._collecting.add(agent)
            return True

    def share(self, agent: str) -> Callable[[], None]:
        """Hold it until what this returns is called, once.  Only for what a collection that has it
        brings; otherwise there is nothing to hold."""
        with self._lock:
            if not self._shares[agent]:
                return _nothing
            self._shares[agent] += 1

        return functools.partial(self._give_back, agent)

    def _give_back(self, agent: str) -> None:
        with self._lock:
            self._shares[agent] -= 1
            if not self._shares[agent]:
                del self._shares[agent]
                self._held.pop(agent).close()


def _nothing() -> None:
    pass
