"""Start-up: what a person waits for before the command does anything."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks import peers
from benchmarks.processes import Failure
from benchmarks.project import agent, project
from benchmarks.table import Case, Section, Target

__all__ = ["sections", "targets"]

TITLE = "Start-up"
HELP, AGENTS = "salmon-revsmtp --help", "salmon-revsmtp agents"

# "Well under" half a second.
BOUND = 0.3


def sections(quick: bool) -> list[Section]:
    """The quickest of a few starts each: what else the machine does is not ours."""
    starts = 1 if quick else 5
    cases = [
        Case(HELP, lambda: _seconds(starts, peers.COMMAND, "--help")),
        Case(AGENTS, lambda: _seconds(starts, peers.COMMAND, "agents")),
        Case("salmon --help", lambda: _seconds(starts, peers.SALMON, "--help")),
        Case("python -c pass", lambda: _seconds(starts, sys.executable, "-c", "pass")),
    ]
    return [Section(TITLE, "s", cases, ours=HELP, limit="", higher=False)]


def targets() -> list[Target]:
    """What the issue asks for."""

    def median(name: str) -> Callable[[dict[str, Section]], float | None]:
        return lambda sections: sections[TITLE].median(name) if TITLE in sections else None

    return [
        Target(f"{name}, in seconds", median(name), lambda _: BOUND, at_least=False)
        for name in (HELP, AGENTS)
    ]


def _seconds(starts: int, *command: object) -> float:
    with project(*(agent(366, f"isp-{number}") for number in range(3))) as folder:
        return min(_once([str(one) for one in command], str(folder)) for _ in range(starts))


def _once(command: Sequence[str], folder: str) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)}: {done.stderr[-300:]}")
    return seconds
