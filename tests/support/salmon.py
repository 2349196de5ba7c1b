"""Salmon's global state in a folder of its own, and handlers that do one thing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from salmon import queue
from salmon.mail import MailRequest
from salmon.routing import route, stateless
from salmon.server import SMTPError


class Salmon:
    """Salmon's Router in a folder of its own, and what its handlers got."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handled: list[MailRequest] = []
        self.relayed: list[tuple[str, str, str]] = []
        self.relay: Any = SimpleNamespace(deliver=self._relay)

    def _relay(self, message: Any, To: str, From: str) -> None:
        self.relayed.append((From, To, str(message)))

    def handle(
        self, pattern: str, action: Callable[[MailRequest], object] = lambda message: None
    ) -> None:
        """Route addresses that match ``pattern`` to a handler that records and runs ``action``."""

        def handler(message: MailRequest, **captures: str) -> None:
            self.handled.append(message)
            action(message)

        route(pattern)(stateless(handler))

    def undeliverable(self) -> list[bytes]:
        target = queue.Queue("run/undeliverable")
        return [target.mbox.get_bytes(key) for key in target.keys()]


def fails(code: int, text: str | None = None) -> Any:
    def action(message: MailRequest) -> None:
        raise SMTPError(code, text)

    return action


def explodes(message: MailRequest) -> None:
    raise RuntimeError("handler bug")


def waits_for(event: threading.Event) -> Callable[[MailRequest], None]:
    """A handler that waits for an event, and defers the mail if nothing sets it."""

    def action(message: MailRequest) -> None:
        if not event.wait(60):
            raise SMTPError(451, "what this handler waits for did not happen")

    return action
