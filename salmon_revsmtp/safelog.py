"""The log, where nothing may depend on it, and no stranger's words do harm or fill it."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import traceback
from types import FrameType

from salmon_revsmtp.foreign import printable, printable_lines, shortened

__all__ = ["LogBudget", "log_safely"]

# Characters of one value in a line, of a line, and of a traceback: an address that has 4 KiB, or an
# exception that quotes a message, does not fill the log.
VALUE = 400
LINE = 4000
TRACEBACK = 20_000

# What a session, or all sessions of a listening service together, may write at once, in characters:
# the lines of about 20,000 messages.  And what is added a second: about 80 lines, or 1.4 GB a day.
BURST = 4 * 1024 * 1024
REFILL = 16 * 1024
# When lines have been left out, seconds until as much has been added that lines go on.
RESUME = 10.0
# What a line costs beside its text: the logger's name, the time, the level.
FRAME = 60
# What the line costs that tells how many were left out.
SUMMARY = 150


def log_safely(
    log: logging.Logger, level: int, text: str, *arguments: object, error: bool = False
) -> None:
    """Log a line, with the traceback of the exception in hand if ``error``; what strangers wrote in
    either is harmless, and no longer than a person reads.

    What a filter raises costs the line and nothing else: it is told on stderr, to where logging
    says what its handlers raise, unless that is gone, too.
    """
    try:
        if log.isEnabledFor(level):
            _write(log, level, _line(text, arguments), sys._getframe(1), error)
    except Exception:
        with contextlib.suppress(Exception):
            traceback.print_exc()


class LogBudget:
    """What a peer can make us log.  Lines beyond it are counted, and one line tells their number as
    soon as there is room.  Safe to use from several threads."""

    def __init__(self, burst: float = BURST, refill: float = REFILL) -> None:
        self._burst, self._refill = burst, refill
        self._left, self._at = burst, time.monotonic()
        self._skipped = 0
        self._lock = threading.Lock()

    def log(self, log: logging.Logger, level: int, text: str, *arguments: object) -> None:
        """As :func:`log_safely`, while there is room."""
        try:
            if not log.isEnabledFor(level):
                return
            line = _line(text, arguments)
            with self._lock:
                skipped = self._take(len(line) + FRAME)
            if skipped is not None:
                self._tell(log, skipped, sys._getframe(1))
                _write(log, level, line, sys._getframe(1))
        except Exception:
            with contextlib.suppress(Exception):
                traceback.print_exc()

    def take(self, characters: int) -> bool:
        """Whether there is room for so many."""
        with self._lock:
            return self._take(characters) is not None

    def settle(self, log: logging.Logger) -> None:
        """Tell of the lines that were left out, if there is room; who shares this may go on."""
        with self._lock:
            skipped, left = self._skipped, self._room()
            if skipped and left >= SUMMARY:
                self._left, self._skipped = left - SUMMARY, 0
            else:
                skipped = 0
        if skipped:
            with contextlib.suppress(Exception):
                self._tell(log, skipped, sys._getframe(1))

    def close(self, log: logging.Logger) -> None:
        """Tell of the lines that were left out; no more are to come."""
        with self._lock:
            skipped, self._skipped = self._skipped, 0
        with contextlib.suppress(Exception):
            self._tell(log, skipped, sys._getframe(1))

    def _take(self, cost: int) -> int | None:
        """How many lines were left out before this one; ``None`` if it is left out, too."""
        # After one that was left out some wait, so that many go on together.
        least = max(cost, min(self._burst / 2, RESUME * self._refill)) if self._skipped else cost
        if self._left < least and self._room() < least:
            self._skipped += 1
            return None
        self._left -= cost
        skipped, self._skipped = self._skipped, 0
        return skipped

    def _room(self) -> float:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._refill)
        self._at = now
        return self._left

    @staticmethod
    def _tell(log: logging.Logger, skipped: int, frame: FrameType) -> None:
        if skipped:
            text = f"and {skipped} more lines, which are left out: too much was to be logged"
            _write(log, logging.WARNING, text, frame)


def _line(text: str, arguments: tuple[object, ...]) -> str:
    line = text % arguments if arguments else text
    if len(line) > VALUE:
        short = [shortened(one, VALUE) if isinstance(one, str) else one for one in arguments]
        line = shortened(text % tuple(short) if short else text, LINE)
    return printable(line)


def _write(
    log: logging.Logger, level: int, line: str, caller: FrameType, error: bool = False
) -> None:
    code, number = caller.f_code, caller.f_lineno
    raised = sys.exc_info() if error else None
    record = log.makeRecord(
        log.name, level, code.co_filename, number, line, (), raised, code.co_name
    )
    if error:
        record.exc_text = _traceback()
    log.handle(record)


def _traceback() -> str:
    """That of the exception in hand; of too many in a short time its last line, for whoever sends
    what a handler raises on may send it again and again."""
    text = shortened(printable_lines(traceback.format_exc().rstrip("\n")), TRACEBACK)
    if _tracebacks.take(len(text)):
        return text
    return shortened(text.rpartition("\n")[2], VALUE) + " (the traceback is left out: too many)"


# Of the whole process.
_tracebacks = LogBudget(BURST / 4)
