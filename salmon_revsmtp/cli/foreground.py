"""What ``run`` says: that it listens and will collect, and that it ends.  All of it on standard
error, where its log lines go too, so that they are in order; in a journal the same plain lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from salmon_revsmtp.cli.output import GOOD, WAITS, Toned, shown
from salmon_revsmtp.server.attach import Told
from salmon_revsmtp.server.collector import GRACE
from salmon_revsmtp.server.daemon import Daemon, Planned

__all__ = ["Foreground"]


class Foreground(Told):
    """Tells a person how a server is.  Who does not read it keeps nothing from running."""

    def __init__(self, project: Path) -> None:
        self._project = project
        self._gone = False

    def started(self, daemon: Daemon) -> None:
        self._say(Toned("running", GOOD), f" in {self._project}")
        for line in _what_it_does(daemon):
            self._say(line)
        for line in self._log_files():
            self._say(line)
        if sys.stderr is not None and sys.stderr.isatty():
            self._say("ctrl-c ends it, after the message in hand")

    def stopping(self) -> None:
        self._say(
            Toned("stopping", WAITS), f": what is in hand has {GRACE:g} seconds to be finished"
        )

    def stopped(self) -> None:
        self._say(Toned("stopped", GOOD))

    def _log_files(self) -> Iterator[str]:
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        handlers = [one for logger in loggers for one in getattr(logger, "handlers", ())]
        files = [Path(one.baseFilename) for one in handlers if isinstance(one, logging.FileHandler)]
        for file in dict.fromkeys(files):
            inside = file.is_relative_to(self._project)
            yield f"logging to {file.relative_to(self._project) if inside else file}"

    def _say(self, *parts: str) -> None:
        if self._gone or sys.stderr is None:
            return
        try:
            print(*(shown(one, sys.stderr) for one in parts), sep="", file=sys.stderr, flush=True)
        except (OSError, ValueError):
            self._gone = True


def _what_it_does(daemon: Daemon) -> Iterator[str]:
    for one in daemon.listeners:
        yield f"listening on {one.address} for the service {one.name.removeprefix('service=')}"
    if daemon.provider is not None:
        for one in daemon.provider.listeners:
            how = ", TLS from the start" if one.tls_from_the_start else ""
            yield f"listening on {one.address} for customers{how}"
    plan = daemon.plan()
    for planned in plan:
        yield _agent_line(planned)
    if not (plan or daemon.listeners or daemon.provider):
        yield "there is nothing to do: the settings have no agent, and no service that listens"


def _agent_line(planned: Planned) -> str:
    agent, every = planned.agent, planned.agent.settings.every
    which = f"{agent.name} ({', '.join(word for word in (agent.protocol, agent.address) if word)})"
    if not planned.enabled:
        return f"not collecting from {which}: it is disabled"
    if every is None or planned.seconds is None:
        return f"collecting from {which} only when you ask for it"
    often = "every minute" if every == 1 else f"every {every:g} minutes"
    return f"collecting from {which} {often}, first in {max(1.0, planned.seconds):.0f} s"
