"""Several delivery threads: handlers that wait for something else, such as a database far away.

The handler waits, and is marked ``@nolocking``, so that Salmon lets it run beside others.  One that
does nothing is measured, too: what threads cost where there is nothing to wait for.
"""

from __future__ import annotations

from benchmarks.intake import Load, by_us
from benchmarks.project import WAITS
from benchmarks.provider import times
from benchmarks.table import Case, Section, Target

__all__ = ["sections", "targets"]

OCTETS = 4_000
THREADS = 10
# Messages for each thread where handlers wait, and in all where they do nothing.
WAITING, MANY = 60, 5_000
QUICK_WAITING, QUICK_MANY = 3, 60

WAITING_TITLE = f"Delivery threads, handlers that wait {1000 * WAITS:.0f} ms"
NOTHING_TITLE = "Delivery threads, handlers that do nothing"


def sections(quick: bool) -> list[Section]:
    """Throughput down one session, with one thread and with several."""
    waiting = QUICK_WAITING if quick else WAITING
    many = QUICK_MANY if quick else MANY
    return [
        Section(
            WAITING_TITLE,
            "messages/s",
            [_case(number, number * waiting, "waits") for number in (THREADS, 1)],
            ours=_name(THREADS),
        ),
        Section(
            NOTHING_TITLE,
            "messages/s",
            [_case(number, many, "nothing_beside") for number in (THREADS, 1)],
            ours=_name(THREADS),
        ),
    ]


def targets() -> list[Target]:
    """What the issue asks for."""
    figure = times(WAITING_TITLE, _name(THREADS), _name(1))
    return [Target(f"{THREADS} threads, times one, handlers that wait", figure, lambda _: 9.0)]


def _case(threads: int, messages: int, handler: str) -> Case:
    load = Load(messages, OCTETS)
    return Case(_name(threads), lambda: by_us(load, handler=handler, delivery_threads=threads))


def _name(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"
