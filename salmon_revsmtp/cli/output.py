"""What every command prints with: JSON lines, tables, colours, times, a thread that prints."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import zip_longest
from typing import IO, TYPE_CHECKING, Any

import click

from salmon_revsmtp.cli.options import ATTENTION
from salmon_revsmtp.customer.report import iso
from salmon_revsmtp.foreign import printable
from salmon_revsmtp.net.outcome import Outcome

if TYPE_CHECKING:
    from salmon_revsmtp.customer.report import Report

__all__ = [
    "BAD",
    "BOLD",
    "GOOD",
    "WAITS",
    "Toned",
    "at",
    "folded",
    "has_colours",
    "in_a_thread",
    "lasted",
    "lasted_column",
    "outcome",
    "print_json",
    "shown",
    "table",
    "when",
]

# Seconds that what is being written has after ctrl-c.
LAST_WORDS = 1.0

# Spaces between two columns of a table, and before what stands below a row.
GAP = 2
INDENT = "    "


# The tones of a text: all is well, it is tried again, a person is needed; and a heading.
GOOD, WAITS, BAD, BOLD = "good", "waits", "bad", "bold"
STYLES: dict[str, dict[str, Any]] = {
    GOOD: {"fg": "green"},
    WAITS: {"fg": "yellow"},
    BAD: {"fg": "red"},
    BOLD: {"bold": True},
}


def print_json(row: dict[str, object]) -> None:
    click.echo(json.dumps(row))


# -- colours --------------------------------------------------------------------------------------


class Toned(str):
    """A text with a tone: a cell of :func:`table`, or what :func:`shown` makes part of a line.  It
    is a string like any other where there are no colours."""

    tone: str

    def __new__(cls, text: str, tone: str) -> Toned:
        toned = super().__new__(cls, text)
        toned.tone = tone
        return toned


def outcome(word: str) -> str:
    """The word for how a collection ended, in its tone."""
    if word not in list(Outcome):
        return word
    if word in (Outcome.DEFERRED, Outcome.BUSY):
        return Toned(word, WAITS)
    return Toned(word, GOOD if Outcome(word).good else BAD)


def has_colours(stream: IO[Any]) -> bool:
    """Whether to write in colours there: on a terminal that has them, unless NO_COLOR is set to
    anything (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown")
    return stream.isatty() and not plain


def shown(text: str, stream: IO[Any] | None = None) -> str:
    """A text in the colour of its tone, if it has one and there are colours on ``stream``, which is
    standard output by default.  What strangers wrote is made harmless."""
    tone = getattr(text, "tone", None)
    harmless = printable(text)
    if tone is None or not harmless or not has_colours(stream or sys.stdout):
        return harmless
    return click.style(harmless, **STYLES[tone])


# -- tables ---------------------------------------------------------------------------------------


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], remarks: bool = False
) -> None:
    """A table on a terminal; into a pipe, lines with tabs between the columns.

    The terminal may be narrow, and nothing is cut off: cells fold between words, and where a word
    does not fit, each row is a list of its cells.  ``remarks``: the last column holds sentences; on
    a terminal they stand below their rows.  A cell may be :class:`Toned`.
    """
    rows = [[_harmless(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            click.echo("\t".join(row))
        return
    click.echo(shown(Toned(title, BOLD)))
    width = shutil.get_terminal_size().columns
    below = [""] * len(rows)
    if remarks:
        below = [row[-1] for row in rows]
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    widths = _widths([columns, *rows], width - GAP * (len(columns) - 1))
    if widths:
        for line in _side_by_side([Toned(one, BOLD) for one in columns], widths):
            click.echo(line)
    for row, remark in zip(rows, below, strict=True):
        lines = _side_by_side(row, widths) if widths else _one_below_another(columns, row, width)
        for line in lines:
            click.echo(line)
        if remark:
            for line in folded(remark, width - len(INDENT), INDENT):
                click.echo(shown(line))


def _harmless(cell: str) -> str:
    harmless = printable(cell)
    return Toned(harmless, cell.tone) if isinstance(cell, Toned) else harmless


def _widths(rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """The width of each column: as wide as its widest cell, or narrower, but not narrower than its
    longest word; empty if that is more than there is room for."""
    columns = list(zip(*rows, strict=True))
    least = [max(map(len, " ".join(column).split()), default=0) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    if sum(least) > room:
        return []
    while sum(widths) > room:
        spare = [width - word for width, word in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1
    return widths


def _side_by_side(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    cells = [folded(cell, width) for cell, width in zip(row, widths, strict=True)]
    for line in zip_longest(*cells, fillvalue=""):
        parts = [
            shown(part) + " " * (width - len(part))
            for part, width in zip(line, widths, strict=True)
        ]
        yield (" " * GAP).join(parts).rstrip()


def _one_below_another(columns: Sequence[str], row: Sequence[str], width: int) -> Iterator[str]:
    label = max(map(len, columns)) + GAP
    for column, cell in zip(columns, row, strict=True):
        first, *others = folded(cell, width - label) or [""]
        yield f"{column:<{label}}{shown(first)}"
        yield from (" " * label + shown(other) for other in others)
    yield ""


def folded(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of whole words; a word that is wider than a line is left to the terminal."""
    lines = textwrap.wrap(text, max(1, width), break_long_words=False, break_on_hyphens=False)
    tone = getattr(text, "tone", None)
    return [indent + line if tone is None else Toned(indent + line, tone) for line in lines]


# -- times ----------------------------------------------------------------------------------------


def when(seconds: float) -> str:
    """The same for a table; on a terminal without the zone."""
    if not sys.stdout.isatty():
        return iso(seconds)
    return datetime.fromtimestamp(seconds).isoformat(" ", timespec="seconds")


def at(text: str | None) -> str:
    """The same of a time that is ISO 8601 already."""
    return "-" if text is None else when(datetime.fromisoformat(text).timestamp())


def lasted_column() -> str:
    """The title of a column of :func:`lasted`."""
    return "lasted" if sys.stdout.isatty() else "seconds"


def lasted(seconds: float) -> str:
    """How long something took, for a table: seconds in a pipe, on a terminal ``0.4 s`` or
    ``2 h 5 min``."""
    if not sys.stdout.isatty():
        return f"{seconds:.1f}"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        whole, rest, units = *divmod(round(seconds), 60), ("min", "s")
    elif seconds < 86400:
        whole, rest, units = *divmod(round(seconds / 60), 60), ("h", "min")
    else:
        whole, rest, units = *divmod(round(seconds / 3600), 24), ("d", "h")
    return f"{whole} {units[0]} {rest} {units[1]}" if rest else f"{whole} {units[0]}"


@contextlib.contextmanager
def in_a_thread(show: Callable[[Report], None]) -> Iterator[Callable[[Report], None]]:
    """``show``, but in a thread: a pipe that no one reads would hold up every session of every
    agent.  All are shown when this ends.  What ``show`` raises, as when the reader is gone, is
    raised with the next report or at the end."""
    import signal
    import threading
    import traceback
    from queue import SimpleQueue

    reports: SimpleQueue[Report | None] = SimpleQueue()
    errors: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            while report := reports.get():
                show(report)
        except BaseException as error:  # rich exits when the reader is gone
            errors.append(error)
        ended.set()

    def show_in_a_thread(report: Report) -> None:
        if errors:
            raise errors[0]
        reports.put(report)

    threading.Thread(target=work, name="output", daemon=True).start()
    try:
        try:
            yield show_in_a_thread
        finally:
            reports.put(None)
        ended.wait()
    except BaseException as error:
        # A second ctrl-c is no reason to wait any longer.
        with contextlib.suppress(KeyboardInterrupt):
            ended.wait(LAST_WORDS)
        if not ended.is_set():
            # A write into a full pipe ends with the process, and Python's own end waits for it.
            if isinstance(error, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
            traceback.print_exc()
            os._exit(ATTENTION)
        raise
    if errors:
        raise errors[0]
