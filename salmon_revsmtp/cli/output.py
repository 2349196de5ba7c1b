"""What every command prints with: JSON lines, tables, times, a thread that prints."""

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
from typing import TYPE_CHECKING

import click

from salmon_revsmtp.cli.options import ATTENTION
from salmon_revsmtp.customer.report import iso
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.customer.report import Report

__all__ = ["at", "folded", "in_a_thread", "print_json", "table", "when"]

# Seconds that what is being written has after ctrl-c.
LAST_WORDS = 1.0

# Spaces between two columns of a table, and before what stands below a row.
GAP = 2
INDENT = "    "


def print_json(row: dict[str, object]) -> None:
    click.echo(json.dumps(row))


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], remarks: bool = False
) -> None:
    """A table on a terminal; into a pipe, lines with tabs between the columns.

    The terminal may be narrow, and nothing is cut off: cells fold between words, and where a word
    does not fit, each row is a list of its cells.  ``remarks``: the last column holds sentences; on
    a terminal they stand below their rows.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            click.echo("\t".join(row))
        return
    click.secho(title, bold=True)
    width = shutil.get_terminal_size().columns
    below = [""] * len(rows)
    if remarks:
        below = [row[-1] for row in rows]
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    widths = _widths([columns, *rows], width - GAP * (len(columns) - 1))
    if widths:
        for line in _side_by_side(columns, widths):
            click.secho(line, bold=True)
    for row, remark in zip(rows, below, strict=True):
        lines = _side_by_side(row, widths) if widths else _one_below_another(columns, row, width)
        for line in lines:
            click.echo(line)
        if remark:
            click.echo("\n".join(folded(remark, width - len(INDENT), INDENT)))


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
        parts = [part.ljust(width) for part, width in zip(line, widths, strict=True)]
        yield (" " * GAP).join(parts).rstrip()


def _one_below_another(columns: Sequence[str], row: Sequence[str], width: int) -> Iterator[str]:
    label = max(map(len, columns)) + GAP
    for column, cell in zip(columns, row, strict=True):
        first, *others = folded(cell, width - label) or [""]
        yield f"{column:<{label}}{first}"
        yield from (" " * label + other for other in others)
    yield ""


def folded(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of whole words; a word that is wider than a line is left to the terminal."""
    lines = textwrap.wrap(text, max(1, width), break_long_words=False, break_on_hyphens=False)
    return [indent + line for line in lines]


def when(seconds: float) -> str:
    """The same for a table; on a terminal without the zone."""
    if not sys.stdout.isatty():
        return iso(seconds)
    return datetime.fromtimestamp(seconds).isoformat(" ", timespec="seconds")


def at(text: str | None) -> str:
    """The same of a time that is ISO 8601 already."""
    return "-" if text is None else when(datetime.fromisoformat(text).timestamp())


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
