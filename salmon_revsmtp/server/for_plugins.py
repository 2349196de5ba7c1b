"""What the server does for the plugins that have its :class:`~salmon_revsmtp.Server`, in threads of
their own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.plugins.facade import Trouble
from salmon_revsmtp.server.calls import Calls
from salmon_revsmtp.server.control import Answers
from salmon_revsmtp.server.health import Findings

__all__ = ["ForPlugins"]

# Troubles of plugins that are kept; one that reports more has a bug.
MOST_REPORTED = 100

Row = dict[str, Any]


class ForPlugins:
    """On the event loop that this is made on.

    ``look``      looks at what needs a person.
    ``answer``    answers a request of the control socket.
    ``activity``  says what goes on.
    ``outbox``    takes what is to be sent.
    ``register``  has a plugin's hooks called.
    """

    def __init__(
        self,
        *,
        look: Callable[[], Awaitable[Findings]],
        answer: Callable[[Row], Answers],
        activity: Callable[[], Row],
        outbox: Outbox,
        register: Callable[[object], object],
    ) -> None:
        self._look, self._answer, self._activity = look, answer, activity
        self._outbox, self._register = outbox, register
        self._calls = Calls()
        self._reported: dict[str, Trouble] = {}

    @property
    def reported(self) -> list[Trouble]:
        """The troubles that plugins have reported."""
        return list(self._reported.values())

    async def end(self) -> None:
        """Do nothing more for anyone."""
        await self._calls.end()

    def look(self) -> tuple[Sequence[Row], Sequence[Trouble]]:
        async def found() -> Findings:
            return await self._look()

        return self._calls.result(found())

    def send(self, to: str, message: bytes) -> None:
        self._outbox.put(to, message)
        self._outbox.send_soon()

    def ask(self, request: Row) -> Iterator[Row]:
        return self._calls.answers(self._answer(request))

    def activity(self) -> Row:
        async def now() -> Row:
            return self._activity()

        return self._calls.result(now())

    def answers(self, seconds: float) -> bool:
        try:
            self._calls.result(asyncio.sleep(0), seconds)
        except RuntimeError:
            return False
        return True

    def register(self, plugin: object) -> None:
        self._register(plugin)

    def report(self, trouble: Trouble) -> None:
        if trouble.key not in self._reported and len(self._reported) >= MOST_REPORTED:
            raise ValueError(f"{MOST_REPORTED} troubles are reported already")
        self._reported[trouble.key] = trouble

    def over(self, key: str) -> None:
        self._reported.pop(key, None)
