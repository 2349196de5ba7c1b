"""A command on a terminal, with a person who answers what it asks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["Answer", "on_a_terminal"]

#: What the terminal shows, and what is typed then, or what says that.
Answer = tuple[str, str | Callable[[], str]]


def _take_terminal() -> None:
    """Ctrl-c is a signal on this one, also where a shell has the tests in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def on_a_terminal(
    folder: Path,
    *arguments: str,
    answers: Sequence[Answer] = (),
    program: Sequence[str] = (sys.executable, "-m", "salmon_revsmtp"),
    width: int = 200,
    term: str = "xterm",
    colours: bool = False,
    **environment: str,
) -> tuple[int, str]:
    """Run a command in a project's folder; returns its exit status, and what the terminal showed
    without ``colours``.  The ``answers`` are given in order, each once; "\\x03" is ctrl-c."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*program, *arguments],
        cwd=folder,
        env={**os.environ, "TERM": term, "COLUMNS": str(width), **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        # The terminal of whoever runs the tests is not asked.
        start_new_session=True,
        preexec_fn=_take_terminal if any(answer == "\x03" for _, answer in answers) else None,
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
    text = seen.decode("utf-8", "replace")
    return status, text if colours else re.sub(r"\x1b\[[0-9;]*m", "", text)
