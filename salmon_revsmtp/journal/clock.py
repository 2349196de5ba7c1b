"""The clock of the journal of deliveries: seconds that pass as they do, whatever is set.

A wall clock that is set forward, or comes up wrong, would let every delivery expire at once, and
what is redelivered then would be handled twice.  So time goes by the kernel's seconds since boot,
which no one sets.  From one boot to the next it goes by the wall clock, but no further than a day.
The journal keeps where it is; a new journal begins with the wall clock.
"""

from __future__ import annotations

import functools
import sqlite3
import time
from pathlib import Path

__all__ = ["CLOCK_TABLE", "SteadyClock", "since_boot"]

#: What a database that keeps the clock needs.
CLOCK_TABLE = """
    CREATE TABLE clock (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        now REAL NOT NULL,
        boot TEXT NOT NULL,
        since_boot REAL NOT NULL,
        wall REAL NOT NULL
    )
    """

# Seconds that may have passed from one boot to the next; more is not believed.
LONGEST_PAUSE = 86400.0

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SELECT = "SELECT now, boot, since_boot, wall FROM clock"
_NOTE = "INSERT OR REPLACE INTO clock (id, now, boot, since_boot, wall) VALUES (1, ?, ?, ?, ?)"

#: Seconds since boot, a suspended machine's sleep included.
since_boot = functools.partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)


class SteadyClock:
    """What :func:`since_boot` has to be added to.

    ``ahead``  gives seconds since the epoch, more or less; by the wall clock until :meth:`read`.
    ``known``  it has been read.
    """

    def __init__(self) -> None:
        self.ahead = time.time() - since_boot()
        self.known = False

    def now(self) -> float:
        """Seconds since the epoch, more or less."""
        return since_boot() + self.ahead

    def read(self, database: sqlite3.Connection) -> None:
        """Go on where the journal says."""
        noted = database.execute(_SELECT).fetchone()
        wall, here = time.time(), since_boot()
        now = wall
        if noted is not None:
            then, boot, there, wall_then = noted
            passed = here - there
            if not boot or boot != _boot() or passed < 0:
                passed = min(max(wall - wall_then, 0.0), LONGEST_PAUSE)
            now = then + passed
        self.ahead, self.known = now - here, True

    def note(self, database: sqlite3.Connection) -> None:
        """Have the journal keep where it is."""
        here = since_boot()
        database.execute(_NOTE, (self.ahead + here, _boot(), here, time.time()))


@functools.cache
def _boot() -> str:
    """Which boot this is; empty where the system does not say."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
