"""Queue mode: how fast messages are made safe in a queue, beside Salmon's own ``Queue.push``.

The peer is a bare loop: ``Queue.push``, which syncs the file, and a sync of the folder that makes
its name safe, with no SMTP around it.  What a project had before is there, too: Salmon's receiver
and a handler that does just that.  The sessions of smtp-source wait for each answer.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks import peers
from benchmarks.feeding import RECIPIENT, SENDER
from benchmarks.intake import Load, bare, by_us
from benchmarks.processes import Child, Failure, wait_for_port
from benchmarks.project import project
from benchmarks.provider import times
from benchmarks.table import Case, Section, Target

__all__ = ["sections", "targets"]

SMALL, LARGE = 4_000, 10_000_000
# Octets -> messages.
COUNTS = {SMALL: 3000, LARGE: 40}
QUICK = {SMALL: 60, LARGE: 2}
SESSIONS = 10

PUSH = "Queue.push and syncs, nothing else"
PIPELINED, ONE, TEN = "ours, pipelined", "ours, 1 session", f"ours, {SESSIONS} sessions"
RECEIVER = "Salmon's SMTPReceiver, a handler that pushes, {}"


def title(octets: int) -> str:
    """The title of a section."""
    return f"Queue mode, {octets // 1000:,} KB messages"


def sections(quick: bool) -> list[Section]:
    """Small messages in three ways, and large ones."""
    counts = QUICK if quick else COUNTS
    small, large = Load(counts[SMALL], SMALL), Load(counts[LARGE], LARGE)
    source = peers.missing("smtp-source")
    cases = [
        Case(PIPELINED, lambda: by_us(small, delivery="queue")),
        Case(TEN, lambda: _ours(small, SESSIONS), source),
        Case(ONE, lambda: _ours(small, 1), source),
        Case(PUSH, lambda: bare("queue", small)),
        Case(RECEIVER.format("10 sessions"), lambda: _salmons(small, SESSIONS), source),
        Case(RECEIVER.format("1 session"), lambda: _salmons(small, 1), source),
    ]
    of_large = [
        Case(PIPELINED, lambda: by_us(large, delivery="queue")),
        Case(PUSH, lambda: bare("queue", large)),
    ]
    return [
        Section(title(SMALL), "messages/s", cases, ours=PIPELINED, limit=PUSH),
        Section(title(LARGE), "messages/s", of_large, ours=PIPELINED, limit=PUSH),
    ]


def targets() -> list[Target]:
    """What the issue asks for: medians of one run."""
    return [
        _target(ONE, SMALL, 1.0),
        _target(TEN, SMALL, 3.0),
        _target(PIPELINED, SMALL, 3.0),
        _target(PIPELINED, LARGE, 0.8),
    ]


def _target(name: str, octets: int, bound: float) -> Target:
    text = f"queue mode, {octets // 1000:,} KB, {name}, times Queue.push and syncs"
    return Target(text, times(title(octets), name, PUSH), lambda _: bound)


@contextmanager
def _started(port: int, boot: str, **keys: str | list[str] | int) -> Iterator[None]:
    command = [str(peers.SALMON), "start", "--no-daemon", "--boot", boot]
    with project(port=port, **keys) as folder, Child(command, folder, name=boot) as salmon:  # type: ignore[arg-type]
        wait_for_port(port, salmon)
        yield


def _ours(load: Load, sessions: int) -> float:
    port = peers.free_port()
    with _started(port, "config.boot", delivery="queue", listen=[f"127.0.0.1:{port}"]):
        return _sent(port, load, sessions)


def _salmons(load: Load, sessions: int) -> float:
    port = peers.free_port()
    with _started(port, "config.smtp", handler="pushes"):
        return _sent(port, load, sessions)


def _sent(port: int, load: Load, sessions: int) -> float:
    """Messages per second of smtp-source: for each session a connection that stays open."""
    command = peers.smtp_source().split()
    count = load.messages
    command += ["-d", "-s", str(sessions), "-m", str(count), "-l", str(load.octets)]
    command += ["-f", SENDER, "-t", RECIPIENT, f"127.0.0.1:{port}"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        raise Failure(f"smtp-source: {done.stderr[-300:]}")
    return count / (time.perf_counter() - started)
