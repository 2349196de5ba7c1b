"""Which positions a long run tries: all of them with ``FULL=1``, and else a sample.

A sample takes one position at random from each stretch of them, so that no part of a session is
left out.  ``SEED`` says which ones.  Unless you give it, it is the commit: one commit always tries
the same positions, and the next one tries others.

As a pytest plugin (``conftest.py`` registers it) this names the seed at the start of a long run,
and the seed and the position when a test fails.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

__all__ = ["FULL", "SEED", "again", "amount", "chance", "positions"]

FULL = os.environ.get("FULL", "") not in ("", "0")


def _commit() -> str:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "no-commit"  # an unpacked archive: every run has the same sample
    return done.stdout.strip()


SEED = os.environ.get("SEED") or _commit()

_test = ""
_tried = ""


def again(target: str) -> str:
    """The command that tries the same once more."""
    return f"make {target} SEED={SEED}{' FULL=1' if FULL else ''}"


def amount(full: int, sampled: int) -> int:
    """How often, by what is asked for."""
    return full if FULL else sampled


def chance() -> random.Random:
    """What is random in the test that runs now."""
    return random.Random(f"{SEED} {_test}")


def positions(start: int, step: int = 1, *, one_in: int = 1) -> Iterator[int]:
    """``start``, ``start + step`` and so on without end; of a sample, one at random of every
    ``one_in`` of these."""
    global _tried
    stretch = 1 if FULL else one_in
    choice = chance()
    for first in itertools.count(0, stretch):
        position = start + step * (first + choice.randrange(stretch))
        _tried = f"position {position}"
        yield position


# -- the plugin ------------------------------------------------------------------------------------


def pytest_report_header(config: pytest.Config) -> str | None:
    if config.option.markexpr != "long":
        return None
    return f"{'all positions (FULL=1)' if FULL else 'a sample of the positions'}, SEED={SEED}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _test, _tried
    _test, _tried = item.nodeid, ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.get_closest_marker("long"):
        tried = f"{_tried}, " if _tried else ""
        report.sections.append(("sample", f"{tried}SEED={SEED}; again: {again('faults')}"))
    return report
