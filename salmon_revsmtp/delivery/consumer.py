"""Queue mode: a message is safe in a Salmon Queue before its 250, and handled later.

Salmon's Queue keeps the message and forgets the envelope, so the envelope stands on top of it as
``Return-Path:`` and ``Delivered-To:``.  :class:`QueueConsumer` routes by these.  It is what
Salmon's QueueReceiver is not: it deletes a message after it has been handled, not before.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from salmon_revsmtp.delivery.handlerthread import HandlerThread
from salmon_revsmtp.delivery.maildir import by_age, disk_reply, move_across, open_queue
from salmon_revsmtp.delivery.notifier import Notifier
from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.rates import RateLimit
from salmon_revsmtp.delivery.reporter import Reporter
from salmon_revsmtp.delivery.router import BUG, DEFAULT_UNDELIVERABLE, Handling, undeliverable_queue
from salmon_revsmtp.delivery.trace import unpack
from salmon_revsmtp.files import FolderLock
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.hostname import machine_name
from salmon_revsmtp.journal.attempts import Attempts
from salmon_revsmtp.journal.connection import JournalConnection
from salmon_revsmtp.journal.counts import CountJournal
from salmon_revsmtp.journal.deliveries import DeliveryJournal, MessageKey
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["HANDLER_TIMEOUT", "QueueConsumer"]

# Seconds.  No one waits for an answer any more, so this is for handlers that will never return.
HANDLER_TIMEOUT = 3600.0

# Each handler that hangs has a thread and a message.  With so many, something else is broken.
MOST_HANGING = 10

# A message whose handling was begun this often and never ended is not tried again.
CRASHES = 3

# Seconds that a single run waits at its end for the relay to take notifications.
RELAY_PATIENCE = 60.0

SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


def _settings_relay() -> Any:
    """The relay of the project that Salmon has loaded."""
    from salmon import utils

    return utils.settings.relay


class QueueConsumer:
    """Takes messages from the queue of queue mode through the handlers, one after another.

    It has ``start`` as Salmon's receivers have, so ``settings.receiver = QueueConsumer()`` in a
    boot module makes a process of it.

    ``folder``: the queue, as in the service's settings.

    ``sleep``: seconds to wait when it is empty, and before a message that a handler deferred
    (``SMTPError`` 4yz) is tried again.

    ``hostname``: our name in notifications; this machine's if there is none.

    ``relay``: asked for the relay when a notification goes out; that of the settings by default.

    ``notifications``: tell the sender of what a handler refuses.  ``False``: it is kept in the
    undeliverable queue instead.

    ``handler_timeout``: seconds for one message.  If its handlers take longer, it is kept in the
    undeliverable queue and deleted from this one, and the next message has its turn, in a new
    thread.  The old one goes on; Python has no way to end it.

    Raises :class:`ValueError` for a ``handler_timeout`` that is not above 0.
    """

    def __init__(
        self,
        folder: str = "run/inbound",
        sleep: float = 10,
        hostname: str | None = None,
        relay: Callable[[], Any] = _settings_relay,
        notifications: bool = True,
        handler_timeout: float = HANDLER_TIMEOUT,
    ) -> None:
        if not 0 < handler_timeout <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"handler_timeout: found {handler_timeout!r}, allowed: seconds above 0"
            )
        self._handler_timeout = handler_timeout
        self.queue = open_queue(folder)
        self._folder = folder
        self._place = Path(self.queue.mbox._path)
        # However it is spelled, it is the same for the journal, which is in this project's folder.
        name = os.path.relpath(os.path.realpath(self._place), os.path.realpath(os.curdir))
        self._name = name
        self._sleep = sleep
        self._thread = HandlerThread()
        # A handler may change the folder of the process.
        self._undeliverable = Path(DEFAULT_UNDELIVERABLE).absolute()
        # Those that took too long and could not be kept anywhere else yet.
        self._unkept: dict[str, Handling] = {}
        connection = JournalConnection()
        self._journal = DeliveryJournal(connection)
        self._attempts = Attempts(connection, name)
        self._outbox = Outbox(relay)
        rates = RateLimit(CountJournal(connection))
        reporter = Reporter(lambda: hostname or machine_name(), rates, enabled=notifications)
        self._notifier = Notifier(reporter, self._outbox)
        self._stopped = threading.Event()
        self._stuck = False  # the last message that should have been deleted could not be

    def start(self, one_shot: bool = False) -> None:
        """Handle what is there, for ever, or once if ``one_shot``.

        A signal (SIGHUP of ``salmon stop``, SIGTERM, SIGINT) ends it after the message in hand, for
        which it waits no longer than ``handler_timeout``.
        Raises :class:`RuntimeError` when another consumer works on the same queue, by whatever name
        it calls it, when the folder is replaced by another, and when ten handlers hang.
        """
        with FolderLock(self._place).hold() as lock, self._signals():
            if not lock.had:
                raise RuntimeError(f"another consumer works on {self._folder}")
            try:
                while self._round(lock):
                    self._outbox.send_soon()
                    if one_shot or self._stopped.wait(self._sleep):
                        self._outbox.wait(RELAY_PATIENCE if one_shot else 0)
                        return
            finally:
                self._thread.end()

    def _round(self, lock: FolderLock) -> bool:
        """Handle what is there; ``False`` when it is to stop."""
        for key in by_age(self.queue.keys()):
            if self._stopped.is_set():
                return False
            if not lock.holds():
                raise RuntimeError(
                    f"the queue {self._folder} was deleted or replaced while its consumer was at "
                    "work; start the consumer again"
                )
            if self._thread.hanging >= MOST_HANGING:
                raise RuntimeError(
                    f"{MOST_HANGING} handlers have not returned in {self._handler_timeout:g} "
                    "seconds each; see what they wait for, and start the consumer again"
                )
            self.handle(key)
        return True

    def stop(self) -> None:
        """End :meth:`start` after the message in hand."""
        self._stopped.set()

    def handle(self, key: str) -> Reply | None:
        """Handle one message and delete it then.  ``None`` if another has taken it.

        What could not be deleted in the end is not begun: it stays, and the log says why.

        The order is: begun, handled, recorded, deleted.  After a crash between the last three it is
        not handled again; a message that was begun three times, and the process died each time, is
        set aside in the undeliverable queue.

        A handler's 4yz leaves it in the queue; its 5yz becomes a notification to the sender; what
        no handler takes, what a handler raises on, and what takes longer than ``handler_timeout``
        is in the undeliverable queue.
        """
        try:
            move_across(self.queue, key)
        except (KeyError, FileNotFoundError):
            return None
        except OSError as error:
            return self._stays(key, error)
        try:
            stored = self.queue.mbox.get_bytes(key)
        except (KeyError, FileNotFoundError):
            return None
        except OSError as error:
            log.error("queue=%s key=%s cannot be read: %s", self._folder, key, error)
            return disk_reply(error)
        envelope, content = unpack(stored)
        [recipient] = envelope.recipients
        # By its key: two files with the same octets are two messages.
        message = MessageKey.of(f"queue {self._name} {key}", envelope.reverse_path, stored)
        known = self._journal.known(message, (recipient,)).get(recipient)
        if known is not None:
            reply = known.reply
        elif key not in self._unkept and self._attempts.begin(key) > CRASHES:
            reply = self._set_aside(key, stored)
            if reply.transient:
                return reply  # and its crashes are not forgotten
        else:
            reply = self._handle(key, envelope, content.removesuffix(b"\n"))
            if key in self._unkept:
                return reply  # the handler still runs: the message is not taken for a new one
            self._journal.record(message, recipient, reply)
        if reply.transient:
            log_safely(log, logging.INFO, "queue=%s key=%s deferred: %s", self._folder, key, reply)
        else:
            try:
                with suppress(KeyError, FileNotFoundError):  # it was taken away meanwhile
                    self.queue.remove(key)
                self._stuck = False
            except OSError as error:  # it is recorded, and is not handled again
                self._stays(key, error)
        self._attempts.end(key)
        return reply

    def _stays(self, key: str, error: OSError) -> Reply:
        """A message that cannot be deleted; one line tells of all that follow."""
        if not self._stuck:
            log.error(
                "queue=%s key=%s cannot be deleted, and what cannot be deleted is not handled: %s; "
                "make the folders new and cur writable for this process",
                *(self._folder, key, error),
            )
        self._stuck = True
        return disk_reply(error)

    def _handle(self, key: str, envelope: Envelope, content: bytes) -> Reply:
        reply = self._handled(key, envelope, content)
        if reply.permanent:
            [recipient] = envelope.recipients
            log_safely(
                log,
                logging.WARNING,
                "queue=%s from=%s to=%s reply=%r",
                *(self._folder, angle(envelope.reverse_path), angle(recipient), str(reply)),
            )
            return self._notifier.notify(envelope, {recipient: reply}, content) or reply
        return reply

    def _handled(self, key: str, envelope: Envelope, content: bytes) -> Reply:
        """What the handlers say, or what became of the message when they took too long."""
        handling = self._unkept.pop(key, None)
        if handling is None:
            [recipient] = envelope.recipients
            peer = envelope.peer or (self._folder, 0)
            handling = Handling(peer, envelope, recipient, content, self._undeliverable)
            try:
                if self._thread.run(handling, self._handler_timeout):
                    return handling.reply or BUG
            except RuntimeError as error:
                log.error("queue=%s key=%s not handled now: %s", self._folder, key, error)
                return BUG
        late = f"not handled in {self._handler_timeout:g} seconds; the handler still runs"
        reply = handling.give_up(late)
        if reply.transient and handling.reply is None:
            self._unkept[key] = handling
        return reply

    def _set_aside(self, key: str, stored: bytes) -> Reply:
        try:
            reason = f"the process died {CRASHES} times while a handler had it"
            kept = undeliverable_queue(self._undeliverable).keep_stored(stored, reason)
        except OSError as error:
            log.error("queue=%s key=%s cannot be set aside: %s", self._folder, key, error)
            return disk_reply(error)
        log.error(
            "queue=%s key=%s the process died %d times while handling it; set aside in the "
            "undeliverable queue with key %s",
            *(self._folder, key, CRASHES, kept),
        )
        return Reply(250, "set aside", "2.0.0")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While this lasts, a signal is a :meth:`stop`; the second one is what it always was."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            log.info("stopping on signal %s", number)
            signal.signal(number, before[signal.Signals(number)])
            self.stop()

        before = {number: signal.signal(number, stop) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
