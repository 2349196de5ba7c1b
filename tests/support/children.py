"""Children such as a handler forks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def living_child() -> Iterator[None]:
    """A child such as a handler forks, which lives on until this is over.  It runs already: what
    happens in a child before it does anything has happened."""
    running, runs = os.pipe()
    over, end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(end)
            os.write(runs, b"x")
            os.read(over, 1)
        finally:
            os._exit(0)
    try:
        os.read(running, 1)
        yield
    finally:
        os.close(end)
        os.waitpid(child, 0)
        for one in (running, runs, over):
            os.close(one)
