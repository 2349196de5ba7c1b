"""The control socket: how ``salmon-revsmtp collect`` asks a running server.

A Unix socket below ``run/``, for its owner only.  A request is a line of JSON, an answer several:

    {"do": "collect", "agents": ["isp"], "verbose": true}
        {"verbose": true}                                   said first, if it was asked for: what
        {"agent": "isp", "dialogue": "C: ATRN"}             follows has the dialogue line by line,
        {"agent": "isp", "unheard": "its push ..."}         or says why there is none
        {"agent": "isp", "messages": 2, "bytes": 4711,      as it goes on: the counts, what it does
         "doing": "connecting to ...", "seconds": 0.7}      or waits for, and for how long
        {"report": {...}}                                   one per agent
        {"warning": "..."}                                  if there is something wrong with it
        {"end": true}
    {"do": "state"}
        {"next": {"isp": 1795498202.5}, "push": {}}         seconds since the epoch
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salmon_revsmtp.files import give_to_owner, make_folder
from salmon_revsmtp.safelog import log_safely

if TYPE_CHECKING:
    import asyncio  # only who serves needs it, and not who asks

__all__ = ["GLANCE", "MOST_KEYS", "SOCKET", "Control", "NoServer", "ask", "running"]

SOCKET = Path("run/revsmtp.sock")

# Seconds that who asks waits for an answer.  While a server collects it says something every 0.2.
PATIENCE = 10.0
# The same for what is only shown beside other things.
GLANCE = 2.0
# Octets in the name of a Unix socket (sun_path), where they are fewest, on BSD.
MAX_NAME = 100
# Connections that wait to be taken.
BACKLOG = 100
# Keys of messages in one request, which is a line of no more than 64 KiB.
MOST_KEYS = 1000

# From 3.13 on asyncio would remove a socket by the name that it was bound to, which it has no more.
_OURS: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}

log = logging.getLogger(__name__)

Answers = AsyncGenerator[dict[str, Any], None]


class NoServer(Exception):
    """No server listens on the control socket."""


class Control:
    """Serves the control socket.  ``handle`` makes the answers to a request."""

    def __init__(self, handle: Callable[[dict[str, Any]], Answers], path: Path = SOCKET) -> None:
        self._handle = handle
        self._path = path.absolute()  # a handler may change the folder of the process
        self._server: asyncio.Server | None = None
        self._asking: set[asyncio.Task[Any]] = set()

    def be_alone(self) -> None:
        """Raises :class:`OSError` if another server of this project runs: they would share agents,
        queues and alarms, and no command could ask both."""
        if running(self._path):
            raise OSError(
                f"another server runs in this project, and answers on {self._path}; end it first, "
                "with `salmon stop` or where it was started"
            )

    async def start(self) -> None:
        """Listen.  A socket that a dead process left is no obstacle; raises :class:`OSError` if it
        is not dead.  If there can be no socket for another reason, there is a warning."""
        import asyncio

        self.be_alone()
        try:
            make_folder(self._path.parent)
            self._path.unlink(missing_ok=True)
            listening = _private_socket(self._path)
            self._server = await asyncio.start_unix_server(self._serve, sock=listening, **_OURS)
        except OSError as error:
            log.warning("socket=%s cannot be made: %s; collect will work alone", self._path, error)

    async def stop(self) -> None:
        """Close the socket and remove it; who is still waiting gets no more answers."""
        import asyncio

        if self._server is not None:
            self._server.close()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        for task in list(self._asking):
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        import asyncio

        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        try:
            with contextlib.suppress(ConnectionError, ValueError, asyncio.CancelledError):
                line = await reader.readline()
                if not line:
                    return  # someone looked whether we are here
                # Who has gone is answered no more, and nothing is kept for him.
                async with contextlib.aclosing(self._answers(line)) as answers:
                    async for answer in answers:
                        writer.write(json.dumps(answer).encode() + b"\n")
                        await writer.drain()
        finally:
            self._asking.discard(task)
            writer.close()

    async def _answers(self, line: bytes) -> Answers:
        """The answers to a request.  The last one says so if it was one too much for us: who asks
        never waits in vain."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("a request is a JSON object")
            async with contextlib.aclosing(self._handle(request)) as answers:
                async for answer in answers:
                    yield answer
        except Exception as error:
            log_safely(log, logging.ERROR, "socket=%s a request failed", self._path, error=True)
            yield {"error": f"the server could not do that: {type(error).__name__}: {error}"}


def ask(
    request: dict[str, Any], path: Path = SOCKET, patience: float = PATIENCE
) -> Iterator[dict[str, Any]]:
    """Ask the server; yields its answers.  Blocks, but no longer than ``patience`` seconds for an
    answer.  Raises :class:`NoServer` if there is none, and :class:`OSError`."""
    connection = _connect(path, patience)
    if connection is None:
        raise NoServer
    try:
        with connection, connection.makefile("rwb") as stream:
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
            for line in stream:
                yield json.loads(line)
    except TimeoutError:
        raise _not_answering(patience) from None


def running(path: Path = SOCKET) -> bool:
    """Whether a server has the control socket."""
    try:
        connection = _connect(path, PATIENCE)
    except OSError:
        return True
    if connection is not None:
        connection.close()
    return connection is not None


def _connect(path: Path, patience: float) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(patience)
    try:
        with _short_enough(path) as name:
            connection.connect(name)
    except (BlockingIOError, TimeoutError):  # as many wait already as may
        connection.close()
        raise _not_answering(patience) from None
    except OSError:
        connection.close()
        return None
    return connection


@contextlib.contextmanager
def _short_enough(path: Path) -> Iterator[str]:
    """A name of a socket that the system takes: it has room for about 100 octets, and a project may
    be deep below the root.  Raises :class:`OSError`."""
    if len(os.fsencode(path)) <= MAX_NAME:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _not_answering(patience: float) -> TimeoutError:
    return TimeoutError(f"it has not answered in {patience:g} seconds; is it stopped or stuck?")


def _private_socket(path: Path) -> socket.socket:
    """A listening socket that only its owner may connect to, whatever the umask, which belongs to
    all threads."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    listening = socket.socket(socket.AF_UNIX)
    try:
        beside.unlink(missing_ok=True)
        with _short_enough(beside) as name:
            listening.bind(name)
        beside.chmod(0o600)
        give_to_owner(beside)
        listening.listen(BACKLOG)
        beside.rename(path)
    except BaseException:
        listening.close()
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    return listening
