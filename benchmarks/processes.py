"""Child processes of a benchmark: started in a session of their own, ended by their pid."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

__all__ = ["ROOT", "Child", "Failure", "end_with_parent", "module", "wait_for_port"]

#: The checkout.
ROOT = Path(__file__).parent.parent

# Seconds until a child that was asked to end is killed.
GRACE = 5.0


class Failure(Exception):
    """A child did not do what it should; the text has the end of what it said."""


class Child:
    """A process while the context lasts.  What it prints are JSON objects, one a line; or nothing
    that anybody reads."""

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:
        self.name = name or Path(command[0]).name
        self._command, self._cwd = command, cwd
        self._env = {**os.environ, **(env or {})}
        self._lines: queue.Queue[bytes | None] = queue.Queue()

    def __enter__(self) -> Child:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self._command,
            cwd=self._cwd,
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,))
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        for number in (signal.SIGTERM, signal.SIGKILL):
            # What it forked and did not wait for, too: the group is ours.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        self._reader.join()
        self.process.stdin.close()
        self.process.stdout.close()

    def says(self, timeout: float) -> dict[str, Any]:
        """The next JSON object that it prints; other lines are passed over.  Raises
        :class:`Failure` when none comes in ``timeout`` seconds."""
        give_up = time.monotonic() + timeout
        passed: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, give_up - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                said = " / ".join(passed[-5:]) or "nothing"
                raise Failure(f"{self.name} ended or hung, having said: {said}")
            if line.startswith(b"{"):
                facts = json.loads(line)
                if "failure" in facts:
                    raise Failure(f"{self.name}: {facts['failure']}")
                return dict(facts)
            passed.append(line.decode("utf-8", "replace").rstrip())

    def _read(self, output: IO[bytes]) -> None:
        """In a thread: a child whose output no one reads would wait for ever."""
        for line in output:
            self._lines.put(line)
        self._lines.put(None)

    def resident(self) -> int:
        """Its resident memory in octets (Linux)."""
        status = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def processor_time(self) -> float:
        """Seconds of processor time that all its threads have had up to now, also when it has ended
        and was not waited for (Linux)."""
        # clockid_t of a process, as clock_getcpuclockid(3) has it: what getrusage tells it itself.
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def peak(self) -> int:
        """The most resident memory that it had up to now, in octets (Linux)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise Failure("the system does not say how much memory a process had")


def module(name: str, *arguments: object, cwd: Path | None = None) -> Child:
    """A module of this package as a process."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return Child(command, cwd, {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}, name)


def end_with_parent() -> None:
    """Have this process end when the one that started it does: its standard input ends then."""

    def wait() -> NoReturn:
        while sys.stdin.buffer.read(1):
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def wait_for_port(port: int, child: Child, timeout: float = 20.0) -> None:
    """Wait until a child listens.  Raises :class:`Failure`."""
    give_up = time.monotonic() + timeout
    while time.monotonic() < give_up and child.process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.02)
    raise Failure(f"{child.name} does not listen on port {port}")
