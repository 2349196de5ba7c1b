"""The log, where nothing may depend on it."""

from __future__ import annotations

import contextlib
import logging
import traceback

__all__ = ["log_safely"]


def log_safely(
    log: logging.Logger, level: int, text: str, *arguments: object, error: bool = False
) -> None:
    """Log a line, with the traceback of the exception in hand if ``error``.

    What a filter raises costs the line and nothing else: it is told on stderr, to where logging
    says what its handlers raise, unless that is gone, too.
    """
    try:
        log.log(level, text, *arguments, exc_info=error, stacklevel=2)
    except Exception:
        with contextlib.suppress(Exception):
            traceback.print_exc()
