"""Queue mode: a message is safe in a Salmon Queue before its 250, and handled later.

Salmon's Queue keeps the message and forgets the envelope, so the envelope stands on top of it as
``Return-Path:`` and ``Delivered-To:``.  :class:`QueueConsumer` routes by these.  It is what
Salmon's QueueReceiver is not: it deletes a message after it has been handled, not before.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salmon import queue

from salmon_revsmtp.delivery.bounce import Bouncer
from salmon_revsmtp.delivery.router import RouterDelivery, disk_reply, push_safely
from salmon_revsmtp.delivery.trace import split_envelope, with_envelope
from salmon_revsmtp.service import Service
from salmon_revsmtp.settings import ServiceSettings
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["QueueConsumer", "QueueDelivery"]

log = logging.getLogger(__name__)


class QueueDelivery:
    """Into a Salmon Queue: handlers run in another thread or process, later."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._queue: Any = None

    def deliver(
        self, peer: tuple[str, int], envelope: Envelope, recipient: str, content: bytes
    ) -> Reply:
        """Store a message (bytes, LF line ends) for one recipient, synced to disk."""
        stored = with_envelope(envelope.reverse_path, recipient, content) + b"\n"
        try:
            if self._queue is None:
                Path(self._folder).parent.mkdir(parents=True, exist_ok=True)
                self._queue = queue.Queue(self._folder)
            key = push_safely(self._queue, stored)
        except OSError as error:
            log.error("queue=%s recipient=%s not stored: %s", self._folder, recipient, error)
            return disk_reply(error)
        return Reply(250, f"queued as {key}", "2.6.0")


def _settings_relay() -> Any:
    """The relay of the project that Salmon has loaded."""
    from salmon import utils

    return utils.settings.relay


def _age(key: str) -> list[int]:
    """Sorts Maildir keys (``seconds.MmicrosecondsPpidQnumber.host``) oldest first."""
    return [int(number) for number in re.findall(r"\d+", key)[:4]]


class QueueConsumer:
    """Takes messages from the queue of queue mode through the handlers, one after another.

    It has ``start`` as Salmon's receivers have, so ``settings.receiver = QueueConsumer()`` in a
    boot module makes a process of it.

    ``folder``: the queue, as in the service's settings.

    ``sleep``: seconds to wait when it is empty, and before a message that a handler put off
    (``SMTPError`` 4yz) is tried again.

    ``service``: whose host name notifications bear; this machine's if there is none.

    ``relay``: asked for the relay when a notification goes out; that of the settings by default.
    """

    def __init__(
        self,
        folder: str = "run/inbound",
        sleep: float = 10,
        service: Service | None = None,
        relay: Callable[[], Any] = _settings_relay,
    ) -> None:
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        self.queue = queue.Queue(folder)
        self._folder = folder
        self._sleep = sleep
        self._delivery = RouterDelivery()
        self._bouncer = Bouncer(service or Service("queue", ServiceSettings()), relay)
        self._stopped = threading.Event()

    def start(self, one_shot: bool = False) -> None:
        """Handle what is there, for ever, or once if ``one_shot``."""
        while not self._stopped.is_set():
            for key in sorted(self.queue.keys(), key=_age):
                self.handle(key)
            if one_shot:
                return
            self._stopped.wait(self._sleep)

    def stop(self) -> None:
        """End :meth:`start` after the message in hand."""
        self._stopped.set()

    def handle(self, key: str) -> Reply | None:
        """Handle one message and delete it then.  ``None`` if another has taken it.

        A handler's 4yz leaves it in the queue; its 5yz becomes a notification to the sender; what
        no handler takes, and what a handler raises on, is in the undeliverable queue.
        """
        try:
            stored = self.queue.mbox.get_bytes(key)
        except (KeyError, FileNotFoundError):
            return None
        reverse_path, recipient, content = split_envelope(stored)
        envelope = Envelope(reverse_path or "", (recipient or "",))
        content = content.removesuffix(b"\n")
        reply = self._delivery.deliver((self._folder, 0), envelope, recipient or "", content)
        if reply.permanent:
            reply = self._bouncer.bounce(envelope, {recipient or "": reply}, content) or reply
        if reply.transient:
            log.info("queue=%s key=%s put off: %s", self._folder, key, reply)
        else:
            self.queue.remove(key)
        return reply
