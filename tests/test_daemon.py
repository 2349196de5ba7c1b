"""The server's own decisions: whom it holds back, and what it says of agents that fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue, no_more_mail, scripted
from support.salmon import Salmon

from salmon_revsmtp import hookimpl
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.journal.collections import Journal
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon

SOON = 0.002  # minutes


class Watcher:
    """A plugin that holds agents back ``times`` times, and notices when collections end."""

    def __init__(self, times: int = 0) -> None:
        self.times = times
        self.asked = 0
        self.reports: list[Report] = []
        self.loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()

    @hookimpl
    def may_collect(self, agent: Any) -> str | None:
        self.asked += 1
        return "offline" if self.asked <= self.times else None

    @hookimpl
    def collection_finished(self, agent: Any, report: Report) -> None:
        self.reports.append(report)
        self.loop.call_soon_threadsafe(self.ended.set)


async def serve(salmon: Salmon, watcher: Watcher, enough: int, *agents: dict[str, Any]) -> None:
    """Run a server until so many collections have ended."""
    plugins = Plugins.load()
    plugins.register(watcher)
    valid = configuration(*agents, plugins=plugins)
    with Collector(valid, plugins, lambda: salmon.relay) as collector:
        daemon = Daemon(collector, plugins)
        running = asyncio.create_task(daemon.run())
        while len(watcher.reports) < enough:
            watcher.ended.clear()
            await asyncio.wait_for(watcher.ended.wait(), 20)
        daemon.stop()
        await asyncio.wait_for(running, 20)


def test_a_plugin_holds_an_agent_back(salmon: Salmon, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        watcher = Watcher(times=3)
        async with scripted(no_more_mail) as port:
            await serve(salmon, watcher, 1, agent_keys(port, every=SOON))
        assert watcher.asked >= 4
        assert [report.outcome.value for report in watcher.reports[:1]] == ["no-mail"]

    asyncio.run(main())
    assert caplog.text.count("agent=isp held back: offline") == 1
    assert caplog.text.count("agent=isp is not held back any more") == 1


def test_a_failure_and_a_recovery_are_one_line_each(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def refuses(provider: Dialogue) -> None:
        provider.say("421 busy")

    async def main() -> None:
        watcher = Watcher()
        scripts = (refuses, refuses, refuses, no_more_mail)
        async with scripted(*scripts) as port:
            await serve(salmon, watcher, 4, agent_keys(port, every=SOON))

    asyncio.run(main())
    assert caplog.text.count("agent=isp fails: deferred") == 1
    assert caplog.text.count("agent=isp recovered") == 1


def test_a_disabled_agent_never_runs_on_schedule(salmon: Salmon) -> None:
    async def main() -> None:
        watcher = Watcher()
        async with scripted(no_more_mail) as one, scripted() as other:
            off = agent_keys(other, name="off", every=SOON, enabled=False)
            await serve(salmon, watcher, 1, off, agent_keys(one, every=60))
        assert [report.agent for report in watcher.reports] == ["isp"]

    asyncio.run(main())


def test_an_answer_in_another_alphabet_does_not_stop_an_agent(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuses(provider: Dialogue) -> None:
        provider.say("554 verweigert f\xfcr Sie".encode("latin-1"))

    async def main() -> None:
        watcher = Watcher()
        async with scripted(refuses, refuses, no_more_mail) as port:
            await serve(salmon, watcher, 3, agent_keys(port, every=SOON))
        assert [report.outcome.value for report in watcher.reports[:3]] == [
            "refused",
            "refused",
            "no-mail",
        ]
        assert "verweigert f?r Sie" in str(watcher.reports[0].error)

    asyncio.run(main())
    assert [entry.outcome for entry in Journal().history()[-2:]] == ["refused", "refused"]
