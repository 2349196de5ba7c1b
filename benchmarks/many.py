"""Many at once: agents against as many providers, each with its own port of the loopback.

A thousand of each need some thousand descriptors: the limit is raised as far as it may be.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.crowd import open_files
from benchmarks.intake import BOUND
from benchmarks.processes import Child, Failure, module
from benchmarks.project import agent, project
from benchmarks.table import Case, Section

__all__ = ["per_agent", "sections"]

OCTETS = 4_000
AGENTS = (1, 10, 100, 1000)
QUICK = (1, 10)
# Messages that each provider has, by the number of agents.
MESSAGES = {1: 2000, 10: 200, 100: 20, 1000: 5}

# Seconds after its start in which an idle process has done all that it does at once.
SETTLED = 5.0


def sections(quick: bool) -> list[Section]:
    """Throughput, the slowest message, start, memory."""
    agents = QUICK if quick else AGENTS
    runs = {number: _Run(number, quick) for number in agents}

    def cases(figure: str) -> list[Case]:
        return [
            Case(_name(number), lambda run=run: run.figure(figure), run.missing)  # type: ignore[misc]
            for number, run in runs.items()
        ]

    return [
        Section("Many at once, messages per second of all", "messages/s", cases("rate")),
        Section("Many at once, the slowest message", "s", cases("slowest"), higher=False),
        Section("Many at once, the median message", "s", cases("median"), higher=False),
        Section("Many at once, start to first connection", "s", cases("first"), higher=False),
        Section("Many at once, start to last connection", "s", cases("last"), higher=False),
        Section("Many at once, peak memory of the process", "MiB", cases("peak"), higher=False),
        Section(
            "Memory of a process that waits for its next collections",
            "MiB",
            [
                Case(_name(number), lambda run=run: run.idle())  # type: ignore[misc]
                for number, run in runs.items()
            ],
            higher=False,
        ),
    ]


def per_agent(sections: dict[str, Section]) -> Section | None:
    """Memory of one idle agent more, in KiB."""
    title = "Memory of a process that waits for its next collections"
    found = sections.get(title)
    sizes = [(number, found.median(_name(number))) for number in AGENTS] if found else []
    known = [(number, size) for number, size in sizes if size is not None]
    if len(known) < 2:
        return None
    (few, small), (most, large) = known[0], known[-1]
    case = Case(f"from {few} to {most} agents", lambda: 0.0)
    case.figures = [(large - small) * 1024 / (most - few)]
    return Section("Memory per idle agent", "KiB", [case], higher=False)


def _name(number: int) -> str:
    return "1 agent" if number == 1 else f"{number:,} agents"


class _Run:
    """One collection of a number of agents gives all figures of a round."""

    def __init__(self, number: int, quick: bool) -> None:
        self.number = number
        self.messages = 5 if quick else MESSAGES[number]
        self._settled = 1.0 if quick else SETTLED
        self._figures: dict[str, float] = {}
        self.missing = _too_few_files(number)

    def figure(self, name: str) -> float:
        """Each figure is asked for once a round; one that is gone means another round."""
        if name not in self._figures:
            self._figures = self._collect()
        return self._figures.pop(name)

    def _collect(self) -> dict[str, float]:
        with _crowd(self.number, self.messages) as (folder, crowd):
            with peers.collect(folder, "--all") as customer:
                calls = crowd.says(BOUND)
                said = crowd.says(BOUND)
                reports = [customer.says(BOUND) for _ in range(self.number)]
                peak = customer.peak() / 2**20
            if any(report["messages"] != self.messages for report in reports):
                raise Failure(f"not every agent has its {self.messages} messages")
            return {
                "rate": said["messages"] / said["seconds"],
                "slowest": said["slowest"],
                "median": said["median"],
                "first": calls["first_call"] - customer.started,
                "last": calls["last_call"] - customer.started,
                "peak": peak,
            }

    def idle(self) -> float:
        """Resident memory, in MiB, of ``salmon-revsmtp run`` whose agents are on demand."""
        with (
            project(*_agents([1] * self.number, every=None)) as folder,
            Child([str(peers.COMMAND), "--chdir", str(folder), "run"]) as server,
        ):
            time.sleep(self._settled)
            return server.resident() / 2**20


@contextmanager
def _crowd(number: int, messages: int) -> Iterator[tuple[Path, Child]]:
    with ExitStack() as stack:
        crowd = stack.enter_context(module("crowd", number, number, messages, OCTETS))
        ports = crowd.says(60)["ports"]
        yield stack.enter_context(project(*_agents(ports))), crowd


def _agents(ports: list[int], **keys: Any) -> list[dict[str, Any]]:
    return [agent(port, f"isp-{number}", **keys) for number, port in enumerate(ports)]


def _too_few_files(number: int) -> str | None:
    open_files()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * number + 100
    return None if soft >= needed else f"needs {needed} open files, and may have {soft}"
