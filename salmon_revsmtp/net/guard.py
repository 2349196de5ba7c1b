"""Our side of the guardian, the process that ends sessions in words when ours dies.

What for: Exim 4.100.1 in the clear takes the end of a connection on which its recipients were
accepted for success, also when that is a reset, and deletes its only copy of the message.  Only a
reply keeps it, and a process that was killed says nothing any more.

The first connection that is guarded starts the guardian (``net.guardian``); there is one in a
process, and another one if it dies.  Where it cannot be had, the log says so once and all goes on
without it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from asyncio.trsock import TransportSocket
from pathlib import Path

from salmon_revsmtp.net import guardian

__all__ = ["Guard", "guard"]

log = logging.getLogger(__name__)

# Seconds that it may take to hear us; it does nothing else.
PATIENCE = 1.0
# A guardian that lives no longer than this, in seconds, has no other after it.
SHORT_LIFE = 10.0

# It ends when we do and not before, whoever signals our group.
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# Where an interpreter may have to look for its own library.  The rest of the environment, with its
# passwords, is not for another process to keep.
_ENVIRONMENT = ("LD_LIBRARY_PATH",)


class Guard:
    """One guarded connection.  It is ended when this object goes, if nothing was said before."""

    def __init__(self, keeper: _Keeper, number: int, last_words: bytes) -> None:
        self._keeper = keeper
        self._number = number
        self._last_words = last_words
        self._torn = False

    def torn(self, torn: bool) -> None:
        """Whether the peer may have half a line from us: then the last words begin with the end of
        it.  What they follow is true all the same, or no reply at all."""
        if torn != self._torn:
            self._torn = torn
            self._keeper.change(self._number, (b"\r\n" if torn else b"") + self._last_words)

    def let_go(self) -> None:
        """The connection needs no guard any more."""
        self._keeper.release(self._number, guardian.LET_GO)

    def close(self) -> None:
        """We close the connection now.  The peer sees the end at once, and not when the guardian
        has let go."""
        self._keeper.release(self._number, guardian.LET_GO, shut_down=True)

    def end(self) -> None:
        """We close it, too, but the guardian says the last words and ends the connection after
        them."""
        self._keeper.release(self._number, guardian.END)

    def __del__(self) -> None:
        self.end()


def guard(connection: TransportSocket, last_words: bytes) -> Guard | None:
    """Guard a connection: when this process dies, its peer hears ``last_words`` (with their CRLF).

    ``None`` where there is no guardian.
    """
    return _keeper.keep(connection, last_words)


class _Keeper:
    """What is guarded, and the guardian of it.  Any thread may come."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()  # a Guard may go at any moment
        self._kept: dict[int, tuple[TransportSocket, bytes]] = {}
        self._unable = False

    def keep(self, connection: TransportSocket, last_words: bytes) -> Guard | None:
        with self._lock:
            if self._process is None and not self._unable:
                self._start()
            if self._unable:
                return None
            number = next(self._numbers)
            self._kept[number] = connection, last_words
            self._tell_of(number)
            return Guard(self, number, last_words)

    def change(self, number: int, last_words: bytes) -> None:
        with self._lock:
            if number in self._kept:
                self._kept[number] = self._kept[number][0], last_words
                self._tell(guardian.CHANGE, number, last_words)

    def release(self, number: int, how: bytes, *, shut_down: bool = False) -> None:
        with self._lock:
            if number in self._kept:
                connection, _ = self._kept.pop(number)
                if shut_down:
                    with contextlib.suppress(OSError):  # it is gone
                        connection.shutdown(socket.SHUT_RDWR)
                self._tell(how, number)

    def forget(self) -> None:
        """In a child that was forked: all this is the parent's.  While the child had our end of the
        socket, too, the guardian would not see the parent die."""
        self._drop()
        self._begin()

    # -- the process ----------------------------------------------------------------------------

    def _start(self) -> None:
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                ours.settimeout(PATIENCE)
                self._process = _spawn(theirs)
            self._socket = ours
            threading.Thread(
                target=self._watch, args=(self._process,), name="guardian", daemon=True
            ).start()
        except (OSError, RuntimeError, ValueError) as error:  # no program, no thread
            self._give_up(f"it cannot be started: {error}")

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for its death, which is not to be before ours."""
        started = time.monotonic()
        status = process.wait()
        with self._lock:
            if process is not self._process:
                return
            self._drop()
            if time.monotonic() - started < SHORT_LIFE:
                self._give_up(f"it has ended at once, with status {status}")
                return
            log.warning("the guardian process has ended, status %d; another is started", status)
            self._start()
            for number in list(self._kept):
                self._tell_of(number)

    def _drop(self) -> None:
        self._process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _give_up(self, why: str) -> None:
        self._drop()
        self._unable = True
        self._kept.clear()
        log.warning(
            "no guardian process: %s; if this process is killed, an Exim that sends without TLS "
            "may lose the message in hand",
            why,
        )

    def _tell_of(self, number: int) -> None:
        connection, last_words = self._kept[number]
        descriptor = connection.fileno()
        if descriptor >= 0:
            self._tell(guardian.KEEP, number, last_words, descriptor)

    def _tell(self, what: bytes, number: int, text: bytes = b"", *descriptors: int) -> None:
        if self._socket is None or self._process is None:
            return
        record = guardian.RECORD.pack(what, number, len(text)) + text
        try:
            socket.send_fds(self._socket, [record], descriptors)
        except OSError:
            # It is dead, or stuck; another one will hear of everything.
            with contextlib.suppress(OSError):
                self._process.kill()


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Start the guardian with this socket as its standard input, and nothing else of ours.

    Raises :class:`OSError` or :class:`ValueError`.
    """
    if not sys.executable:
        raise ValueError("no one knows which Python this is")
    # A thread's mask, which its children inherit: nothing can end the guardian in between.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(guardian.__file__).resolve())],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_keeper = _Keeper()
os.register_at_fork(after_in_child=_keeper.forget)
