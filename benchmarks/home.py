"""The customers of our provider as they run it: ``salmon-revsmtp run`` in a project, with sessions
that stay open."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import COMMAND
from benchmarks.processes import Child, Failure, module
from benchmarks.project import agent, project
from benchmarks.serving import Serving

__all__ = ["Customers", "connected", "connected_as", "until"]

# Seconds until the customers have greeted after the reversal, beside five round trips.
GREETED = 0.5
# Until thousands of them have called.
CALLED = 600.0


@dataclass
class Customers:
    """Customers of a provider, in one process: that, and its folder."""

    child: Child
    folder: Path


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
    """As :func:`connected_as`; yields their folder."""
    how = {"handler": handler, **service}
    with connected_as(provider, accounts, tls, milliseconds, **how) as customers:
        yield customers.folder


@contextmanager
def connected_as(
    provider: Serving,
    accounts: Sequence[dict[str, Any]],
    tls: bool = False,
    milliseconds: int = 0,
    *,
    already: int = 0,
    handler: str = "nothing",
    **service: Any,
) -> Iterator[Customers]:
    """All customers in one process, each with a session that is open.

    ``milliseconds``  the round trip between them and the provider.
    ``already``       sessions that the provider has had before.
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
        child = stack.enter_context(Child(command, name="the customer"))
        sessions = already + len(accounts)
        until(lambda: provider.log.count("the connection is reversed") >= sessions, CALLED)
        time.sleep(GREETED + 5 * milliseconds / 1000)
        yield Customers(child, folder)


def until(so: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is so.  Raises :class:`Failure` after so many seconds."""
    give_up = time.monotonic() + seconds
    while not so():
        if time.monotonic() > give_up:
            raise Failure(f"it did not come to that in {seconds:.0f} seconds")
        time.sleep(0.1)
