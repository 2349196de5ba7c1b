"""What happens, as browsers hear it at once: server-sent events, and the last lines of the log.

``/events`` is a stream of events, each a JSON object with a ``kind``:

``{"kind": "agent", "agent": "isp", "state": "collecting", "doing": "..."}``
    an agent has begun (``collecting``), has a push session (``push``) or has ended (``idle``, with
    its ``outcome``).
``{"kind": "delivery", "agent": "isp", "messages": 3, "bytes": 4711}``
    what an agent has brought since the last event.
``{"kind": "held", "account": "acme", "sessions": 1, "messages": 2}``
    mail was held for an account, has expired or was handed over (so many messages since the last
    event), or a session of its has begun or ended.
``{"kind": "log", "lines": [{"time": 1795498202.5, "level": "info", "text": "..."}]}``
    new lines of the log; of many the last.
``{"kind": "trouble", "troubles": 2}``
    so many things need a person now, where there were others before.

Nothing is done for this while no browser listens.  While one does, the server is asked twice a
second what goes on, so that a thousand messages cost what one costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from salmon_revsmtp import hookimpl

if TYPE_CHECKING:
    from salmon_revsmtp import Reply, Server

__all__ = ["Hub", "Line", "Lines"]

# Lines of the log that are kept, and characters of one: 4 MB at most, as a rule 0.2.
MOST_LINES = 1000
LONGEST_LINE = 4000

# Seconds between two looks at what goes on; and the part of a thread's time that they take at most,
# where there are so many agents that a look takes long.
EVERY = 0.5
SHARE = 40
# Seconds between two looks at what needs a person.
TROUBLES_EVERY = 15.0
# Seconds after which something is sent in any case: who has gone is noticed by that.
ALIVE = 15.0
# Events that wait for a browser; one that reads more slowly misses some.
MOST_WAITING = 200
# Lines in one event.
MOST_AT_ONCE = 20
# Ended collections whose outcome is looked up at a time.
MOST_OUTCOMES = 20
# Browsers that listen at a time.
MOST_STREAMS = 100

log = logging.getLogger(__name__)

Event = dict[str, Any]


class Line(NamedTuple):
    """A line of the log.  ``number``: it is the how manieth; ``time`` in seconds since the epoch;
    ``level``: ``debug``, ``info``, ``warning`` or ``error``."""

    number: int
    time: float
    level: str
    text: str

    def event(self) -> Event:
        return {"time": self.time, "level": self.level, "text": self.text}


class Lines(logging.Handler):
    """Keeps the last lines that are logged.  They hold no secret, as none of the log does; what no
    one can see in them is "?"."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[Line] = deque(maxlen=MOST_LINES)
        self._number = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                error = record.exc_info[1]
                text = f"{text}: {type(error).__name__}: {error}"
            if not text.isprintable():
                text = "".join(char if char.isprintable() else "?" for char in text)
            self._number += 1  # a handler is called by one thread at a time
            line = Line(self._number, record.created, _level(record.levelno), text[:LONGEST_LINE])
            self._lines.append(line)
        except Exception:
            self.handleError(record)

    @property
    def number(self) -> int:
        """How many there have been."""
        return self._number

    def since(self, number: int = 0) -> list[Line]:
        """Those that came after the one with this number, the oldest first."""
        with self.lock or contextlib.nullcontext():
            return [line for line in self._lines if line.number > number]


def _level(number: int) -> str:
    if number >= logging.ERROR:
        return "error"
    if number >= logging.WARNING:
        return "warning"
    return "info" if number >= logging.INFO else "debug"


class Hub:
    """Tells browsers what happens.  Its streams are on one event loop, which is not the server's.

    ``server``  is asked what goes on.
    ``lines``   has the log.
    """

    def __init__(self, server: Server, lines: Lines) -> None:
        self._server, self.lines = server, lines
        self._waiting: list[deque[bytes]] = []
        self._news = asyncio.Event()
        self._pulse: asyncio.Task[None] | None = None
        self._closed = False
        # By account, how many messages were handed over since the last look; of any thread.
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    # -- hooks ----------------------------------------------------------------------------------

    @hookimpl
    def message_held(self, account: str) -> None:
        self._note(account, 0)

    @hookimpl
    def message_expired(self, account: str) -> None:
        self._note(account, 0)

    @hookimpl
    def message_handed_over(self, account: str, reply: Reply) -> None:
        self._note(account, int(reply.positive))

    def _note(self, account: str, handed_over: int) -> None:
        if self._waiting:
            with self._lock:
                self._held[account] = self._held.get(account, 0) + handed_over

    # -- browsers -------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """As many browsers listen as may."""
        return len(self._waiting) >= MOST_STREAMS

    async def stream(self, alive: Callable[[], bool]) -> AsyncGenerator[bytes, None]:
        """The events from now on, until :meth:`close`, or until ``alive`` says no more."""
        waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._waiting.append(waiting)
        if self._pulse is None or self._pulse.done():
            self._pulse = asyncio.ensure_future(self._beat())
        try:
            yield b"retry: 3000\n: hello\n\n"
            while not self._closed and alive():
                news = self._news
                if not waiting:
                    with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                        await asyncio.wait_for(news.wait(), ALIVE)
                if not waiting:
                    yield b": alive\n\n"
                while waiting:
                    yield waiting.popleft()
        finally:
            self._waiting = [one for one in self._waiting if one is not waiting]

    def close(self) -> None:
        """End all streams.  On their event loop."""
        self._closed = True
        self._tell([])
        if self._pulse is not None:
            self._pulse.cancel()

    def _tell(self, events: list[Event]) -> None:
        sent = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
        for waiting in self._waiting:
            waiting.extend(sent)
        news, self._news = self._news, asyncio.Event()
        news.set()

    # -- looking --------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Look again and again, as long as anyone listens."""
        # Its threads keep no process, as those of asyncio would: a disk may answer no more.
        from starlette.concurrency import run_in_threadpool

        watch = _Watch(self._server, self.lines)
        blind = False  # one line tells of all that follow
        while self._waiting and not self._closed:
            began = time.monotonic()
            with self._lock:
                held, self._held = self._held, {}
            try:
                events = await run_in_threadpool(watch.look, held)
            except RuntimeError:  # the server stops, or is busy
                events = []
            except Exception:
                level, blind = logging.DEBUG if blind else logging.WARNING, True
                log.log(level, "console: looking what goes on", exc_info=True)
                events = []
            else:
                blind = False
            if events:
                self._tell(events)
            await asyncio.sleep(max(EVERY, SHARE * (time.monotonic() - began)))


class _Watch:
    """Sees what has changed since it looked last.  Blocks."""

    def __init__(self, server: Server, lines: Lines) -> None:
        self._server, self._lines = server, lines
        self._line = lines.number
        self._agents: dict[str, Any] | None = None
        self._accounts: dict[str, Any] = {}
        self._troubles: list[str] | None = None
        self._troubles_at = 0.0

    def look(self, held: dict[str, int]) -> list[Event]:
        """What has happened.  ``held``: what hooks said of accounts."""
        now = self._server.activity()
        events = [] if self._agents is None else list(self._of_agents(now["agents"]))
        if self._agents is not None:
            events += self._of_accounts(now["accounts"], held)
        self._agents, self._accounts = now["agents"], now["accounts"]
        events += self._of_troubles()
        if lines := self._lines.since(self._line)[-MOST_AT_ONCE:]:
            self._line = lines[-1].number
            events.append({"kind": "log", "lines": [line.event() for line in lines]})
        return events

    def _of_agents(self, now: dict[str, Any]) -> list[Event]:
        events, ended = [], []
        for name, one in now.items():
            before = (self._agents or {}).get(name)
            if before is None:
                continue
            if messages := one["messages"] - before["messages"]:
                octets = one["bytes"] - before["bytes"]
                events.append(
                    {"kind": "delivery", "agent": name, "messages": messages, "bytes": octets}
                )
            state = _state(one)
            if one["ended"] != before["ended"]:
                ended.append(name)
            if state != "idle" and (state != _state(before) or name in ended):
                doing = one.get("doing")
                events.append({"kind": "agent", "agent": name, "state": state, "doing": doing})
        for name in ended[:MOST_OUTCOMES]:
            last = self._server.history(name, 1)
            outcome = last[0]["outcome"] if last else None
            events.insert(0, {"kind": "agent", "agent": name, "state": "idle", "outcome": outcome})
        return events

    def _of_accounts(self, now: dict[str, Any], held: dict[str, int]) -> list[Event]:
        changed = set(held)
        changed.update(
            name
            for name in {*now, *self._accounts}
            if _sessions(now, name) != _sessions(self._accounts, name)
        )
        return [
            {
                "kind": "held",
                "account": name,
                "sessions": _sessions(now, name),
                "messages": held.get(name, 0),
            }
            for name in sorted(changed)
        ]

    def _of_troubles(self) -> list[Event]:
        if time.monotonic() < self._troubles_at:
            return []
        self._troubles_at = time.monotonic() + TROUBLES_EVERY
        before, self._troubles = self._troubles, [one.key for one in self._server.troubles()]
        if before is None or before == self._troubles:
            return []
        return [{"kind": "trouble", "troubles": len(self._troubles)}]


def _state(agent: dict[str, Any]) -> str:
    if agent["push"] is not None:
        return "push"
    return "collecting" if agent["running"] else "idle"


def _sessions(accounts: dict[str, Any], name: str) -> int:
    return int(accounts.get(name, {}).get("sessions", 0))
