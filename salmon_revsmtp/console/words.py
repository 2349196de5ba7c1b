"""How the pages say numbers and times."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

__all__ = [
    "account",
    "clock",
    "clock_of",
    "count",
    "day",
    "iso",
    "minutes",
    "moment",
    "octets",
    "part",
    "seconds",
    "value",
]

# A moment before or after now that is said without its date.
TODAY = 20 * 3600.0


def count(number: int | None) -> str:
    """``1,234``; ``?`` where another host knows."""
    return "?" if number is None else f"{number:,}"


def octets(number: int) -> str:
    """``419 B``, ``21.5 kB``, ``3.2 MB``."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def seconds(number: float) -> str:
    """``0.02 s``, ``4 s``, ``12 min``, ``3 h 20 min``, ``4 d 2 h``."""
    if number < 9.95:
        return f"{number:.2g} s" if number >= 0.001 else "0 s"
    whole = round(number)
    if whole < 100:
        return f"{whole} s"
    for large, small, most, unit, less in (
        (60, 1, 6000, "min", "s"),
        (3600, 60, 172800, "h", "min"),
        (86400, 3600, float("inf"), "d", "h"),
    ):
        if whole < most:
            rest = whole % large // small
            return f"{whole // large} {unit}" + (f" {rest} {less}" if rest else "")
    raise AssertionError


def minutes(number: float) -> str:
    """As a schedule has them: ``10 min``."""
    return f"{number:g} min"


def moment(time: str) -> str:
    """A time (ISO 8601) as short as it is clear: ``22:50``, ``26 Nov 22:50``, ``26 Nov 2025``."""
    then, now = datetime.fromisoformat(time).astimezone(), datetime.now().astimezone()
    if abs((now - then).total_seconds()) < TODAY:
        return then.strftime("%H:%M")
    if then.year == now.year:
        return f"{then.day} {then.strftime('%b %H:%M')}"
    return day(time)


def day(time: str) -> str:
    """``26 Nov 2026``."""
    then = datetime.fromisoformat(time).astimezone()
    return f"{then.day} {then.strftime('%b %Y')}"


def clock() -> str:
    """Now, as ``22:50:07``."""
    return datetime.now().strftime("%H:%M:%S")


def clock_of(time: float) -> str:
    """Of a time in seconds since the epoch: ``22:50:07``."""
    return datetime.fromtimestamp(time).strftime("%H:%M:%S")


def iso(time: float) -> str:
    """A time in seconds since the epoch as ISO 8601 has it."""
    return datetime.fromtimestamp(time).astimezone().isoformat(timespec="milliseconds")


def part(row: Mapping[str, Any]) -> int:
    """The part of its quota that an account uses, in percent: of messages or octets, whichever is
    more."""
    parts = [
        row[used] / row[quota]
        for used, quota in (("messages", "quota_messages"), ("bytes", "quota_bytes"))
        if row[quota]
    ]
    return round(100 * max(parts, default=0.0))


def account(name: str) -> str:
    """The path of an account's page.  Its name may be any text."""
    return f"/provider/account?name={quote(name, safe='')}"


def value(found: object) -> str:
    """A setting, or what a check found, for a person."""
    if found is None or found == [] or found == "":
        return "none"
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, (list, tuple)):
        return ", ".join(map(value, found))
    return str(found)
