"""``attach``: the line in a project's boot module that makes it ours; and what runs from then on.

The server runs on an event loop in a thread of its own, beside Salmon's receiver, which has its
own thread.  Signals end both: SIGHUP (``salmon stop``), SIGTERM and SIGINT (ctrl-c).  Python runs
signal handlers in the main thread, which may be anywhere in Salmon's code; so the handlers do
nothing, and the event loop hears of the signal by the wake-up descriptor.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from salmon_revsmtp.delivery.routes import missing_handlers
from salmon_revsmtp.delivery.sample import sample_warning
from salmon_revsmtp.forks import ours_alone
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.server.collector import GRACE, Collector
from salmon_revsmtp.server.configuration import Configuration, load
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.server.eventloop import run
from salmon_revsmtp.server.project import enable_logging
from salmon_revsmtp.settings import SettingsError
from salmon_revsmtp.threads import apart

__all__ = ["AttachedReceiver", "Told", "attach", "serve_in_foreground"]

log = logging.getLogger(__name__)

# The status of a process that ends because something failed: systemd starts it again.
FAILURE = 1

# Seconds for what is to happen when the process ends.
LAST_WORDS = 5.0

SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)


class Told:
    """What hears how a server is.  Each method returns at once and raises nothing."""

    def started(self, daemon: Daemon) -> None:
        """Everything listens."""

    def stopping(self) -> None:
        """A signal has come."""

    def stopped(self) -> None:
        """It has ended as it should."""


class _Listening(Told):
    """Notes that everything listens, and tells ``other``."""

    def __init__(self, note: Callable[[], None], other: Told | None = None) -> None:
        self._note, self._other = note, other or Told()

    def started(self, daemon: Daemon) -> None:
        self._note()
        self._other.started(daemon)

    def stopping(self) -> None:
        self._other.stopping()


class AttachedReceiver:
    """Stands where Salmon's receiver stood; starts it, and the server beside it.

    ``configuration``  the valid agents and services.
    ``receiver``       Salmon's receiver, or ``None``.
    """

    def __init__(
        self,
        configuration: Configuration,
        plugins: Plugins,
        relay: Callable[[], Any],
        receiver: Any = None,
        grace: float = GRACE,
    ) -> None:
        self._project = Path.cwd()  # a handler may change it
        self.configuration = configuration
        self.receiver = receiver
        self._plugins = plugins
        self._relay = relay
        self._grace = grace
        self._status = 0

    def start(self) -> None:
        """What ``salmon start`` calls, after it has daemonised and dropped its privileges.

        Does not return: the process ends when a signal has stopped the server.  (When Python's main
        thread ends, no other thread can hand work to a thread pool any more.)  Raises
        :class:`OSError` when an address cannot be had.  Whatever else makes the server or Salmon's
        receiver fail ends the process, with a status that is not 0.
        """
        enable_logging()
        listening: Future[None] = Future()
        signals = _heard_signals()
        try:
            threading.Thread(target=self._serve, args=(listening, signals), name="revsmtp").start()
            listening.result()
        except BaseException as error:
            log_safely(log, logging.CRITICAL, "the server cannot start: %s", error)
            raise
        if self.receiver is not None:
            try:
                self._receive()
            except BaseException:
                self._failed("Salmon's receiver failed")
                if signals is None:
                    raise
                signal.raise_signal(signal.SIGTERM)  # what is in hand is finished
        threading.Event().wait()

    def _receive(self) -> None:
        """Start Salmon's receiver, and stay while its thread runs, if it has one."""
        self.receiver.start()
        poller = getattr(self.receiver, "poller", None)
        if isinstance(poller, threading.Thread):
            poller.join()
            raise RuntimeError("its thread has ended")

    def _failed(self, what: str) -> None:
        """Tell of the exception in hand, on stderr and in the log; the status will not be 0."""
        self._status = FAILURE
        log_safely(log, logging.CRITICAL, what, error=True)
        with contextlib.suppress(Exception):
            traceback.print_exc()

    def _serve(self, listening: Future[None], signals: socket.socket | None) -> None:
        stopped_by = None
        try:
            collector = Collector(self.configuration, self._plugins, self._relay, self._project)
            told = _Listening(functools.partial(listening.set_result, None))
            with ours_alone(_salmons_descriptors):
                stopped_by = run(_serve(collector, self._plugins, self._grace, signals, told))
        except BaseException as error:
            if not listening.done():
                listening.set_exception(error)
                return
            self._failed("the server failed")
        # `salmon stop` sends SIGHUP and deletes the PID file itself; it fails when that is gone
        # already, as it would be if python-daemon's exit function ran.
        exit_functions = stopped_by != signal.SIGHUP
        _end_process(self._status, self._project, exit_functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.receiver, name)


def attach(settings: ModuleType, receiver: Any = None) -> AttachedReceiver:
    """Validate ``collection_agents`` and ``smtp_services`` of ``settings`` and wrap a receiver::

        settings.receiver = salmon_revsmtp.attach(settings, LMTPReceiver(...))

    ``attach(settings)`` alone does without one.  Raises
    :class:`~salmon_revsmtp.SettingsError` with every problem that there is.  They are in the log,
    too: `salmon start` has no terminal any more when it imports the boot module.
    """
    enable_logging()
    plugins = Plugins.load()
    try:
        configuration = load(settings, plugins)
    except SettingsError as error:
        for problem in error.problems:
            log_safely(log, logging.CRITICAL, "the server cannot start: %s", problem)
        raise
    return AttachedReceiver(configuration, plugins, lambda: settings.relay, receiver)


def serve_in_foreground(
    configuration: Configuration,
    plugins: Plugins,
    relay: Callable[[], Any],
    project: Path,
    told: Told | None = None,
) -> None:
    """Run the server in the main thread until a signal stops it, and end the process.  Raises
    :class:`OSError` if an address cannot be had; ``told`` has heard nothing then."""
    told = told or Told()
    signals = _heard_signals()
    listening = threading.Event()
    status = 0
    try:
        collector = Collector(configuration, plugins, relay, project)
        run(_serve(collector, plugins, GRACE, signals, _Listening(listening.set, told)))
        told.stopped()
    except BaseException:
        if not listening.is_set():
            raise
        # A thread that a handler holds would keep the process.
        status = FAILURE
        log_safely(log, logging.CRITICAL, "the server failed", error=True)
        with contextlib.suppress(Exception):
            traceback.print_exc()
    _end_process(status, project, exit_functions=True)


async def _serve(
    collector: Collector,
    plugins: Plugins,
    grace: float,
    signals: socket.socket | None,
    told: Told,
) -> int | None:
    """Run the server; returns the number of the signal that stopped it."""
    stopped_by = None
    configuration = collector.configuration
    warnings = [*configuration.warnings, sample_warning(configuration.routed)]
    if missing := missing_handlers():
        warnings.append(
            f"handlers: {', '.join(missing)} could not be imported, the log says why; mail for an "
            "address that no other handler takes is deferred or undeliverable"
        )
    for warning in filter(None, warnings):
        log_safely(log, logging.WARNING, "%s", warning)
    daemon = Daemon(collector, plugins, grace)
    if signals is not None:
        loop = asyncio.get_running_loop()

        def heard() -> None:
            nonlocal stopped_by
            ours = [number for number in signals.recv(16) if number in SIGNALS]
            if ours:  # a handler may have a use for others
                stopped_by = ours[0]
                log.info("stopping on signal %s", stopped_by)
                daemon.stop()
                told.stopping()

        loop.add_reader(signals, heard)
    try:
        await daemon.run(lambda: told.started(daemon))
    finally:
        collector.close()
    return stopped_by


def _heard_signals() -> socket.socket | None:
    """A socket from which the numbers of signals can be read; ``None`` outside the main thread,
    where Python has no signals."""
    if threading.current_thread() is not threading.main_thread():
        return None
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.detach(), warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)
    return reading


def _salmons_descriptors() -> Iterable[int]:
    """What Salmon's receivers have open: a child must not keep their port, either."""
    asyncore = sys.modules.get("salmon._vendor.asyncore")
    return list(asyncore.socket_map) if asyncore is not None else []


def _end_process(status: int, project: Path, exit_functions: bool) -> None:
    """Salmon's own threads run for ever: what is to happen at exit happens here, then it is over.
    It is other people's code, too, and has :data:`LAST_WORDS` seconds.

    A handler that is still running has not been answered 250; the provider keeps its message.
    """

    def end() -> None:
        with contextlib.suppress(Exception):
            os.chdir(project)  # as for python-daemon, which deletes its PID file by its name
        with contextlib.suppress(Exception):
            logging.shutdown()
        if exit_functions:
            with contextlib.suppress(Exception):
                atexit._run_exitfuncs()

    with contextlib.suppress(RuntimeError):
        wait([apart("exit", end)], LAST_WORDS)
    os._exit(status)
