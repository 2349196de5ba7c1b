"""A command on a terminal, with a person who answers what it asks."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["Answer", "on_a_terminal"]

#: What the terminal shows, and what is typed then, or what says that.
Answer = tuple[str, str | Callable[[], str]]


def on_a_terminal(
    folder: Path,
    *arguments: str,
    answers: Sequence[Answer] = (),
    program: Sequence[str] = (sys.executable, "-m", "salmon_revsmtp"),
    **environment: str,
) -> tuple[int, str]:
    """Run a command in a project's folder; returns its exit status, and what the terminal showed
    without colours.  The ``answers`` are given in order, each once."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*program, *arguments],
        cwd=folder,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200", **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,  # the terminal of whoever runs the tests is not asked
    )
    os.close(theirs)
    waiting, seen, answered = list(answers), b"", 0
    with contextlib.suppress(OSError):  # how a terminal says that it is over
        while data := os.read(ours, 4096):
            seen += data
            if waiting and waiting[0][0].encode() in seen[answered:]:
                answered = len(seen)
                _, answer = waiting.pop(0)
                os.write(ours, f"{answer if isinstance(answer, str) else answer()}\n".encode())
    os.close(ours)
    status = process.wait(60)
    assert not waiting, seen
    return status, re.sub(r"\x1b\[[0-9;]*m", "", seen.decode("utf-8", "replace"))
