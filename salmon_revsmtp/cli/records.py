"""DNS records on a terminal, as a zone file has them, and whether they are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from salmon_revsmtp.cli.output import GOOD, WAITS, Toned, shown
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.init.records import Finding, Record

__all__ = ["looked_up", "show_findings", "show_records"]

INDENT = "    "

# Questions to name servers at a time: each has seconds where there is no answer.
QUESTIONS = 16


def looked_up(hostname: str, records: Sequence[Record]) -> list[Finding]:
    """What DNS says of each."""
    from concurrent.futures import ThreadPoolExecutor

    from salmon_revsmtp.init.records import found

    with ThreadPoolExecutor(QUESTIONS) as threads:
        return list(threads.map(lambda record: found(record, hostname), records))


def show_records(records: Sequence[Record]) -> None:
    for line in _lines(records):
        click.echo(f"{INDENT}{line}")


def show_findings(findings: Sequence[Finding]) -> None:
    """Each record with ``ok`` or ``not yet`` before it, and what there is instead below it."""
    lines = _lines([one.record for one in findings])
    for finding, line in zip(findings, lines, strict=True):
        word = Toned(f"{'ok':<9}", GOOD) if finding.right else Toned(f"{'not yet':<9}", WAITS)
        click.echo(f"{INDENT}{shown(word)}{line}")
        if not finding.right:
            click.echo(f"{INDENT}{'':<9}found: {printable(finding.instead)}")


def _lines(records: Sequence[Record]) -> list[str]:
    cells = [(one.name, one.kind, one.value) for one in records]
    name, kind = (max(len(one[column]) for one in cells) for column in (0, 1))
    return [
        f"{one.name:<{name}}  {one.kind:<{kind}}  {one.value}"
        + (f"  ({one.remark})" if one.remark else "")
        for one in records
    ]
