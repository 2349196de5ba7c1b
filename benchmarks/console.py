"""The console: what it costs a server that ten browsers look at it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.intake import BOUND, Load, fed
from benchmarks.processes import Child, Failure, module
from benchmarks.project import agent, project
from benchmarks.table import Case, Section, Target
from salmon_revsmtp.console import PACKAGES
from salmon_revsmtp.console.links import FILE
from salmon_revsmtp.server.control import SOCKET, running

__all__ = ["sections", "targets"]

OCTETS, MESSAGES, QUICK = 4_000, 20_000, 200
BROWSERS = 10
# A loopback address with a port of the system's choice.
CONSOLE = {"console": {"listen": "127.0.0.1:0"}}

RATE = "Mail, 4 KB, with a console"
WORK = "Processor time of the server for a message"
START = "Start of a server, until it answers"
MEMORY = "Memory of a server that has taken mail"
WITHOUT, IDLE = "without a console", "with one that no browser looks at"
WITH = f"with {BROWSERS} browsers"

# Seconds to wait for a server, and for its console.
PATIENCE = 30.0


def sections(quick: bool) -> list[Section]:
    """Throughput, start, memory."""
    messages = QUICK if quick else MESSAGES
    lacks = _lacks()
    runs = {
        WITHOUT: _Run(messages, False, 0),
        IDLE: _Run(messages, True, 0),
        WITH: _Run(messages, True, BROWSERS),
    }

    def cases(figure: str) -> list[Case]:
        return [
            Case(name, lambda run=run: run.figure(figure), lacks if run.console else None)  # type: ignore[misc]
            for name, run in runs.items()
        ]

    return [
        Section(RATE, "messages/s", cases("rate"), ours=WITH),
        Section(WORK, "µs", cases("work"), higher=False),
        Section(START, "s", cases("start"), higher=False),
        Section(MEMORY, "MiB", cases("memory"), higher=False),
    ]


def targets() -> list[Target]:
    """What it may cost."""

    def of(title: str, name: str, by: dict[str, Section]) -> float | None:
        return by[title].median(name) if title in by else None

    def share(by: dict[str, Section]) -> float | None:
        ours, bare = of(RATE, WITH, by), of(RATE, WITHOUT, by)
        return ours / bare if ours and bare else None

    def more(title: str, by: dict[str, Section]) -> float | None:
        ours, bare = of(title, WITH, by), of(title, WITHOUT, by)
        return None if ours is None or bare is None else ours - bare

    return [
        Target(f"messages/s with {BROWSERS} browsers, of those without", share, lambda _: 0.95),
        Target(
            "s of start more with a console",
            lambda by: more(START, by),
            lambda _: 0.2,
            at_least=False,
        ),
        Target(
            f"MiB more with a console and {BROWSERS} browsers",
            lambda by: more(MEMORY, by),
            lambda _: 25.0,
            at_least=False,
        ),
    ]


class _Run:
    """One server gives all figures of a round."""

    def __init__(self, messages: int, console: bool, browsers: int) -> None:
        self.console = console
        self._messages, self._browsers = messages, browsers
        self._figures: dict[str, float] = {}

    def figure(self, name: str) -> float:
        """Each figure is asked for once a round; one that is gone means another round."""
        if name not in self._figures:
            self._figures = self._measure()
        return self._figures.pop(name)

    def _measure(self) -> dict[str, float]:
        settings: dict[str, Any] = CONSOLE if self.console else {}
        load = Load(self._messages, OCTETS)
        with (
            fed(load) as (port, provider),
            project(agent(port, every=None), settings=settings) as folder,
            _server(folder) as (server, start),
            contextlib.ExitStack() as stack,
        ):
            if self.console:
                _until(lambda: (folder / FILE).exists(), "its console does not listen")
            browsers = None
            if self._browsers:
                browsers = stack.enter_context(module("browsing", folder, self._browsers))
                browsers.says(PATIENCE)
            before = _processor(server)
            with peers.collect(folder) as customer:
                said = provider.says(BOUND)
                if customer.says(BOUND)["messages"] != self._messages:
                    raise Failure("not all of it has come")
            work = _processor(server) - before
            if browsers is not None:
                _until(lambda: _seen(browsers)["events"], "no browser has heard anything")
            return {
                "rate": said["messages"] / said["seconds"],
                "work": 1e6 * work / self._messages,
                "start": start,
                "memory": server.resident() / 2**20,
            }


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[tuple[Child, float]]:
    """A server, and the seconds that it took to answer."""
    began = time.perf_counter()
    with Child([str(peers.COMMAND), "--chdir", str(folder), "run"]) as server:
        _until(lambda: running(folder / SOCKET), "it does not answer")
        yield server, time.perf_counter() - began


def _processor(server: Child) -> float:
    """Seconds that it has had a processor (Linux)."""
    words = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _seen(browsers: Child) -> dict[str, Any]:
    assert browsers.process.stdin is not None
    browsers.process.stdin.write(b"\n")
    browsers.process.stdin.flush()
    return browsers.says(PATIENCE)


def _lacks() -> str | None:
    if all(importlib.util.find_spec(name) for name in PACKAGES):
        return None
    return "needs pip install 'salmon-revsmtp[console]'"


def _until(what: Any, otherwise: str) -> None:
    give_up = time.monotonic() + PATIENCE
    while not what():
        if time.monotonic() > give_up:
            raise Failure(otherwise)
        time.sleep(0.005)
