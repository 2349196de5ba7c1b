"""A PostgreSQL server of the test's own: a cluster in a temporary folder, run as an unprivileged
user.  The machine's own clusters are left alone."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import psycopg

from support.servers import free_port

__all__ = ["PASSWORD", "USER", "Cluster", "Standby", "programs"]

USER, PASSWORD = "revsmtp", "s3cret of p@ostgres/"

# Seconds that a server may take to start or stop, on a machine that does much else.
PATIENCE = 60

OPTIONS = {
    # Nothing of this is to survive the end of the machine; that of the server it does all the same.
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "127.0.0.1",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "max_wal_size": "128MB",
    "logging_collector": "off",
}


def programs() -> Path | str:
    """The folder with ``initdb`` and ``postgres``, or a sentence that says why there is none."""
    there = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=_version)
    if there:
        return there[-1].parent
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    return "no initdb is found: run tests/interop/install-server postgresql"


def _version(path: Path) -> int:
    name = path.parent.parent.name
    return int(name) if name.isdigit() else 0


class Cluster:
    """A server that runs while the context lasts.

    ``place`` the folder that its own is in; the system's for temporary files unless given.
    ``port``  on 127.0.0.1, where a password is needed; the socket in ``folder`` needs none.
    """

    def __init__(self, programs: Path, place: Path | None = None, **options: str) -> None:
        self._programs, self._place = programs, place
        self._options = {**OPTIONS, **options}
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Cluster:
        self.folder = Path(tempfile.mkdtemp(prefix="revsmtp-postgres-", dir=self._place))
        try:
            self._own(self.folder)
            command = [*self._make(), "--no-sync", "-D", str(self.folder / "data")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **self._as_user())
            self.port = free_port()
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self) -> list[str]:
        """What makes its data."""
        password = self.folder / "password"
        password.write_text(PASSWORD)
        self._own(password)
        command = [str(self._programs / "initdb"), "-E", "UTF8", "--no-locale", "-U", USER]
        command += [f"--pwfile={password}", "--auth-local=trust", "--auth-host=scram-sha-256"]
        return command

    def _own(self, path: Path) -> None:
        if (user := self._as_user()) and user.get("user") is not None:
            os.chown(path, user["user"], user["group"])

    def _as_user(self) -> dict[str, Any]:
        """PostgreSQL refuses to run as root."""
        here: dict[str, Any] = {"cwd": self.folder, "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}}
        if os.geteuid() != 0:
            return here
        names = {one.pw_name: one for one in pwd.getpwall()}
        user = names.get("postgres") or names["nobody"]
        return {**here, "user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = {**self._options, "port": str(self.port)}
        options["unix_socket_directories"] = str(self.folder)
        command = [str(self._programs / "postgres"), "-D", str(self.folder / "data")]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as_user()
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                psycopg.connect(self.url()).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self.log()) from None
                time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT ends all connections, SIGQUIT is as if it had crashed."""
        if self._process is not None:
            self.signal(how)
            self._process.wait(PATIENCE)
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send the server a signal."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def freeze(self) -> list[int]:
        """Stop all of its processes where they are; returns their numbers, for :meth:`thaw`."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.signal(signal.SIGSTOP)
        frozen = [self._process.pid, *map(int, children.read_text().split())]
        for one in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGSTOP)
        return frozen

    def thaw(self, frozen: list[int]) -> None:
        for one in reversed(frozen):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGCONT)

    def log(self) -> str:
        """What it logged, for a test that fails."""
        return (self.folder / "log").read_text()

    # -- what it has ----------------------------------------------------------------------------

    def url(self, schema: str = "", port: int = 0, database: str = "postgres") -> str:
        """The URL of a schema, by its socket; by TCP, with the password, if there is a port."""
        options = f"options=-csearch_path%3D{schema}" if schema else ""
        if port:
            secret = quote(PASSWORD, safe="")
            return f"postgresql://{USER}:{secret}@127.0.0.1:{port}/{database}?{options}"
        place = f"host={quote(str(self.folder), safe='')}&port={self.port}"
        return f"postgresql://{USER}@/{database}?{place}&{options}"

    def schema(self) -> str:
        """A schema of the test's own."""
        name = f"test{next(self._numbers)}"
        self.execute(f"CREATE SCHEMA {name}")
        return name

    def execute(self, text: str, schema: str = "") -> None:
        """Execute statements."""
        with self.connection(schema) as connection:
            connection.execute(text.encode())

    def rows(self, text: str, schema: str = "") -> list[tuple[Any, ...]]:
        """What a query finds."""
        with self.connection(schema) as connection:
            return connection.execute(text.encode()).fetchall()

    @contextlib.contextmanager
    def connection(self, schema: str = "") -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
        """A connection that commits by itself."""
        with contextlib.closing(psycopg.connect(self.url(schema), autocommit=True)) as connection:
            yield connection


class Standby(Cluster):
    """A standby of a server, which waits for it with each commit."""

    def __init__(self, primary: Cluster) -> None:
        super().__init__(primary._programs, None, **primary._options)
        self._primary = primary

    def _make(self) -> list[str]:
        command = [str(self._programs / "pg_basebackup"), "-h", str(self._primary.folder)]
        return [*command, "-p", str(self._primary.port), "-U", USER, "-R", "-c", "fast"]

    def __enter__(self) -> Standby:
        super().__enter__()
        self._primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self._primary.execute("SELECT pg_reload_conf()")
        return self

    def promote(self) -> None:
        """It is the server now."""
        assert self.rows("SELECT pg_promote()") == [(True,)]
