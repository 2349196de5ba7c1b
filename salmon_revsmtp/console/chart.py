"""Traffic as a drawing: where the bars, lines and texts of an SVG are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from salmon_revsmtp.console.words import octets

__all__ = ["Chart", "drawn"]

WIDTH, HEIGHT = 480, 150
LEFT, BELOW, ABOVE = 44, 22, 6


@dataclass(frozen=True)
class Bar:
    """In units of the drawing; ``title`` is said of it."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Mark:
    """A text beside an axis, and where."""

    text: str
    x: float = 0
    y: float = 0
    anchor: str = "middle"


@dataclass(frozen=True)
class Chart:
    """``said`` is the sum; ``described`` says in words what is drawn."""

    id: str
    title: str
    said: str
    described: str
    bars: Sequence[Bar] = ()
    lines: Sequence[Mark] = ()
    ticks: Sequence[Mark] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = field(default=LEFT)


def drawn(
    name: str, title: str, buckets: Sequence[tuple[float, int, int]], seconds: float
) -> Chart:
    """Messages by time.

    ``buckets``  when each began (seconds since the epoch), messages, octets; the oldest first.
    ``seconds``  how long all of them are.
    """
    messages = sum(number for _, number, _ in buckets)
    size = sum(number for _, _, number in buckets)
    said = f"{messages:,} message{'' if messages == 1 else 's'}, {octets(size)}"
    if not messages:
        described = "No messages."
    else:
        start, most, _ = max(buckets, key=lambda one: one[1])
        described = f"{said}. The most was {most:,} in the time from {_time(start, seconds)}."
    top = _top(max((number for _, number, _ in buckets), default=0))
    step = (WIDTH - LEFT) / max(1, len(buckets))
    tall = HEIGHT - BELOW - ABOVE
    bars = [
        Bar(
            round(LEFT + place * step + step * 0.1, 2),
            round(HEIGHT - BELOW - tall * number / top, 2),
            round(step * 0.8, 2),
            round(tall * number / top, 2),
            f"{_time(start, seconds)}: {number:,} message{'' if number == 1 else 's'}, "
            f"{octets(size)}",
        )
        for place, (start, number, size) in enumerate(buckets)
        if number
    ]
    lines = [
        Mark(f"{round(top * share):,}", y=round(HEIGHT - BELOW - tall * share, 2))
        for share in ((0, 1) if top == 1 else (0, 0.5, 1))
    ]
    return Chart(name, title, said, described, bars, lines, _ticks(buckets, step, seconds))


def _top(most: int) -> int:
    """A round even number, or 1, that is no less."""
    if most <= 1:
        return 1
    size = 10 ** (len(str(most)) - 1)
    return (
        next(top for top in (round(size * factor) for factor in (1, 2, 4, 6, 8, 10)) if top >= most)
        if size > 1 or most > 8
        else most + most % 2
    )


def _ticks(
    buckets: Sequence[tuple[float, int, int]], step: float, seconds: float
) -> Sequence[Mark]:
    """At each day, or each sixth hour."""
    ticks: list[Mark] = []
    before: datetime | None = None
    for place, (start, _, _) in enumerate(buckets):
        then = datetime.fromtimestamp(start)
        new = before is not None and (
            then.day != before.day if seconds > 2 * 86400 else then.hour // 6 != before.hour // 6
        )
        before = then
        x = LEFT + place * step
        if new and LEFT + 14 < x < WIDTH - 14:
            text = then.strftime("%a") if seconds > 2 * 86400 else f"{then.hour // 6 * 6:02}:00"
            ticks.append(Mark(text, round(x, 2)))
    return ticks


def _time(start: float, seconds: float) -> str:
    then = datetime.fromtimestamp(start)
    return then.strftime("%a %H:%M") if seconds > 2 * 86400 else then.strftime("%H:%M")
