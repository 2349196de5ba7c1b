"""The command: ``python -m benchmarks``, or ``make bench``.

Every round measures each case once, in turn, so that what else the machine does falls on all of
them.  A case that fails is a row that says so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks import (
    alone,
    console,
    distance,
    hosts,
    idle,
    intake,
    keeping,
    live,
    machine,
    many,
    provider,
    queueing,
    startup,
    stepwise,
    table,
    threads,
    tls,
)
from benchmarks.processes import ROOT, Failure
from benchmarks.table import Case, Missing, Section

SECTIONS: dict[str, Callable[[bool], list[Section]]] = {
    "startup": startup.sections,
    "alone": lambda quick: [alone.section(quick)],
    "intake": intake.sections,
    "queue": queueing.sections,
    "stepwise": stepwise.sections,
    "tls": tls.sections,
    "distance": distance.sections,
    "many": many.sections,
    "keeping": keeping.sections,
    "threads": threads.sections,
    **provider.SECTIONS,
    **live.SECTIONS,
    **hosts.SECTIONS,
    "idle": idle.sections,
    "console": console.sections,
}
ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write them down; returns the exit status."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    chosen = options.only or list(SECTIONS)
    facts = machine.describe()
    sections = [one for name in chosen for one in SECTIONS[name](options.quick)]
    for number in range(rounds):
        for section in sections:
            _progress(f"round {number + 1} of {rounds}: {section.title}")
            for case in section.cases:
                _measure(section, case)
    targets = [*startup.targets(), *alone.targets(), *intake.targets()]
    targets += stepwise.targets()
    targets += [*distance.targets(), *threads.targets(), *provider.targets(), *live.targets()]
    targets += [*queueing.targets(), *hosts.targets()]
    targets += [*idle.targets(), *keeping.targets(), *console.targets()]
    by_title = {section.title: section for section in sections}
    for derived in (distance.round_trips(by_title), many.per_agent(by_title)):
        if derived is not None:
            sections.append(derived)
    markdown = table.as_markdown(sections, targets, facts, rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench.md").write_text(markdown)
    (options.output / "bench.json").write_text(table.as_json(sections, targets, facts, rounds))
    print(markdown)
    _progress(f"written: {options.output}/bench.md and bench.json")
    return 1 if any(case.failed for section in sections for case in section.cases) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few messages, to see that it works")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}, or 1 with --quick")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=_names())
    parser.add_argument("--output", type=Path, default=ROOT / "build/bench", metavar="FOLDER")
    return parser.parse_args(arguments)


def _names() -> str:
    return "of " + ", ".join(SECTIONS)


def _measure(section: Section, case: Case) -> None:
    if case.missing or case.failed:
        return
    started = time.monotonic()
    try:
        figure = case.measure()
    except Missing as error:
        case.missing = str(error)
        return
    except (Failure, AssertionError, OSError) as error:
        case.failed = f"failed: {' '.join(str(error).split())[:300]}"
        _progress(f"    {case.name}: {case.failed}")
        return
    case.figures.append(figure)
    seconds = time.monotonic() - started
    _progress(f"    {case.name}: {table.shown(figure)} {section.unit} ({seconds:.1f} s)")


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _terminated(number: int, frame: object) -> NoReturn:
    """Leave by way of everything that has to be ended and removed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
