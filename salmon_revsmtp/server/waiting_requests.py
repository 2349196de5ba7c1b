"""What ``undelivered`` and ``unsent`` ask of the running server, by its control socket, or of their
own process where none runs: handlers run in one process at a time, and so does the relay.

    {"do": "undelivered folder"}
        {"folder": "/srv/mail/run/undeliverable"}       null if the queue is in no folder
    {"do": "undelivered retry", "keys": ["1795498202.M1P2Q3.home"], "to": "b@example.org"}
    {"do": "unsent retry", "keys": [...]}
        {"busy": true}                                  every few seconds, while one takes its time
        {"key": "...", "done": false, "remark": "refused with 550 ..."}

Each ends with ``{"end": true}``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from salmon_revsmtp.server.control import MOST_KEYS, Answers

if TYPE_CHECKING:
    from salmon_revsmtp.server.collector import Collector

__all__ = ["WaitingRequests"]

# Seconds after which who asked is told that it goes on: it waits for 10.
SIGN_OF_LIFE = 2.0

Row = dict[str, Any]


class WaitingRequests:
    """Answers requests about mail that waits for a person."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._kinds: Mapping[str, Callable[[Row], AsyncIterator[Row]]] = {
            "undelivered folder": self._folder,
            "undelivered retry": self._retry,
            "unsent retry": self._send,
        }

    def knows(self, request: Row) -> bool:
        """Whether this is for us."""
        return str(request.get("do")) in self._kinds

    async def answer(self, request: Row) -> Answers:
        """The answers to a request.  Raises :class:`OSError`."""
        async for answer in self._kinds[str(request["do"])](request):
            yield answer
        yield {"end": True}

    async def _folder(self, request: Row) -> AsyncIterator[Row]:
        folder = await asyncio.to_thread(lambda: self._collector.retry.folder)
        yield {"folder": None if folder is None else str(folder)}

    async def _retry(self, request: Row) -> AsyncIterator[Row]:
        retried = self._collector.retry.retry(_keys(request), request.get("to"))
        async for row in _one_by_one(asdict(one) for one in retried):
            yield row

    async def _send(self, request: Row) -> AsyncIterator[Row]:
        sent = self._collector.outbox.send_now(_keys(request))
        rows = ({"key": key, "done": done, "remark": remark} for key, done, remark in sent)
        async for row in _one_by_one(rows):
            yield row


def _keys(request: Row) -> Sequence[str]:
    keys = list(dict.fromkeys(map(str, request["keys"])))
    if len(keys) > MOST_KEYS:
        raise ValueError(f"{len(keys)} keys, {MOST_KEYS} are taken")
    return keys


async def _one_by_one(rows: Iterator[Row]) -> AsyncIterator[Row]:
    """Rows that take their time, each made in a thread."""
    while True:
        making = asyncio.ensure_future(asyncio.to_thread(next, rows, None))
        while not (await asyncio.wait({making}, timeout=SIGN_OF_LIFE))[0]:
            yield {"busy": True}
        row = making.result()
        if row is None:
            return
        yield row
