"""Child processes of a benchmark: started in a session of their own, ended by their pid."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

__all__ = ["ROOT", "Child", "Failure", "end_with_parent", "free_port", "module", "wait_for_port"]

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
        self._buffer = b""

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
        self.process.stdin.close()
        self.process.stdout.close()

    def says(self, timeout: float) -> dict[str, Any]:
        """The next JSON object that it prints; other lines are passed over.  Raises
        :class:`Failure` when none comes in ``timeout`` seconds."""
        give_up = time.monotonic() + timeout
        passed: list[str] = []
        while True:
            while b"\n" not in self._buffer:
                if not self._read(give_up):
                    said = " / ".join(passed[-5:]) or "nothing"
                    raise Failure(f"{self.name} ended or hung, having said: {said}")
            line, _, self._buffer = self._buffer.partition(b"\n")
            if line.startswith(b"{"):
                said_now = json.loads(line)
                if "failure" in said_now:
                    raise Failure(f"{self.name}: {said_now['failure']}")
                return dict(said_now)
            passed.append(line.decode("utf-8", "replace"))

    def ends(self, timeout: float) -> None:
        """Wait for its end; raises :class:`Failure` when that is not a good one."""
        give_up = time.monotonic() + timeout
        while self._read(give_up):
            pass
        try:
            status = self.process.wait(max(0.1, give_up - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name} did not end in {timeout:g} seconds") from None
        if status != 0:
            said = self._buffer[-500:].decode("utf-8", "replace")
            raise Failure(f"{self.name} ended with {status}: {said}")

    def _read(self, give_up: float) -> bool:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        left = give_up - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return False
        data = os.read(descriptor, 65536)
        self._buffer += data
        return bool(data)

    def resident(self) -> int:
        """Its resident memory in octets (Linux)."""
        status = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


def free_port() -> int:
    """A TCP port of the loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, child: Child, timeout: float = 20.0) -> None:
    """Wait until a child listens.  Raises :class:`Failure`."""
    give_up = time.monotonic() + timeout
    while time.monotonic() < give_up and child.process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.02)
    raise Failure(f"{child.name} does not listen on port {port}")
