"""What every command prints with: JSON lines, tables, times, a thread that prints."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import click

from salmon_revsmtp.cli.options import ATTENTION

if TYPE_CHECKING:
    from salmon_revsmtp.customer.report import Report

__all__ = ["in_a_thread", "iso", "print_json", "table"]

# Seconds that what is being written has after ctrl-c.
LAST_WORDS = 1.0


def print_json(row: dict[str, object]) -> None:
    click.echo(json.dumps(row))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; into a pipe, lines with tabs between the columns."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            click.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for column in columns:
        drawn.add_column(column)
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


def iso(seconds: float) -> str:
    """A time since the epoch, in the local zone, as ISO 8601 has it."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


@contextlib.contextmanager
def in_a_thread(show: Callable[[Report], None]) -> Iterator[Callable[[Report], None]]:
    """``show``, but in a thread: a pipe that nobody reads would hold up every session of every
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
