"""The server's own decisions: whom it holds back, and what it says of agents that fail."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue, no_more_mail, scripted
from support.salmon import Salmon

from salmon_revsmtp import hookimpl
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.journal.collections import Entry, Journal
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.control import Answers, Control
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.server.failing import Failing
from salmon_revsmtp.server.health import Findings

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
            await asyncio.wait_for(watcher.ended.wait(), 60)
        daemon.stop()
        await asyncio.wait_for(running, 60)


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


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), PermissionError(13, "Permission denied")]
)
@pytest.mark.parametrize("place", ["enabled", "collection", "run"])
def test_an_exception_anywhere_before_a_collection_does_not_stop_the_agent_for_ever(
    salmon: Salmon,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
) -> None:
    original = getattr(Collector, place)
    left = [error, error]

    def fails(*arguments: Any) -> Any:
        if left:
            raise left.pop()
        return original(*arguments)

    monkeypatch.setattr(Collector, place, fails)

    async def main() -> None:
        watcher = Watcher()
        async with scripted(no_more_mail) as port:
            await serve(salmon, watcher, 1, agent_keys(port, every=SOON))
        assert [report.outcome.value for report in watcher.reports[:1]] == ["no-mail"]

    asyncio.run(main())
    assert not left
    assert caplog.text.count("agent=isp fails: failed") == 1
    assert str(error) in caplog.text
    assert caplog.text.count("agent=isp recovered") == 1


class Denied(type(Path())):  # type: ignore[misc]
    """A path below a folder that may not be entered, which no mode denies to root."""

    def stat(self, **keys: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    def exists(self, **keys: Any) -> bool:
        raise PermissionError(13, "Permission denied")


def test_a_journal_that_cannot_be_looked_at_stops_no_agent(tmp_path: Path) -> None:
    journal = Journal(Denied(tmp_path / "run/revsmtp.sqlite3"))
    assert journal.state("isp").enabled is None
    assert journal.history() == []


def test_a_failed_notification_round_does_not_end_the_server(
    salmon: Salmon, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Collector) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Collector, "send_waiting", fails)

    async def main() -> None:
        watcher = Watcher()
        async with scripted(no_more_mail) as port:
            await serve(salmon, watcher, 1, agent_keys(port, every=SOON))

    asyncio.run(main())
    assert "can't start new thread" in caplog.text


@pytest.mark.parametrize("request_line", [b'{"do": "state"}', b"[]", b"not JSON"])
def test_who_asks_the_server_is_answered_also_when_that_fails(
    tmp_path: Path, request_line: bytes
) -> None:
    async def fails(request: dict[str, Any]) -> Answers:
        raise RuntimeError("no thread to spare")
        yield {}

    async def main() -> None:
        path = tmp_path / "control.sock"
        control = Control(fails, path)
        await control.start()
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(request_line + b"\n")
        answers = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        assert "the server could not do that" in json.loads(answers)["error"]
        await control.stop()

    asyncio.run(main())


def test_a_look_at_a_disk_that_hangs_is_the_only_one(salmon: Salmon) -> None:
    go, looks, now = threading.Event(), [], [1000.0]

    def hangs(live: object) -> Findings:
        looks.append(live)
        go.wait(60)
        return Findings([], [])

    async def main() -> None:
        plugins = Plugins()
        with Collector(configuration(), plugins, lambda: salmon.relay) as collector:
            daemon = Daemon(collector, plugins, clock=lambda: now[0])
            daemon._health.look = hangs  # type: ignore[method-assign, assignment]
            for _ in range(5):
                daemon._look_after()
                await asyncio.sleep(0)
                now[0] += 61
            assert len(daemon._scheduled) == 2, "the look, and who remembers it"
            asking = [asyncio.ensure_future(daemon._look_together()) for _ in range(3)]
            await asyncio.sleep(0)
            go.set()
            one, *others = await asyncio.wait_for(asyncio.gather(*asking), 60)
            assert all(other is one for other in others) and len(looks) == 1
            await asyncio.gather(*daemon._scheduled)
            daemon._look_after()
            await asyncio.wait_for(asyncio.gather(*daemon._scheduled), 60)
            assert len(looks) == 2

    asyncio.run(main())


# -- who fails, in several processes ---------------------------------------------------------------


class Process:
    """What a process notes of collections, in the journal that it shares with others."""

    def __init__(self, path: Path) -> None:
        self.journal, self.failing = Journal(path), Failing()

    def ended(self, outcome: str) -> None:
        report = Report("isp", "odmr", Outcome(outcome), error="no one is there")
        entry = Entry("isp", "odmr", 1.0, 2.0, outcome, 0, 0, 0, 0, 0, None, None, report.error)
        self.failing.note(report, self.journal.record(entry, report.outcome.good))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has had since this was last asked."""
    words = [record.getMessage().split()[1] for record in caplog.records]
    caplog.clear()
    return words


def test_whoever_ran_it_a_failure_and_a_recovery_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, by_hand = Process(tmp_path / "journal"), Process(tmp_path / "journal")
    by_hand.ended("failed")
    assert told(caplog) == ["fails:"]
    server.ended("deferred")
    by_hand.ended("refused")
    assert told(caplog) == []
    server.ended("collected")
    assert told(caplog) == ["recovered"]
    by_hand.ended("no-mail")
    server.ended("no-mail")
    assert told(caplog) == []
    server.ended("failed")
    by_hand.ended("collected")
    assert told(caplog) == ["fails:", "recovered"]
    server.ended("failed")
    assert told(caplog) == ["fails:"]


def test_without_a_journal_a_failure_is_told_once_by_each_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    server = Process(tmp_path / "file/journal")  # which cannot be made there
    server.ended("failed")
    assert "fails:" in told(caplog)
    server.ended("failed")
    server.ended("busy")
    assert told(caplog) == []
    server.journal = Journal(tmp_path / "journal")  # it can be written again
    server.ended("failed")
    assert told(caplog) == []
    server.ended("collected")
    assert told(caplog) == ["recovered"]
