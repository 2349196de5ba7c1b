"""The log, where nothing may depend on it, and no stranger's words do harm."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback

from salmon_revsmtp.foreign import printable, printable_lines

__all__ = ["log_safely"]


def log_safely(
    log: logging.Logger, level: int, text: str, *arguments: object, error: bool = False
) -> None:
    """Log a line, with the traceback of the exception in hand if ``error``; what strangers wrote in
    either is harmless.

    What a filter raises costs the line and nothing else: it is told on stderr, to where logging
    says what its handlers raise, unless that is gone, too.
    """
    try:
        if not log.isEnabledFor(level):
            return
        line = printable(text % arguments if arguments else text)
        caller = sys._getframe(1)
        where = (caller.f_code.co_filename, caller.f_lineno)
        raised = sys.exc_info() if error else None
        name = caller.f_code.co_name
        record = log.makeRecord(log.name, level, *where, line, (), raised, name)
        if error:
            record.exc_text = printable_lines(traceback.format_exc().rstrip("\n"))
        log.handle(record)
    except Exception:
        with contextlib.suppress(Exception):
            traceback.print_exc()
