"""How a thread asks the event loop of the server, and waits for the answer."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from salmon_revsmtp.server.control import Answers

__all__ = ["PATIENCE", "Calls"]

# Seconds that a thread waits for an answer.  What takes longer says every few seconds that it goes
# on.
PATIENCE = 60.0

STOPPED = "the server has stopped"

Result = TypeVar("Result")


class Calls:
    """Calls from threads to the event loop that this was made on.  Each raises
    :class:`RuntimeError` when the server has stopped, or does not answer in time, and whatever the
    work raises."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended = False

    def result(self, work: Coroutine[Any, Any, Result], patience: float = PATIENCE) -> Result:
        """What comes of this, in so many seconds."""
        tracked = self._tracked(work)
        try:
            asked = asyncio.run_coroutine_threadsafe(tracked, self._loop)
        except RuntimeError:  # the loop is closed
            tracked.close()
            work.close()
            raise RuntimeError(STOPPED) from None
        try:
            return asked.result(patience)
        except concurrent.futures.CancelledError:
            raise RuntimeError(STOPPED) from None
        except concurrent.futures.TimeoutError:
            if asked.done():  # of the work itself
                raise
            asked.cancel()  # no one waits for it without end
            raise RuntimeError(f"no answer in {patience:g} seconds") from None

    def answers(self, made: Answers) -> Iterator[dict[str, Any]]:
        """These answers, each when it is there.  Who wants no more of them closes this."""
        try:
            while True:
                answer = self.result(_next(made))
                if answer is None:
                    return
                yield answer
        finally:
            if not self._ended:
                self.result(_close(made))

    async def end(self) -> None:
        """Answer no more."""
        self._ended = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _tracked(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._ended:
            work.close()
            raise asyncio.CancelledError
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await work


async def _next(made: Answers) -> dict[str, Any] | None:
    return await anext(made, None)


async def _close(made: Answers) -> None:
    await made.aclose()
