"""A provider in a process that may be killed: the test's side of killable_provider.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import Arrival, Held
from salmon_revsmtp.smtp.content import whole
from salmon_revsmtp.smtp.envelope import Envelope
from support.configuration import PASSWORD
from support.processes import LONG, TESTS
from support.servers import free_port

__all__ = ["ProviderProcess"]


class ProviderProcess:
    """Providers in ``folder``, one after another, that listen where the first one did.

    ``mx``    the port that takes mail for ``example.org`` and, for another account, example.com.
    ``odmr``  the port on which customers call.
    ``hold``  where mail is held, if it is not in the folder.
    ``lease`` seconds without a word after which what it has there goes to others.
    ``both``  more settings, of the provider and of the service ``mx``.
    ``soon``  what has a limit with the database has one of a few seconds.
    """

    def __init__(
        self,
        folder: Path,
        hold: str = "run/hold",
        lease: float | None = None,
        both: dict[str, Any] | None = None,
        soon: bool = False,
        **account: Any,
    ) -> None:
        folder.mkdir()
        self.folder = folder
        self.mx, self.odmr = free_port(), free_port()
        keys = {"password": PASSWORD, **account}
        settings = {
            "accounts": [
                {"name": "acme", "domains": ["example.org"], **keys},
                {"name": "other", "domains": ["example.com"], **keys},
            ],
            "provider": {
                "hostname": "odmr.example.net",
                "listen": f"127.0.0.1:{self.odmr}",
                "hold": hold,
                **(both or {}),
            },
            "lease": lease,
            "soon": soon,
            "mx": {
                "hostname": "mx.example.net",
                "listen": f"127.0.0.1:{self.mx}",
                "delivery": "hold",
                **(both or {}),
            },
        }
        module = "support.killable_provider"
        command = [sys.executable, "-m", module, str(folder), json.dumps(settings)]
        measured = {name: os.environ[name] for name in os.environ if name.startswith("COVERAGE_")}
        environment = {"PYTHONPATH": str(TESTS), "PATH": "/usr/bin:/bin", **measured}
        self._pid = 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> ProviderProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._pid:
            self._signal(signal.SIGKILL)
        self._process.stdin.close()
        assert self._process.wait(LONG) == 0
        self._process.stdout.close()

    def start(self, die_at: int | None = None, after: str = "") -> None:
        """Start one, and wait until it listens."""
        assert self._process.stdin is not None
        request = {"die_at": die_at, "after": after}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        words = sorted([self._hear(), self._hear()])
        assert [one[0] for one in words] == ["pid", "up"], words
        self._pid = int(words[0][1])

    def kill(self) -> None:
        """Kill it, now."""
        self._signal(signal.SIGKILL)
        self._ended()

    def stop(self) -> bool:
        """Stop it, and wait for its end; returns whether it was killed before or during that."""
        self._signal(signal.SIGTERM)
        status = self._ended()
        assert status in (0, -9), status
        return status == -9

    def _ended(self) -> int:
        word, status = self._hear()
        assert word == "ended"
        self._pid = 0
        return int(status)

    def _hear(self) -> list[str]:
        assert self._process.stdout is not None
        return self._process.stdout.readline().split()

    def _signal(self, number: signal.Signals) -> None:
        # The pid is not used again before its end is heard here.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    # -- what it holds, while none runs ---------------------------------------------------------

    @contextlib.contextmanager
    def store(self) -> Iterator[EmbeddedStore]:
        """The hold store, while no provider has it."""
        store = EmbeddedStore(self.folder / "run/hold")
        try:
            yield store
        finally:
            store.close()

    def held(self) -> list[tuple[Held, bytes]]:
        """All that is held, and its octets."""
        with self.store() as store:
            found = list(store.listing(messages=100_000))
            octets = store.load([one.key for one in found])
            assert set(octets) == {one.key for one in found}
            return [(one, whole(octets[one.key])) for one in found]

    def put(self, recipients: tuple[str, ...], data: bytes) -> None:
        """Hold a message for acme."""
        arrival = Arrival(
            Envelope("a@example.net", recipients), ("acme",) * len(recipients), [data]
        )
        with self.store() as store:
            store.put([arrival])
