"""What a plugin has of the running server: what the commands show and do, from any thread."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from salmon import queue
from support.configuration import PASSWORD, agent_keys, configuration
from support.dialogue import Dialogue, Script, no_more_mail, scripted
from support.messages import MESSAGE
from support.salmon import Salmon
from test_provider_commands import ACME, OTHER, PROVIDER, put, settings_of

from salmon_revsmtp import Server, Trouble, hookimpl
from salmon_revsmtp.journal.collections import TRAFFIC_SPAN, Journal, Passed
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.server.eventloop import run
from salmon_revsmtp.server.overheard import HEAD, TAIL, Outline

LONG = 30


class Has:
    """A plugin that has the server."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.server: Server | None = None

    @hookimpl
    def server_started(self, server: Server) -> None:
        self.server = server
        self.there.set()


def beside(
    salmon: Salmon,
    work: Callable[[Server], Any],
    *scripts: Script,
    make: Callable[[Plugins, int], Any] | None = None,
) -> Server:
    """Do something in a thread beside a server, whose agent ``isp`` meets these scripts."""
    salmon.handle(".*")
    plugin, plugins = Has(), Plugins.load()
    plugins.register(plugin)

    async def main() -> None:
        async with scripted(*scripts) as port:
            valid = (make or _agent)(plugins, port)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                daemon = Daemon(collector, plugins)
                running = asyncio.create_task(daemon.run())
                try:
                    assert await asyncio.to_thread(plugin.there.wait, LONG)
                    assert plugin.server is not None
                    await asyncio.wait_for(asyncio.to_thread(work, plugin.server), LONG)
                finally:
                    daemon.stop()
                    await asyncio.wait_for(running, LONG)

    run(main())
    assert plugin.server is not None
    return plugin.server


def _agent(plugins: Plugins, port: int) -> Any:
    keys = agent_keys(port, every=None, parameters="acme s3cret-token example.org", domains=[])
    service = {"hostname": "mail.example.org", "domains": ["example.org"]}
    return configuration(keys, plugins=plugins, default=service)


async def two_messages(provider: Dialogue) -> None:
    await provider.reverse()
    await provider.send(MESSAGE)
    await provider.send(MESSAGE + b"another\r\n")
    await provider.quit()


def test_a_collection_and_what_is_known_of_it_afterwards(salmon: Salmon) -> None:
    def work(server: Server) -> None:
        [row] = server.agents()
        assert (row["agent"], row["outcome"], row["enabled"]) == ("isp", None, True)
        assert server.dialogue("isp") == [] and server.history() == []
        *progress, last = server.collect("isp")
        report = last["report"] if "report" in last else progress[-1]["report"]
        assert (report["outcome"], report["messages"]) == ("collected", 2)
        [row] = server.agents()
        assert (row["outcome"], row["next"], row["push"]) == ("collected", None, None)
        [entry] = server.history("isp")
        assert entry["messages"] == 2 and entry == server.history(outcome="collected")[0]
        assert server.history(outcome="failed") == []
        activity = server.activity()["agents"]["isp"]
        assert (activity["messages"], activity["ended"]) == (2, 1)
        assert activity["bytes"] == entry["bytes"] > 0
        assert sum(one[1] for one in server.traffic("isp", 86400, 96)) == 2
        found = server.traffic(None, 7 * 86400, 42)
        assert len(found) == 42 and found[-1][1:] == (2, entry["bytes"])
        assert found[0][0] + 7 * 86400 == pytest.approx(time.time(), abs=TRAFFIC_SPAN + 1)

    beside(salmon, work, two_messages, no_more_mail)
    assert len(salmon.handled) == 2


def test_the_dialogue_is_in_outline_without_content_and_secrets(salmon: Salmon) -> None:
    def work(server: Server) -> None:
        list(server.collect("isp"))
        lines = server.dialogue("isp")
        text = "\n".join(lines)
        assert any(line.startswith("C: ATRN") for line in lines) and "S: 250" in text
        assert PASSWORD not in text and "s3cret-token" not in text
        assert not any(word in text for word in MESSAGE.decode().split("\r\n\r\n")[1].split())
        assert "octets of a message" in text

    beside(salmon, work, two_messages, no_more_mail)


def test_an_outline_is_bounded_and_says_where_it_has_a_gap() -> None:
    outline = Outline()
    for number in range(1000):
        outline(f"C: {number} " + "x" * 10_000)
    lines = outline.lines()
    assert len(lines) == HEAD + 1 + TAIL and "not kept" in lines[HEAD]
    assert lines[0].startswith("C: 0 ") and lines[-1].startswith("C: 999 ")
    assert max(map(len, lines)) <= 200


def test_a_long_session_is_not_traced_to_its_end(salmon: Salmon) -> None:
    async def many(provider: Dialogue) -> None:
        await provider.reverse()
        for number in range(HEAD):
            await provider.send(MESSAGE + b"%d\r\n" % number)
        await provider.quit()

    def work(server: Server) -> None:
        list(server.collect("isp"))
        lines = server.dialogue("isp")
        assert len(lines) < HEAD + 1 + TAIL
        assert any("not kept" in line for line in lines)
        assert "453" in "\n".join(lines[HEAD:]), "but what ended it is there"

    beside(salmon, work, many, no_more_mail)


def test_settings_are_shown_without_secrets(salmon: Salmon) -> None:
    def work(server: Server) -> None:
        found = server.settings_of("isp")
        assert (found["password"], found["account"], found["tls"]) == ("***", "acme", "none")
        assert "s3cret-token" not in found["parameters"] and "example.org" in found["parameters"]
        assert found["enabled"] is True
        json.dumps(found)
        server.set_enabled("isp", False)
        assert server.settings_of("isp")["enabled"] is False
        [row] = server.agents()
        assert row["title"] == "isp (Disabled)"
        [last] = [row["report"] for row in server.collect("isp") if "report" in row]
        assert last["outcome"] == "disabled"
        server.set_enabled("isp", True)
        assert server.agents()[0]["enabled"] is True

    beside(salmon, work)
    assert Journal().state("isp").enabled is True


async def up_to_login(provider: Dialogue) -> None:
    await provider.up_to_atrn()
    await provider.asks("QUIT", "221 bye")


def test_check_tries_the_agent(salmon: Salmon) -> None:
    def work(server: Server) -> None:
        found = server.check("isp")
        assert found["outcome"] is None and found["auth"] == "CRAM-MD5"

    beside(salmon, work, up_to_login)

    def refused(server: Server) -> None:
        found = server.check("isp")
        assert found["outcome"] and found["error"] == found["problems"][0]

    beside(salmon, refused, make=lambda plugins, _: _agent(plugins, 1))


def test_what_there_is_not_is_said(salmon: Salmon) -> None:
    def work(server: Server) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: server.collect("nobody"),
            lambda: server.set_enabled("nobody", True),
            lambda: server.check("nobody"),
            lambda: server.settings_of("nobody"),
            lambda: server.dialogue("nobody"),
            lambda: server.history("nobody"),
            lambda: server.traffic("nobody", 1, 1),
            lambda: server.waiting("unsent", after="nothing"),
            lambda: server.waiting_message("undeliverable", "../../etc/passwd"),
        ]
        for call in calls:
            with pytest.raises(LookupError):
                call()
        assert server.accounts() == server.sessions() == server.held() == []

    beside(salmon, work)


def test_who_stops_reading_does_not_stop_the_collection(salmon: Salmon) -> None:
    def work(server: Server) -> None:
        server.collect("isp")
        give_up = time.monotonic() + LONG
        while not server.history("isp"):
            assert time.monotonic() < give_up
            time.sleep(0.02)

    beside(salmon, work, two_messages, no_more_mail)
    assert len(salmon.handled) == 2


def test_when_it_has_stopped_it_says_so(salmon: Salmon) -> None:
    server = beside(salmon, lambda server: None)
    calls: list[Callable[[], Any]] = [
        server.agents,
        server.activity,
        server.troubles,
        lambda: list(server.collect("isp")),
        lambda: server.drop_waiting("unsent", ["x"]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="the server has stopped"):
            call()


def test_many_threads_ask_at_the_same_time(salmon: Salmon) -> None:
    def work(server: Server) -> None:
        found: list[int] = []

        def ask() -> None:
            for _ in range(20):
                found.append(len(server.agents()) + len(server.activity()["agents"]))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [2] * 160

    beside(salmon, work)


# -- what waits for a person ----------------------------------------------------------------------


def test_undeliverable_mail_is_shown_retried_and_dropped(salmon: Salmon) -> None:
    for number in range(3):
        queue.Queue("run/undeliverable").push(MESSAGE + b"%d\r\n" % number)

    def work(server: Server) -> None:
        first, second, third = server.waiting("undeliverable")
        assert not first["envelope"] and first["size"] > len(MESSAGE) - 50
        assert server.waiting("undeliverable", 1, first["key"]) == [second]
        found = server.waiting_message("undeliverable", second["key"])
        assert "Subject:" in found["header"] and found["key"] == second["key"]
        whole = server.waiting_message("undeliverable", second["key"], content=True)
        assert whole["content"].endswith(b"1\n") or whole["content"].endswith(b"1\r\n")
        [row] = server.retry_waiting("undeliverable", [first["key"]], to="a@example.org")
        assert row["done"], row
        [gone] = server.drop_waiting("undeliverable", [second["key"]])
        [again] = server.drop_waiting("undeliverable", [second["key"]])
        assert gone["done"] and not again["done"] and again["remark"]
        assert [one["key"] for one in server.waiting("undeliverable")] == [third["key"]]

    beside(salmon, work)
    assert len(salmon.handled) == 1


def test_the_rows_are_those_of_the_command(salmon: Salmon) -> None:
    settings_of(salmon.folder)
    queue.Queue("run/undeliverable").push(MESSAGE)

    def printed(*arguments: str) -> list[Any]:
        command = [sys.executable, "-m", "salmon_revsmtp", *arguments, "--json"]
        done = subprocess.run(command, cwd=salmon.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def work(server: Server) -> None:
        key = server.held()[0]["key"]
        assert server.accounts() == printed("provider", "accounts")
        assert server.sessions() == printed("provider", "sessions")
        assert server.held("acme") == printed("provider", "held", "--account", "acme")
        [shown] = printed("provider", "held", "show", str(key))
        found = server.held_message(key)
        assert found.pop("cut") is False and found == shown

    with holding(salmon) as make:
        beside(salmon, work, make=make)


# -- a provider -----------------------------------------------------------------------------------


@contextmanager
def holding(salmon: Salmon) -> Iterator[Callable[[Plugins, int], Any]]:
    """A provider that holds two messages."""

    def make(plugins: Plugins, port: int) -> Any:
        valid = configuration(plugins=plugins, accounts=[ACME, OTHER], provider=PROVIDER)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            put(collector.providing.store)
            put(collector.providing.store, "other", "b@example.com")
        return valid

    yield make


def test_held_mail_is_shown_and_treated(salmon: Salmon) -> None:
    def work(server: Server) -> None:
        acme, other = server.accounts()
        assert (acme["messages"], other["messages"], acme["failed_logins"]) == (1, 1, 0)
        [first, second] = server.held()
        assert server.held("other") == server.held(after=first["key"]) == [second]
        assert server.held(limit=1) == [first]
        found = server.held_message(first["key"], content=True)
        assert (
            found["content"]
            .replace(b"\r\n", b"\n")
            .endswith(MESSAGE.replace(b"\r\n", b"\n").partition(b"\n\n")[2])
        )
        [row] = server.retry_held([first["key"]])
        assert row["key"] == first["key"]
        [row] = server.drop_held([first["key"]])
        assert row["done"]
        [row] = server.bounce_held([second["key"]])
        assert row["done"], row
        assert server.held() == []
        with pytest.raises(LookupError):
            server.held_message(first["key"])

    with holding(salmon) as make:
        beside(salmon, work, make=make)


# -- troubles of plugins, and traffic -------------------------------------------------------------


def test_a_plugin_reports_a_trouble_until_it_is_over(salmon: Salmon) -> None:
    def work(server: Server) -> None:
        mine = Trouble("mine:port", "The port is taken.", 1.0)
        server.troubles()  # the look at the start is over, which would not have it
        server.report(mine)
        assert [one for one in server.troubles() if one.key == "mine:port"] == [mine]
        assert any(row.get("text") == mine.text for row in server.status())
        server.over("mine:port")
        server.over("mine:port")
        assert not [one for one in server.troubles() if one.key == "mine:port"]

    beside(salmon, work)


def test_traffic_is_summed_up_and_forgotten_after_a_week(salmon: Salmon) -> None:
    journal, now = Journal(), 1_795_700_000.0
    day = 86400.0
    journal.passed([Passed("isp", 1, 10), Passed("mx", 5, 50)], now - 9 * day)
    journal.passed([Passed("isp", 2, 20)], now - 2 * day)
    journal.passed([Passed("isp", 3, 30)], now)
    journal.passed([Passed("isp", 4, 40), Passed("mx", 1, 1)], now + 1)
    assert [one[1:] for one in journal.traffic("isp", 0)] == [(2, 20), (7, 70)]
    assert [one[1:] for one in journal.traffic(None, now - day)] == [(8, 71)]
    journal.passed([Passed("isp", 1, 1)], now - day)
    assert [one[1:] for one in journal.traffic("isp", 0)] == [(2, 20), (1, 1)], "the clock was set"


def test_a_push_session_counts_while_it_is_open(salmon: Salmon) -> None:
    """Its traffic is that of when the mail came, not of its end."""
    go = threading.Event()

    async def slow(provider: Dialogue) -> None:
        await provider.reverse()
        await provider.send(MESSAGE)
        await asyncio.to_thread(go.wait, LONG)
        await provider.quit()

    def work(server: Server) -> None:
        rows = server.collect("isp")
        try:
            give_up = time.monotonic() + LONG
            while server.activity()["agents"]["isp"]["messages"] < 1:
                assert time.monotonic() < give_up
                time.sleep(0.02)
            assert server.activity()["agents"]["isp"]["running"]
            assert server.agents()[0]["running"] is True
            assert sum(one[1] for one in server.traffic("isp", 86400, 4)) == 1
        finally:
            go.set()
        list(rows)
        assert sum(one[1] for one in server.traffic("isp", 86400, 4)) == 1, "and not twice"

    beside(salmon, work, slow, no_more_mail)
