"""The running server as a plugin sees it: what a console, metrics or an alarm live from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Server", "Trouble"]


@dataclass(frozen=True)
class Trouble:
    """Something that needs a person.

    ``key``    which, the same as long as it lasts and each time that it comes back: ``agent:isp``,
               ``account:acme:unseen``, ``disk:run``, ``certificate:provider``, ``undeliverable``.
    ``text``   what it is and what to try, for a person.
    ``since``  since when, in seconds since the epoch; ``None`` if that is not known.
    """

    key: str
    text: str
    since: float | None = None


class Server:
    """The server that runs, in the hooks ``server_started`` and ``server_stopping``.

    Its methods may be called from any thread of a plugin, as long as the server runs; they block,
    and raise :class:`RuntimeError` when it has stopped.

    ``settings``  the project's settings module, in which a plugin finds its own.
    ``project``   the project's folder.
    ``version``   of salmon-revsmtp.
    ``started``   when the server started, in seconds since the epoch.
    """

    def __init__(
        self,
        settings: ModuleType,
        project: Path,
        version: str,
        started: float,
        *,
        look: Callable[[], tuple[Sequence[dict[str, Any]], Sequence[Trouble]]],
        send: Callable[[str, bytes], None],
        register: Callable[[object], object] = lambda plugin: None,
        answers: Callable[[float], bool] = lambda seconds: True,
    ) -> None:
        self.settings, self.project = settings, project
        self.version, self.started = version, started
        self._look, self._send = look, send
        self._register, self._answers = register, answers

    def status(self) -> list[dict[str, Any]]:
        """What ``salmon-revsmtp status --json`` prints, a dict for each line."""
        return list(self._look()[0])

    def troubles(self) -> list[Trouble]:
        """What needs a person now, the worst first."""
        return list(self._look()[1])

    def answers(self, seconds: float) -> bool:
        """Whether the event loop, which does all the server's work, answers in so many seconds."""
        return self._answers(seconds)

    def register(self, plugin: object) -> None:
        """Have the hooks of ``plugin`` called from now on, until the server stops: its methods that
        are marked with :data:`~salmon_revsmtp.hookimpl`.  A plugin that is only at work where the
        settings say so has its ``message_delivered`` and the like here, so that no message pays for
        them elsewhere."""
        self._register(plugin)

    def send(self, message: EmailMessage, to: str) -> None:
        """Send a message through the project's relay, from the null sender, so that what becomes of
        it comes back to no one.  It is safe on disk when this returns, and waits there while the
        relay is down.  Say ``Auto-Submitted: auto-generated`` in it (RFC 3834).  Raises
        :class:`OSError` if it cannot be written."""
        self._send(to, message.as_bytes())
