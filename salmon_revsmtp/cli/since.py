"""What a person may write for a time that has passed: how long ago, or when."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

__all__ = ["Since"]

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(?:\d+[smhdw])+")
_PART = re.compile(r"(\d+)([smhdw])")
_CLOCK = re.compile(r"\d?\d:\d\d(?::\d\d)?")

# Characters: int() takes its time for very many digits, and no time that anyone means is longer.
LONGEST = 40


if TYPE_CHECKING:
    _Type = click.ParamType[float]
else:
    _Type = click.ParamType  # which takes no argument before click 8.4


class Since(_Type):
    """``2d``, ``3h``, ``1d12h``, ``2026-11-25``, ``2026-11-25 14:30``, ``14:30`` (today): seconds
    since the epoch.  A time without a zone is local."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        try:
            at = _seconds(str(value).strip()[:LONGEST])
        except (ValueError, OverflowError, OSError):
            self.fail(
                f"{value!r} is neither how long ago, such as 2d, 3h or 30m, nor a date or time, "
                "such as 2026-11-25, '2026-11-25 14:30' or 14:30",
                *(param, ctx),
            )
        if at > time.time():
            self.fail(f"{value!r} is in the future", param, ctx)
        return at


def _seconds(text: str) -> float:
    """Raises :class:`ValueError`, :class:`OverflowError` or :class:`OSError`."""
    if _DURATION.fullmatch(text):
        return time.time() - sum(int(n) * SECONDS[unit] for n, unit in _PART.findall(text))
    if _CLOCK.fullmatch(text):
        hours, minutes, *seconds = map(int, text.split(":"))
        today = datetime.now().replace(hour=hours, minute=minutes, microsecond=0)
        return today.replace(second=seconds[0] if seconds else 0).timestamp()
    return datetime.fromisoformat(text).timestamp()
