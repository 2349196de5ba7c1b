"""Start-up: what a person waits for before the command does anything, and what it costs a boot
module to have us in it.

Bytecode is written and used, as in an installation, whatever the environment says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks import peers
from benchmarks.processes import Failure
from benchmarks.project import agent, project
from benchmarks.provider import times
from benchmarks.table import Case, Section, Target

__all__ = ["sections", "targets"]

TITLE = "Start-up"
HELP, AGENTS = "salmon-revsmtp --help", "salmon-revsmtp agents"
SALMON = "salmon --help"
# The boot modules of benchmarks.project; the second imports us and does no more.
BOOT, WITH_US, ATTACHED = "a boot module", "import salmon_revsmtp in it", "attach in it"

# "Well under" half a second.
BOUND = 0.3
# Times Salmon's own command, and seconds more than Salmon's own boot module.
TIMES = 1.5
MORE = 0.05


def sections(quick: bool) -> list[Section]:
    """The quickest of a few starts each: what else the machine does is not ours."""
    starts = 1 if quick else 5
    cases = [
        Case(HELP, lambda: _seconds(starts, peers.COMMAND, "--help")),
        Case(AGENTS, lambda: _seconds(starts, peers.COMMAND, "agents")),
        Case(SALMON, lambda: _seconds(starts, peers.SALMON, "--help")),
        Case(BOOT, lambda: _python(starts, "import config.lmtp")),
        Case(WITH_US, lambda: _python(starts, "import config.lmtp, salmon_revsmtp")),
        Case(ATTACHED, lambda: _python(starts, "import config.boot")),
        Case("python -c pass", lambda: _python(starts, "pass")),
    ]
    return [Section(TITLE, "s", cases, ours=HELP, limit="", higher=False)]


def targets() -> list[Target]:
    """What the issue asks for."""

    def median(name: str) -> Callable[[dict[str, Section]], float | None]:
        return lambda sections: sections[TITLE].median(name) if TITLE in sections else None

    def more(name: str) -> Callable[[dict[str, Section]], float | None]:
        def figure(sections: dict[str, Section]) -> float | None:
            with_us, without = median(name)(sections), median(BOOT)(sections)
            return with_us - without if with_us and without else None

        return figure

    return [
        *(
            Target(f"{name}, in seconds", median(name), lambda _: BOUND, at_least=False)
            for name in (HELP, AGENTS)
        ),
        Target(
            f"{AGENTS}, times {SALMON}",
            times(TITLE, AGENTS, SALMON),
            lambda _: TIMES,
            at_least=False,
        ),
        *(
            Target(f"{name}: seconds more", more(name), lambda _: MORE, at_least=False)
            for name in (WITH_US, ATTACHED)
        ),
    ]


def _python(starts: int, code: str) -> float:
    return _seconds(starts, sys.executable, "-c", code)


def _seconds(starts: int, *command: object) -> float:
    with project(*(agent(366, f"isp-{number}") for number in range(3))) as folder:
        return min(_once([str(one) for one in command], str(folder)) for _ in range(starts))


def _once(command: Sequence[str], folder: str) -> float:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)}: {done.stderr[-300:]}")
    return seconds
