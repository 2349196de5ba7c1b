"""Which handlers may run at the same time, where a service has several delivery threads.

As many as the service has threads; but one at a time in the whole process while Salmon cannot have
more: with ``Router.RELOAD`` every delivery imports the handlers again, and another thread finds no
routes meanwhile; and ``MemoryStorage`` is not thread safe, which matters where a handler keeps a
state.  Both may change while the process runs, so they are looked at for each message.

Salmon itself runs only those handlers beside others that are marked ``@nolocking``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from salmon.routing import MemoryStorage, Router, salmon_setting

from salmon_revsmtp.safelog import log_safely

__all__ = ["Turns"]

log = logging.getLogger(__name__)


class Turns:
    """Lets handlers run, side by side or one after another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._alone = False  # the one that runs
        self._said: str | None = None

    def within(self, group: AbstractContextManager[object]) -> AbstractContextManager[object]:
        """A turn for one delivery, to be had from any thread; ``group`` bounds how many those of
        one kind have at a time."""
        return _Turn(self, group)

    def say(self, threads: int) -> None:
        """Log what keeps ``threads`` from being of use, if anything does."""
        handlers = list(_handlers())
        if (reason := why_alone()) is not None:
            self._say(reason)
        elif handlers and not any(salmon_setting(one, "nolocking") for one in handlers):
            log.warning(
                "delivery_threads=%d: Salmon runs only handlers at the same time that are marked "
                "@nolocking, and none is",
                threads,
            )

    def begin(self) -> None:
        """Wait for a turn."""
        with self._changed:
            while self._alone or ((reason := why_alone()) is not None and self._running):
                self._changed.wait()
            self._alone = reason is not None
            self._running += 1
        self._say(reason)

    def end(self) -> None:
        """The turn is over."""
        with self._changed:
            self._running -= 1
            self._alone = False
            self._changed.notify_all()

    def _say(self, reason: str | None) -> None:
        """Once, until it changes."""
        if reason != self._said:
            self._said = reason
            if reason is not None:
                text = "delivery_threads: handlers run one at a time, because %s"
                log_safely(log, logging.WARNING, text, reason)
            else:
                log.info("delivery_threads: handlers run at the same time again")


class _Turn:
    """For ``with``, in several threads at once."""

    def __init__(self, turns: Turns, group: AbstractContextManager[object]) -> None:
        self._turns, self._group = turns, group

    def __enter__(self) -> None:
        self._group.__enter__()
        try:
            self._turns.begin()
        except BaseException:
            self._group.__exit__(None, None, None)
            raise

    def __exit__(self, *raised: Any) -> None:
        self._turns.end()
        self._group.__exit__(None, None, None)


def why_alone() -> str | None:
    """Why no two handlers may run at the same time now; ``None``: they may."""
    if Router.RELOAD:
        return (
            "Router.RELOAD is on, and another thread would find no routes while the handlers are "
            "imported again; set Router.RELOAD = False in the boot module"
        )
    if type(Router.STATE_STORE) is MemoryStorage:
        stateful = next((one for one in _handlers() if not salmon_setting(one, "stateless")), None)
        if stateful is not None:
            return (
                f"{stateful.__module__}.{stateful.__name__} keeps a state, and Router.STATE_STORE "
                "is Salmon's MemoryStorage, which is not thread safe; set another one in the boot "
                "module, or mark the handlers @stateless"
            )
    return None


def _handlers() -> Iterator[Callable[..., object]]:
    """All that are registered."""
    for _, functions in list(Router.REGISTERED.values()):
        yield from functions
