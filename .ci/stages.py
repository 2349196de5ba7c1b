"""What CI runs, in stages: two side by side, each timed, the output of each in one piece.

A wide stage keeps both cores busy (``pytest -n auto``); a narrow one waits for the network or for a
server, or computes on one core.  One of each runs at any time, each kind in the order below.  The
first stage that fails ends the run, and whatever still runs is ended with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build/ci"
# Seconds: a stage that takes this long hangs, and what it said so far is worth more than its end.
PATIENCE = 45 * 60
# Seconds that a stage has to clean up after itself when it is interrupted.
GRACE = 20
# Lines of a failed stage's output that are shown once more at the end.
TAIL = 40
# For `pytest -n auto`.
ALONE = "PYTEST_XDIST_AUTO_NUM_WORKERS=1"
PR_SET_CHILD_SUBREAPER = 36


@dataclass(eq=False)
class Stage:
    """A command for the shell; it starts when the stages before it of its kind, and those named in
    ``after``, have passed."""

    name: str
    command: str
    wide: bool = False
    after: tuple[str, ...] = ()
    state: str = "not run"
    began: float = 0.0
    seconds: float = 0.0
    passed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def log(self) -> Path:
        return LOGS / f"{re.sub('[^a-z0-9.]+', '-', self.name.lower())}.log"


def stages() -> list[Stage]:
    """All of CI.

    Of the other Pythons that we promise, those that this machine has: the oldest and the newest run
    the suite with one worker, beside what is wide.  The one between runs it with coverage, which so
    costs no run of its own.
    """
    others = {version: path for version, path in _pythons() if version != _default_python()}
    measured = next((version for version in others if version == "3.12"), "")

    def with_python(version: str) -> str:
        return f"VENV=.venv-{version} PYTHON={others[version]}" if version else ""

    # Each after the other: an installation writes salmon_revsmtp.egg-info, and all share the one.
    environments = ["make .venv/.fuzz-ready"]
    environments += [f"make .venv-{version}/.ready {with_python(version)}" for version in others]
    names = ("exim", "postfix", "sendmail", "dovecot", "fetchmail", "rspamd", "web")
    names += ("pgbouncer", "haproxy", "postgresql")
    servers = [f"tests/interop/install-server {name}" for name in names]
    ready = ("environments",)
    return [
        Stage("environments", " && ".join(environments), wide=True),
        Stage("the real servers", " && ".join(servers)),
        Stage("tests", "make test", wide=True),
        Stage("lint, types, docs", "make lint types docs", after=ready),
        Stage("everything broken that can break", "make faults", wide=True),
        Stage("interop", "make interop", after=ready),
        # Beside tests that wait for something to be in time, and give way to it.
        Stage("hostile inputs", "nice make fuzz", after=ready),
        Stage("the wheel in an empty environment", ".ci/wheel", after=ready),
        Stage("demo", "make demo", after=ready),
        Stage("the benchmarks run", "make bench QUICK=1", after=ready),
        Stage("coverage", f"make coverage {with_python(measured)}".strip(), wide=True),
        *(
            Stage(
                f"tests with Python {version}",
                f"{ALONE} make test {with_python(version)}",
                after=ready,
            )
            for version in others
            if version != measured
        ),
    ]


def _pythons() -> Iterator[tuple[str, str]]:
    """Version and path of each Python that pyenv has."""
    if not shutil.which("pyenv"):
        return
    for full in _output("pyenv", "versions", "--bare").split():
        if match := re.fullmatch(r"(3\.(?:10|11|12|13))\.\d+", full):
            yield match[1], _output("pyenv", "which", "python", PYENV_VERSION=full)


def _default_python() -> str:
    """The version of what ``make`` takes unless told otherwise."""
    return _output("python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")


def _output(*command: str, **environment: str) -> str:
    return subprocess.check_output(command, text=True, env={**os.environ, **environment}).strip()


# -- running them ----------------------------------------------------------------------------------


async def run_all(all_stages: list[Stage]) -> bool:
    """Run both kinds side by side; whether all have passed."""
    kinds = [asyncio.create_task(run_in_order(all_stages, wide)) for wide in (True, False)]
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: [kind.cancel() for kind in kinds])
    loop.add_signal_handler(signal.SIGCHLD, orphans)
    _, others = await asyncio.wait(kinds, return_when=asyncio.FIRST_EXCEPTION)
    for other in others:
        other.cancel()
    results = await asyncio.gather(*kinds, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, StageFailed):
            raise result
    return results == [None, None]


class StageFailed(Exception):
    pass


async def run_in_order(all_stages: list[Stage], wide: bool) -> None:
    for stage in all_stages:
        if stage.wide is wide:
            for before in all_stages:
                if before.name in stage.after:
                    await before.passed.wait()
            await run(stage)


async def run(stage: Stage) -> None:
    say(f"-- {stage.name}: {stage.command}")
    stage.began, stage.state = time.monotonic(), "stopped"
    with stage.log.open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", stage.command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _leaders.add(process.pid)
    ended = asyncio.create_task(asyncio.to_thread(process.wait))
    try:
        await asyncio.wait({ended}, timeout=PATIENCE)
        if not ended.done():
            stage.state = "FAILED (hangs)"
        else:
            stage.state = f"FAILED ({ended.result()})" if ended.result() else "passed"
    finally:
        await end(process.pid, ended)
        _leaders.discard(process.pid)
        stage.seconds = time.monotonic() - stage.began
        say(f"\n== {stage.name}: {stage.state}, {stage.seconds:.0f} s\n{said_by(stage)}")
    if stage.state != "passed":
        raise StageFailed(stage.name)
    stage.passed.set()


async def end(group: int, ended: asyncio.Task[int]) -> None:
    """Interrupt a stage as Ctrl-C would; what is left of it then is killed."""
    if not ended.done():
        _signal(group, signal.SIGINT)
        await asyncio.wait({ended}, timeout=GRACE)
    _signal(group, signal.SIGKILL)
    await ended


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


_leaders: set[int] = set()


def adopt_orphans() -> None:
    """What loses its parent below us becomes our child, in whatever session it is."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def orphans() -> list[int]:
    """Those that run; the dead ones are buried, so that no one waits for them to be gone."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    children = path.read_text().split() if path.exists() else []
    found = set(map(int, children)) - _leaders
    return [pid for pid in found if os.waitpid(pid, os.WNOHANG) == (0, 0)]


def end_orphans() -> None:
    """Kill what the stages have left running in sessions of their own."""
    while running := orphans():
        for pid in running:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            say(f"-- still running, and killed: {pid} {command[:200]}")
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


# -- telling ---------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)


def said_by(stage: Stage, lines: int = 0) -> str:
    """What a stage has printed, or its last lines."""
    text = stage.log.read_text(errors="replace").rstrip("\n")
    return "\n".join(text.splitlines()[-lines:])


def table(all_stages: list[Stage], started: float) -> str:
    """When each began, how long it took, and what became of it."""
    rows = [f"{'stage':40} {'began':>7} {'took':>7}"]
    for stage in all_stages:
        kind = "" if stage.wide else "  beside"
        times = (
            f"{stage.began - started:5.0f} s {stage.seconds:5.0f} s" if stage.began else " " * 15
        )
        rows.append(f"{stage.name:40} {times}  {stage.state}{kind}")
    rows.append(f"{'all':40} {0:5.0f} s {time.monotonic() - started:5.0f} s")
    return "\n".join(rows)


def main() -> int:
    # In CI an interop test whose server is missing fails instead of being skipped.
    os.environ.setdefault("CI", "true")
    adopt_orphans()
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    started = time.monotonic()
    all_stages = stages()
    try:
        passed = asyncio.run(run_all(all_stages))
    finally:
        end_orphans()
        say(f"\n== stages\n{table(all_stages, started)}")
    for stage in all_stages:
        if stage.state.startswith("FAILED"):
            say(f"\n== the end of what {stage.name!r} printed\n{said_by(stage, TAIL)}")
    say("\n== all passed" if passed else "\n== not passed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
