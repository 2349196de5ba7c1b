"""Hooks that block: they have threads of their own, and hold up no one else."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.message import EmailMessage
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
from salmon import queue
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue, no_more_mail, scripted
from support.messages import MESSAGE
from support.project import Project, isp, one_message
from support.salmon import Salmon
from support.servers import free_port
from support.serving import RUN, START, server, wait_for

from salmon_revsmtp import Server, SettingsError, hookimpl
from salmon_revsmtp.plugins import manager
from salmon_revsmtp.plugins.manager import ENTRY_POINTS, Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.configuration import load
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.server.eventloop import run

LONG = 30
# More than any pool of threads has.
MANY = 80


class Blocks:
    """A plugin, one of whose hooks blocks for every agent but one."""

    def __init__(self, hook: str) -> None:
        self._hook = hook
        self.blocked: list[str] = []
        self.go = threading.Event()

    def _called(self, hook: str, agent: Any) -> None:
        if hook == self._hook and agent.name != "good":
            self.blocked.append(agent.name)
            self.go.wait(LONG)

    @hookimpl
    def may_collect(self, agent: Any) -> None:
        self._called("may_collect", agent)

    @hookimpl
    def collection_started(self, agent: Any) -> None:
        self._called("collection_started", agent)

    @hookimpl
    def connection_reversed(self, agent: Any, session: Any) -> None:
        self._called("connection_reversed", agent)

    @hookimpl
    def collection_finished(self, agent: Any, report: Any) -> None:
        self._called("collection_finished", agent)


@pytest.fixture(params=["may_collect", "collection_started", "collection_finished"])
def blocks(request: pytest.FixtureRequest) -> Iterator[Blocks]:
    plugin = Blocks(request.param)
    yield plugin
    plugin.go.set()


def test_a_hook_that_blocks_for_many_agents_does_not_hold_up_another(
    salmon: Salmon, blocks: Blocks
) -> None:
    plugins = Plugins.load()
    plugins.register(blocks)

    async def main() -> None:
        async with scripted(no_more_mail) as port:
            bad = [agent_keys(free_port(), name=f"bad{one}", every=0.002) for one in range(MANY)]
            valid = configuration(*bad, agent_keys(port, name="good", every=60), plugins=plugins)
            collector = Collector(valid, plugins, lambda: salmon.relay)
            daemon = Daemon(collector, plugins)
            running = asyncio.create_task(daemon.run())
            give_up = time.monotonic() + LONG
            while not collector.journal.history("good") or len(blocks.blocked) < MANY:
                assert time.monotonic() < give_up
                await asyncio.sleep(0.05)
            assert collector.journal.history("good")[0].outcome == "no-mail"
            daemon.stop()
            await asyncio.wait_for(running, LONG)
            collector.close()

    run(main())
    assert not blocks.go.is_set(), "the end has not waited for them, either"
    assert len(blocks.blocked) == len(set(blocks.blocked)), "one thread for an agent and a hook"


def test_a_hook_that_does_not_return_is_left_out(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(manager, "HOOK_TIMEOUT", 0.1)
    plugin, plugins = Blocks("collection_started"), Plugins.load()
    plugins.register(plugin, "slow-one")

    async def main() -> list[str]:
        async with scripted(no_more_mail, no_more_mail) as port:
            valid = configuration(agent_keys(port), plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                reports = await collector.collect(valid.agents)
                reports += await collector.collect(valid.agents)
        return [report.outcome.value for report in reports]

    try:
        assert run(main()) == ["no-mail", "no-mail"]
    finally:
        plugin.go.set()
    assert plugin.blocked == ["isp"]
    assert "plugin=slow-one hook=collection_started has not returned in 0.1 s" in caplog.text
    assert "hook=collection_started still runs" in caplog.text


class BlocksMessages:
    """A plugin, one of whose hooks for messages blocks for every agent but one."""

    def __init__(self, hook: str) -> None:
        self._hook = hook
        self.go = threading.Event()

    def _called(self, hook: str, agent: Any) -> None:
        if hook == self._hook and agent.name != "good":
            self.go.wait(LONG)

    @hookimpl
    def message_received(self, agent: Any, message: bytes) -> None:
        self._called("message_received", agent)

    @hookimpl
    def message_delivered(self, agent: Any, recipient: str) -> None:
        self._called("message_delivered", agent)


async def deferred(provider: Dialogue) -> None:
    await provider.reverse()
    assert (await provider.send(MESSAGE)).startswith("451 ")
    await provider.quit()


@pytest.mark.parametrize("hook", ["message_received", "message_delivered"])
@pytest.mark.parametrize("delivery", ["router", "queue"])
def test_a_hook_that_blocks_for_messages_holds_up_no_other_agents(
    salmon: Salmon, hook: str, delivery: str
) -> None:
    salmon.handle(".*")
    blocks, plugins = BlocksMessages(hook), Plugins.load()
    plugins.register(blocks)
    service = {"hostname": "mail.example.org", "delivery": delivery}

    async def main() -> tuple[list[str], str]:
        async with (
            scripted(deferred) as one,
            scripted(deferred) as other,
            scripted(one_message, no_more_mail) as good,
        ):
            valid = configuration(
                agent_keys(one, name="bad", service="hasty"),
                agent_keys(other, name="worse", service="hasty"),
                agent_keys(good, name="good"),
                plugins=plugins,
                default=service,
                hasty={**service, "handler_timeout": 0.5},
            )
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                first = await collector.collect(valid.agents[:2])
                [last] = await collector.collect(valid.agents[2:])
                assert not blocks.go.is_set()
                blocks.go.set()
        return [report.outcome.value for report in first], last.outcome.value

    assert asyncio.run(main()) == (["failed", "failed"], "collected")


PLUGIN = """
import atexit, threading
from salmon_revsmtp import Server, SettingsError, hookimpl

@hookimpl
def {hook}(agent):
    open("run/blocks", "w").close()
    {ending}threading.Event().wait()
"""


def install(project: Project, hook: str, ending: str = "") -> None:
    (project.folder / "blocking.py").write_text(PLUGIN.format(hook=hook, ending=ending))
    distribution = project.folder / "blocking-1.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: blocking\nVersion: 1\n")
    (distribution / "entry_points.txt").write_text("[salmon_revsmtp]\nblocking = blocking\n")


@pytest.mark.parametrize("command", [START, RUN])
@pytest.mark.parametrize("ending", ["", "atexit.register(threading.Event().wait); "])
def test_a_stop_does_not_wait_for_a_hook_that_blocks(
    project: Project, command: list[str], ending: str
) -> None:
    """Nor for what a plugin wants to be done at the end."""
    install(project, "may_collect", ending)
    project.receiver_port = free_port()
    project.configure(isp(1))
    with server(project, command) as process:
        wait_for((project.folder / "run/blocks").exists, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0


def test_collect_ends_at_a_signal_although_a_hook_blocks(project: Project) -> None:
    install(project, "collection_started")
    project.configure(isp(1))
    with subprocess.Popen(
        [sys.executable, "-m", "salmon_revsmtp", "collect", "isp"],
        cwd=project.folder,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for((project.folder / "run/blocks").exists)
        process.send_signal(signal.SIGTERM)
        assert "interrupted" in process.communicate(timeout=LONG)[1]
        assert process.returncode == 1


# -- the server ------------------------------------------------------------------------------------


class Watches:
    """A plugin that notes what it hears of the server, and what the server says."""

    def __init__(self, started: threading.Event) -> None:
        self.started = started
        self.heard: list[tuple[Any, ...]] = []
        self.server: Server | None = None

    @hookimpl
    def server_started(self, server: Server) -> None:
        self.server = server
        rows, troubles = server.status(), server.troubles()
        kinds = {row["status"] for row in rows}
        self.heard.append(("started", kinds, [one.key for one in troubles]))
        self.started.set()

    @hookimpl
    def server_stopping(self, server: Server) -> None:
        self.heard.append(("stopping", server is self.server))


class Hangs:
    """A plugin that does what a plugin must not do."""

    def __init__(self, go: threading.Event) -> None:
        self._go = go

    @hookimpl(tryfirst=True)
    def server_started(self) -> None:
        self._go.wait(LONG)

    @hookimpl(tryfirst=True)
    def server_stopping(self) -> None:
        self._go.wait(LONG)


class Raises:
    @hookimpl(tryfirst=True)
    def server_started(self, server: Server) -> None:
        raise RuntimeError("what a plugin")

    @hookimpl(tryfirst=True)
    def server_stopping(self, server: Server) -> None:
        raise RuntimeError("what a plugin")


def served(salmon: Salmon, plugins: Plugins, started: threading.Event, grace: float = 10) -> float:
    """Run a server until ``started`` is set; returns the seconds that its end took."""
    queue.Queue("run/undeliverable").push(MESSAGE)

    async def main() -> float:
        valid = configuration(agent_keys(1, every=None), plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            daemon = Daemon(collector, plugins, grace)
            running = asyncio.create_task(daemon.run())
            assert await asyncio.to_thread(started.wait, LONG)
            daemon.stop()
            began = time.monotonic()
            await asyncio.wait_for(running, LONG)
            return time.monotonic() - began

    return run(main())


def test_a_plugin_hears_that_the_server_has_started_and_that_it_stops(salmon: Salmon) -> None:
    started, plugins = threading.Event(), Plugins.load()
    watches = Watches(started)
    plugins.register(watches)
    before = time.time()
    served(salmon, plugins, started)
    assert watches.heard == [
        ("started", {"server", "agent", "queue", "service", "trouble"}, ["undeliverable"]),
        ("stopping", True),
    ]
    server = watches.server
    assert server is not None and server.project == salmon.folder
    assert before <= server.started <= time.time() and server.version
    with pytest.raises(RuntimeError, match="stopped"):
        server.status()


def test_a_plugin_that_raises_or_blocks_keeps_no_other_from_it_and_costs_the_server_nothing(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    started, go, plugins = threading.Event(), threading.Event(), Plugins.load()
    watches = Watches(started)
    for plugin in (Raises(), Hangs(go), watches):
        plugins.register(plugin)
    try:
        seconds = served(salmon, plugins, started, grace=0.3)
    finally:
        go.set()
    assert 0.3 <= seconds < LONG / 2, "no longer than the grace"
    assert [what for what, *_ in watches.heard] == ["started", "stopping"]
    assert caplog.text.count("RuntimeError: what a plugin") == 2


def test_what_a_plugin_sends_waits_for_the_relay(salmon: Salmon) -> None:
    sent = threading.Event()

    class Sends:
        @hookimpl
        def server_started(self, server: Server) -> None:
            message = EmailMessage()
            message["Subject"] = "hello"
            message.set_content("hi")
            server.send(message, "ann@example.net")
            sent.set()

    plugins = Plugins.load()
    plugins.register(Sends())
    served(salmon, plugins, sent)
    [(sender, to, text)] = salmon.relayed
    assert (sender, to) == ("<>", "ann@example.net") and "Subject: hello" in text


def test_a_plugin_says_what_is_wrong_with_its_own_settings() -> None:
    class Pager:
        @hookimpl
        def check_settings(self, settings: Any) -> list[str]:
            return [f"pager: found {settings.pager!r}, allowed: a port"]

    class Broken:
        @hookimpl
        def check_settings(self, settings: Any) -> list[str]:
            raise RuntimeError

    plugins = Plugins.load()
    for plugin in (Broken(), Pager()):
        plugins.register(plugin)
    with pytest.raises(SettingsError) as caught:
        load(SimpleNamespace(pager="x"), plugins)  # type: ignore[arg-type]
    assert caught.value.problems == ["pager: found 'x', allowed: a port"]


def test_a_plugin_that_is_found_twice_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same distribution, by two entries of ``sys.path``; another one may have its name."""
    found = {name: metadata.distribution(name) for name in ("salmon-revsmtp", "pluggy")}

    def point(distribution: str, value: str) -> metadata.EntryPoint:
        made: Any = metadata.EntryPoint("twice", value, ENTRY_POINTS)
        return made._for(found[distribution])  # type: ignore[no-any-return]

    points = [
        point("salmon-revsmtp", "json"),
        point("salmon-revsmtp", "json"),
        point("pluggy", "re"),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    loaded = Plugins.load().loaded
    assert [(one.plugin, one.distribution) for one in loaded] == [
        ("twice", "salmon-revsmtp"),
        ("twice", "pluggy"),
    ]
    assert loaded[0].version == found["salmon-revsmtp"].version
    assert loaded[0].error is None and "twice" in str(loaded[1].error)
