"""What ``undelivered`` and ``unsent`` ask of the running server, by its control socket, or of their
own process where none runs: handlers run in one process at a time, and so does the relay.

    {"do": "undelivered folder"}
        {"folder": "/srv/mail/run/undeliverable"}       null if the queue is in no folder
    {"do": "undelivered list", "after": null, "limit": 50}      or unsent
        {"message": {...}}                              as `undelivered --json`
    {"do": "undelivered show", "key": "...", "whole": false}    or unsent: the header, or all of it
        {"message": {...}}
        {"octets": "..."}                               in base64
    {"do": "undelivered drop", "keys": [...]}           or unsent
        {"key": "...", "done": true, "remark": ""}
    {"do": "undelivered retry", "keys": ["1795498202.M1P2Q3.home"], "to": "b@example.org"}
    {"do": "unsent retry", "keys": [...]}
        {"busy": true}                                  every few seconds, while one takes its time
        {"key": "...", "done": false, "remark": "refused with 550 ..."}

Each ends with ``{"end": true}``.  A key that there is not: ``{"error": "...", "unknown": true}``.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from salmon_revsmtp.delivery.outbox import UNSENT
from salmon_revsmtp.delivery.trace import header_end
from salmon_revsmtp.delivery.waiting import WaitingMail
from salmon_revsmtp.server.control import MOST_KEYS, Answers
from salmon_revsmtp.server.waiting_rows import after, dropped, waiting_row

if TYPE_CHECKING:
    from salmon_revsmtp.server.collector import Collector

__all__ = ["WaitingRequests", "patiently"]

# Seconds after which who asked is told that it goes on: it waits for 10.
SIGN_OF_LIFE = 2.0

# Messages that one answer lists at most.
MOST_ROWS = 1000
# Octets in an answer, before base64.
PIECE = 48 * 1024

Row = dict[str, Any]
END: Row = {"end": True}
Result = TypeVar("Result")


class WaitingRequests:
    """Answers requests about mail that waits for a person."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._kinds: dict[str, Callable[[Row], AsyncIterator[Row]]] = {
            "undelivered folder": self._folder,
            "undelivered retry": self._retry,
            "unsent retry": self._send,
        }
        for what in ("undelivered", "unsent"):
            self._kinds[f"{what} list"] = partial(self._list, what)
            self._kinds[f"{what} show"] = partial(self._show, what)
            self._kinds[f"{what} drop"] = partial(self._drop, what)

    def knows(self, request: Row) -> bool:
        """Whether this is for us."""
        return str(request.get("do")) in self._kinds

    async def answer(self, request: Row) -> Answers:
        """The answers to a request.  Raises :class:`OSError`."""
        async for answer in self._kinds[str(request["do"])](request):
            yield answer
        yield END

    async def _folder(self, request: Row) -> AsyncIterator[Row]:
        folder = await asyncio.to_thread(lambda: self._collector.retry.folder)
        yield {"folder": None if folder is None else str(folder)}

    # -- look, and delete -----------------------------------------------------------------------

    def _waiting(self, what: str) -> WaitingMail | None:
        if what == "unsent":
            return WaitingMail(self._collector.project / UNSENT, shared=False)
        folder = self._collector.retry.folder
        return None if folder is None else WaitingMail(folder)

    def _reasons(self, what: str) -> Mapping[str, str]:
        return self._collector.outbox.reasons() if what == "unsent" else {}

    async def _list(self, what: str, request: Row) -> AsyncIterator[Row]:
        limit = min(int(request.get("limit", 50)), MOST_ROWS)
        try:
            rows = await asyncio.to_thread(self._rows, what, request.get("after"), limit)
        except LookupError:
            yield _unknown(what, request.get("after"))
            return
        for row in rows:
            yield {"message": row}

    def _rows(self, what: str, key: str | None, limit: int) -> list[Row]:
        waiting, reasons = self._waiting(what), self._reasons(what)
        if waiting is None:
            return []
        found = (waiting.find(one) for one in after(waiting, key)[:limit])
        return [waiting_row(one, reasons.get(one.key, one.reason)) for one in found if one]

    async def _show(self, what: str, request: Row) -> AsyncIterator[Row]:
        key = str(request["key"])
        found = await asyncio.to_thread(self._found, what, key)
        if found is None:
            yield _unknown(what, key)
            return
        row, octets = found
        yield {"message": row}
        if not request.get("whole"):
            octets = octets[: header_end(octets)]
        for start in range(0, len(octets), PIECE):
            yield {"octets": base64.b64encode(octets[start : start + PIECE]).decode("ascii")}

    def _found(self, what: str, key: str) -> tuple[Row, bytes] | None:
        waiting = self._waiting(what)
        if waiting is None:
            return None
        message, stored = waiting.find(key), waiting.read(key)
        if message is None or stored is None:
            return None
        _, _, octets = waiting.unpack(key, stored)
        return waiting_row(message, self._reasons(what).get(key, message.reason)), octets

    async def _drop(self, what: str, request: Row) -> AsyncIterator[Row]:
        waiting = await asyncio.to_thread(self._waiting, what)
        for key in _keys(request):
            if waiting is None:
                yield {"key": key, "done": False, "remark": "it is not there"}
            else:
                yield await asyncio.to_thread(dropped, waiting, key)

    # -- try again ------------------------------------------------------------------------------

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


def _unknown(what: str, key: object) -> Row:
    return {"error": f"no message is {what} with the key {key}", "unknown": True}


async def patiently(work: Awaitable[Result]) -> AsyncIterator[Result | None]:
    """What comes of something that takes its time, and every few seconds before that ``None``."""
    making = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({making}, timeout=SIGN_OF_LIFE))[0]:
            yield None
        yield making.result()
    finally:
        making.cancel()


async def _one_by_one(rows: Iterator[Row]) -> AsyncIterator[Row]:
    """Rows that take their time, each made in a thread."""
    while True:
        row: Row | None = None
        async for row in patiently(asyncio.to_thread(next, rows, END)):
            if row is None:
                yield {"busy": True}
        if row is END or row is None:
            return
        yield row
