"""Notifications on their way to the relay: on disk first, sent from there, deleted then.

So a sender is told although the relay is down, and 250 does not wait for the relay.  A crash
between sent and deleted sends one twice, and loses none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import smtplib
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any

from salmon_revsmtp.delivery.maildir import by_age, open_queue, push_safely
from salmon_revsmtp.delivery.relay import address_of, why
from salmon_revsmtp.delivery.router import undeliverable_queue
from salmon_revsmtp.delivery.trace import LONGEST_REASON, envelope_lines, split_envelope
from salmon_revsmtp.delivery.waiting import NOTIFICATION_MARK, WaitingMail
from salmon_revsmtp.files import FolderLock, write_private
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.safelog import log_safely

__all__ = ["GIVEN_UP", "UNSENT", "Outbox"]

UNSENT = Path("run/unsent")

# RFC 5321 4.5.4.1: the give-up time is generally at least four or five days.
GIVE_UP = 5 * 86400.0

# Seconds between two rounds that count as time in which a notification has waited.  Where the clock
# shows more, it was set, or nothing ran: neither is a reason to give up.
LONGEST_WAIT = 86400.0

#: What the reason begins with why a notification is undeliverable.
GIVEN_UP = "a notification that the relay did not take"

# It is the relay, and not this notification.
_DOWN = (
    smtplib.SMTPServerDisconnected,
    smtplib.SMTPConnectError,
    smtplib.SMTPHeloError,
    smtplib.SMTPAuthenticationError,
)

log = logging.getLogger(__name__)


class Outbox:
    """The Salmon Queue in which notifications wait.

    ``relay``  asked for Salmon's relay when one is needed: ``settings.relay`` may be set late.
    """

    def __init__(self, relay: Callable[[], Any], folder: Path = UNSENT) -> None:
        self._relay = relay
        self._folder = folder.absolute()
        self._down = False
        self._sent: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._again = False

    def put(self, to: str, message: bytes) -> None:
        """Take a notification; it is safe on disk when this returns.  Raises :class:`OSError`."""
        push_safely(open_queue(self._folder), envelope_lines("", to), message)

    def send_soon(self) -> None:
        """:meth:`send` in a thread, which does not keep the process: a relay may take its time, or
        never say a word."""
        with self._lock:
            self._again = True
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="notifications", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the machine has no thread to spare
                    log.error("queue=%s notifications wait for now: %s", self._folder, error)
                    return
                self._thread = thread

    def _work(self) -> None:
        try:
            while self._asked_again():
                self.send()
        except BaseException:
            with self._lock:
                self._thread = None
            raise

    def _asked_again(self) -> bool:
        """Whether :meth:`send_soon` was called since this was asked last; if not, the thread is
        over, and the next call starts another."""
        with self._lock:
            again, self._again = self._again, False
            if not again:
                self._thread = None
            return again

    def wait(self, seconds: float) -> None:
        """Wait until what :meth:`send_soon` has begun is done, but no longer than that."""
        if thread := self._thread:
            thread.join(seconds)

    def send(self) -> None:
        """Send all that wait, oldest first, until the relay cannot be reached.  Blocks; never
        raises.  Two processes never send at once."""
        try:
            if not self._folder.is_dir():
                return
            with FolderLock(self._folder).hold() as lock:
                if lock.had:
                    self._send_all(open_queue(self._folder))
        except Exception as error:
            log.error("queue=%s notifications cannot be sent: %s", self._folder, error)

    def send_now(self, keys: Sequence[str]) -> Iterator[tuple[str, bool, str]]:
        """Send these, because a person says so; yields of each its key, whether it was sent, and
        why not.  Blocks.  Raises :class:`OSError`."""
        if not self._folder.is_dir():
            yield from ((key, False, "it is not there") for key in keys)
            return
        waiting = open_queue(self._folder)
        self._check_writable(keys)
        for key in keys:
            # For each anew: who reads the answers may stop reading, and is not waited for.
            with FolderLock(self._folder).hold() as lock:
                busy = "they are being sent just now, by the server or another command"
                remark = self._send_one_now(waiting, key) if lock.had else busy
            yield key, not remark, remark

    def _send_one_now(self, waiting: Any, key: str) -> str:
        """Why one was not sent; empty if it was."""
        if WaitingMail(self._folder).path(key) is None:
            return "it is not there any more"
        reasons, self._reasons = self.reasons(), {}
        self._send(waiting, key)
        reasons.pop(key, None)
        reasons.update(self._reasons)
        self._keep_reasons(reasons)
        return self._reasons.get(key, "")

    def reasons(self) -> dict[str, str]:
        """Why notifications wait, by their keys, as far as they have been tried.  Never raises."""
        try:
            found = json.loads((self._folder / "tried").read_text() or "{}")
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _keep_reasons(self, reasons: Mapping[str, str]) -> None:
        """In the file whose time is that of the last round."""
        tried = self._folder / "tried"
        with contextlib.suppress(OSError):
            before = tried.stat() if tried.exists() else None
            write_private(tried, json.dumps(dict(reasons)).encode())
            if before is not None:
                os.utime(tried, ns=(before.st_mtime_ns, before.st_mtime_ns))

    def _check_writable(self, keys: Sequence[str]) -> None:
        if keys and not os.access(self._folder / "new", os.W_OK):
            # What was sent could not be deleted, and would be sent again.
            raise PermissionError(f"{len(keys)} wait, and the folder cannot be written")

    def _send_all(self, waiting: Any) -> None:
        keys = by_age(waiting.keys())
        self._check_writable(keys)
        if not keys:
            return
        self._mend_ages(keys)
        self._reasons = {}
        for number, key in enumerate(keys):
            if not self._send(waiting, key):
                # What is said of this one is so for those that follow.
                said = self._reasons.get(key, "")
                self._reasons.update(dict.fromkeys(keys[number:], said))
                break
        self._keep_reasons(self._reasons)

    def _send(self, waiting: Any, key: str) -> bool:
        """One of them; ``False`` when the relay takes none just now."""
        try:
            stored = waiting.mbox.get_bytes(key)
        except (KeyError, FileNotFoundError):
            return True  # someone has deleted it
        _, to, message = split_envelope(stored)
        try:
            if key not in self._sent:
                # The header only: what follows is sent as it is, and no part of it, which a
                # stranger may have written, is parsed.
                parsed = BytesHeaderParser().parsebytes(message)
                self._relay().deliver(parsed, To=to, From="<>")
        except Exception as error:
            if _came_after(error):
                self._say(logging.INFO, to, "the relay broke off after the notification")
            elif _for_good(error) or self._age(key) > GIVE_UP:
                self._say(
                    logging.ERROR, to, f"the notification cannot be sent, given up: {why(error)}"
                )
                # Its name says what it is: whatever it says itself, a stranger may say, too.
                undeliverable_queue().keep_stored(
                    stored, f"{GIVEN_UP}: {why(error)}", NOTIFICATION_MARK
                )
                _remove(waiting, key)
                self._reasons[key] = "the relay refuses it for good; it is undeliverable now"
                return True
            else:
                self._reasons[key] = f"{type(error).__name__}: {error}"[:LONGEST_REASON]
                return self._defer(to, error)
        self._down = False
        self._sent.add(key)
        _remove(waiting, key)
        self._sent.discard(key)
        self._say(logging.INFO, to, "the notification was sent")
        return True

    def _defer(self, to: str | None, error: Exception) -> bool:
        """Whether the next may be tried: what was said of this one may be otherwise for that."""
        down = isinstance(error, _DOWN) or not isinstance(error, smtplib.SMTPException)
        if not (down and self._down):
            reason = f"asking the relay{self._where()}: {why(error)}; it waits in {self._folder}"
            self._say(logging.WARNING, to, f"the notification was not sent: {reason}")
        self._down = down
        return not down

    def _where(self) -> str:
        with contextlib.suppress(Exception):  # there is none in the settings
            return f" {address_of(self._relay())}"
        return ""

    def _mend_ages(self, keys: Sequence[str]) -> None:
        """Take out of the ages, which are by the files' times, what is more than the longest wait
        since the last round: its time is that of the file ``tried``."""
        tried, now = self._folder / "tried", time.time()
        with contextlib.suppress(FileNotFoundError):
            jump = now - tried.stat().st_mtime - LONGEST_WAIT
            for key in keys:
                file = self._folder / "new" / key
                with contextlib.suppress(OSError):
                    put = file.stat().st_mtime
                    mended = min(put + max(jump, 0.0), now)
                    if mended != put:
                        os.utime(file, (mended, mended))
        tried.unlink(missing_ok=True)  # it may be another user's
        tried.touch()
        os.utime(tried, (now, now))

    def _say(self, level: int, to: str | None, what: str) -> None:
        log_safely(log, level, "to=%s %s", angle(to), what)

    def _age(self, key: str) -> float:
        with contextlib.suppress(OSError):
            return time.time() - (self._folder / "new" / key).stat().st_mtime
        return 0.0


def _remove(waiting: Any, key: str) -> None:
    """Delete one, unless someone has.  Raises :class:`OSError`."""
    with contextlib.suppress(KeyError, FileNotFoundError):
        waiting.remove(key)


def _came_after(error: Exception) -> bool:
    """The relay had taken the notification, and broke off when Salmon's Relay said QUIT."""
    goodbye = smtplib.SMTP.quit.__code__
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code is goodbye for frame, _ in frames)


def _for_good(error: Exception) -> bool:
    """The relay said 5yz to this notification, or cannot be told of such an address."""
    if isinstance(error, UnicodeError | smtplib.SMTPNotSupportedError | IndexError):
        return True
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return all(code >= 500 for code, _ in error.recipients.values())
    # A 5yz to EHLO or AUTH is about us, and may be mended.
    if isinstance(error, _DOWN):
        return False
    return isinstance(error, smtplib.SMTPResponseException) and error.smtp_code >= 500
