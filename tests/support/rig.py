"""A provider, a proxy before it that breaks connections, and a customer with one memory of what it
has served, all in one event loop.

A fault strikes the first connection of a collection.  What has not come with it comes with a later
one, and no one says that there was nothing.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.smtp.envelope import Envelope
from support.configuration import agent_keys, configuration
from support.holding import Holding
from support.proxy import Fault, Proxy
from support.salmon import Salmon
from support.tls import CERTIFICATE

__all__ = ["BOTH", "Rig", "one_message", "with_rig"]

BOTH = ("ann@example.org", "bob@example.org")
# What is waited for here takes milliseconds; this is for a machine that does much else.
PATIENCE = 60


class QuickLogin(Accounts):
    """CRAM-MD5 and nothing else: SCRAM's thousands of rounds are another test's."""

    def mechanisms(self, tls: bool) -> tuple[str, ...]:
        return ("CRAM-MD5",)


class Rig:
    """What a test works with; :func:`with_rig` makes it."""

    def __init__(self, salmon: Salmon, held: Holding, proxy: Proxy, collector: Collector) -> None:
        self.queue, self.proxy = held, proxy
        self._salmon, self._collector = salmon, collector
        self._numbers = itertools.count()
        self._sent: Counter[tuple[str, bytes]] = Counter()

    def put(self, octets: int = 0, recipients: tuple[str, ...] = BOTH) -> None:
        """Have the provider hold a message that is like no other."""
        number = next(self._numbers)
        line = b".%06d and so on, lines that begin with a dot among them\r\n" % number
        data = b"Subject: %06d\r\n\r\n%b" % (number, line * (octets // len(line)))
        self.queue.put(Envelope("a@example.net", recipients), data)
        content = data.replace(b"\r\n", b"\n").removesuffix(b"\n")
        self._sent.update((one, content) for one in recipients)

    async def collect(self, fault: Fault | None = None, *, to_the_end: bool = True) -> Report:
        """One collection, the first connection of which has this fault; ``to_the_end`` of all that
        it set going."""
        self.proxy.fault = fault
        collecting = self._collector.collect(self._collector.configuration.agents)
        [report] = await asyncio.wait_for(collecting, PATIENCE)
        if to_the_end:
            await self.at_rest()
        said_why = report.error is not None and len(report.error.split()) > 3
        assert said_why is not report.outcome.good, report
        if report.outcome is Outcome.NO_MAIL:
            assert (report.messages, len(self.queue)) == (0, 0), report
        return report

    async def collect_the_rest(self) -> list[Report]:
        """Collect until the provider has no more."""
        reports = []
        for _ in range(10):
            reports.append(await self.collect())
            if reports[-1].outcome in (Outcome.COLLECTED, Outcome.NO_MAIL):
                return reports
        raise AssertionError(f"the provider never says that it has no more: {reports}")

    async def at_rest(self) -> None:
        """Nothing is open or running any more that a collection has set going."""
        await asyncio.wait_for(self.proxy.quiet(), PATIENCE)
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            _, pending = await asyncio.wait(others, timeout=PATIENCE)
            assert not pending

    def came_once(self) -> None:
        """Every message that was ever put has been handled once per recipient, octet for octet."""
        handled = Counter(
            (message.To, message.Data[message.Data.index(b"Subject: ") :])  # without our Received
            for message in self._salmon.handled
        )
        assert handled == self._sent
        assert len(self.queue) == 0
        self._salmon.handled.clear()
        self._sent.clear()


def with_rig(
    salmon: Salmon,
    work: Callable[[Rig], Awaitable[None]],
    *,
    tls: str = "none",
    provider_timeout: float = 600,
    **keys: Any,
) -> None:
    """Run ``work`` on a rig; ``keys`` are the agent's.  At the end nothing is open."""
    salmon.handle(".*")
    trust = {} if tls == "none" else {"ca_file": str(CERTIFICATE)}
    keys = {"server": "127.0.0.1", "tls": tls, **trust, **keys}

    async def main() -> None:
        held = Holding(salmon.folder / "provider", kind=QuickLogin)
        async with (
            held.provider("odmr", tls, timeout=provider_timeout) as provider,
            Proxy(provider.port) as proxy,
        ):
            plugins = Plugins.load()
            valid = configuration(agent_keys(proxy.port, **keys), plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                rig = Rig(salmon, held, proxy, collector)
                rig.put()
                await rig.collect()  # what is made once has been made
                before = _open_files()
                await work(rig)
                assert _open_files() <= before

    asyncio.run(main())


def _open_files() -> int:
    gc.collect()  # what other tests of this process have left behind is not ours
    return sum(1 for _ in Path("/dev/fd").iterdir())


async def one_message(rig: Rig, fault: Fault) -> Report:
    """One message for two recipients over a connection with a fault, and what it takes then;
    returns the report of the collection that had the fault."""
    rig.put()
    first = await rig.collect(fault)
    if not fault.struck:
        assert first.outcome is Outcome.COLLECTED
    if first.outcome is Outcome.COLLECTED:
        # "mail came, and the provider has no more"
        assert (first.messages, first.recipients, len(rig.queue)) == (1, 2, 0)
    else:
        assert first.outcome is Outcome.FAILED
    reports = [first, *await rig.collect_the_rest()]
    assert sum(report.messages for report in reports) == 1
    assert sum(report.recipients for report in reports) == 2
    rig.came_once()
    return first
