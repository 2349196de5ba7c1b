"""The customers of our provider as they run it: ``salmon-revsmtp run`` in a project, with sessions
that stay open."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers import COMMAND
from benchmarks.processes import Child, Failure, module
from benchmarks.project import agent, project
from benchmarks.serving import Serving

__all__ = ["connected", "until"]

# Seconds until the customers have greeted after the reversal, beside five round trips.
GREETED = 0.5
# Until thousands of them have called.
CALLED = 600.0


@contextmanager
def connected(
    provider: Serving,
    accounts: Sequence[dict[str, Any]],
    tls: bool = False,
    milliseconds: int = 0,
    *,
    handler: str = "nothing",
    **service: Any,
) -> Iterator[Path]:
    """All customers in one process, each with a session that is open; yields their folder.

    ``milliseconds``  the round trip between them and the provider.
    ``handler``       of the project.
    """
    with ExitStack() as stack:
        port = provider.odmr
        if milliseconds:
            link = module("delay", milliseconds / 2000, port)
            port = stack.enter_context(link).says(20)["port"]
        agents = [
            agent(
                *(port, f"isp-{number}", tls),
                account=one["name"],
                domains=one["domains"],
                every=1,  # so that many dial soon after one another
            )
            for number, one in enumerate(accounts)
        ]
        keys = {"domains": [], **service}
        folder = stack.enter_context(project(*agents, handler=handler, **keys))
        command = [str(COMMAND), "--chdir", str(folder), "run"]
        stack.enter_context(Child(command, name="the customer"))
        sessions = len(accounts)
        until(lambda: provider.log.count("the connection is reversed") >= sessions, CALLED)
        time.sleep(GREETED + 5 * milliseconds / 1000)
        yield folder


def until(so: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is so.  Raises :class:`Failure` after so many seconds."""
    give_up = time.monotonic() + seconds
    while not so():
        if time.monotonic() > give_up:
            raise Failure(f"it did not come to that in {seconds:.0f} seconds")
        time.sleep(0.1)
