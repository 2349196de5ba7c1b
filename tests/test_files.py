"""Locks between processes."""

from __future__ import annotations

import os
from pathlib import Path

from salmon_revsmtp.files import exclusive_lock


def test_one_has_it_and_then_another(tmp_path: Path) -> None:
    path = tmp_path / "run/agent.lock"
    with exclusive_lock(path) as first, exclusive_lock(path) as second:
        assert (first, second) == (True, False)
    with exclusive_lock(path) as third:
        assert third


def test_a_child_that_lives_on_does_not_keep_it(tmp_path: Path) -> None:
    """As when a handler has a pool of processes."""
    path = tmp_path / "agent.lock"
    reading, writing = os.pipe()
    with exclusive_lock(path):
        child = os.fork()
        if not child:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        with exclusive_lock(path) as ours:
            assert ours
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        os.close(reading)
