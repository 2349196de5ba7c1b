"""Processes that may be killed: the test's side of killable.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]

# Seconds to wait for what takes milliseconds.
LONG = 60


class KillableProcess:
    """Processes that may be killed; see killable.py."""

    def __init__(self, folder: Path, keys: dict[str, Any], delivery: str) -> None:
        command = [
            sys.executable,
            "-m",
            "support.killable",
            str(folder),
            json.dumps(keys),
            delivery,
        ]
        measured = {name: os.environ[name] for name in os.environ if name.startswith("COVERAGE_")}
        environment = {"PYTHONPATH": str(TESTS), "PATH": "/usr/bin:/bin", **measured}
        self._pid = 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _ask(self, **request: Any) -> int:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._hear("pid")

    def _hear(self, word: str) -> int:
        assert self._process.stdout is not None
        said = self._process.stdout.readline().split()
        assert said[:1] == [word], said
        return int(said[1])

    def run(
        self,
        do: str,
        kill_after: float | None = None,
        die_at: int | None = None,
        **more: str,
    ) -> int:
        """One run; returns its exit status, -9 if it was killed."""
        pid = self._pid = self._ask(do=do, die_at=die_at, **more)
        if kill_after is None:
            return self._hear("ended")
        killer = threading.Timer(kill_after, _kill, [pid])
        killer.start()
        try:
            # The pid is not used again before its end is heard here.
            return self._hear("ended")
        finally:
            killer.cancel()
            killer.join()

    def kill(self) -> None:
        """Kill the run of another thread, which hears of it."""
        _kill(self._pid)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(LONG) == 0
        self._process.stdout.close()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
