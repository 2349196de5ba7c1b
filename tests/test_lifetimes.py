"""What protects a message from a second handler lives as long as the first one works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.children import living_child
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue, Script, no_more_mail, scripted
from support.messages import MESSAGE
from support.project import Project, isp, provider
from support.salmon import Salmon
from support.serving import wait_for

from salmon_revsmtp.customer.locks import AgentLocks
from salmon_revsmtp.files import exclusive_lock
from salmon_revsmtp.journal.claims import CLAIMS, Claims, SharedClaims
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server import collector as module
from salmon_revsmtp.server.collector import Collector

SLOW = """
from salmon.routing import route, stateless

@route("(address)@(host)", address=".+")
@stateless
def STORE(message, address=None, host=None):
    with open("run/begun", "a") as begun:
        begun.write("begun\\n")
    with open("go") as go:
        go.read()
"""
SERVICES = "{'default': {'handler_timeout': 0.2}}"
LONG = 30


def message(code: int) -> Script:
    """A message, and what comes of it."""

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith(f"{code} ")
        provider.say("QUIT")
        await provider.replied(221)

    return script


@pytest.fixture
def slow(project: Project) -> Project:
    """A project whose handler goes on when :func:`go` says so."""
    (project.folder / "app/handlers/sample.py").write_text(SLOW)
    os.mkfifo(project.folder / "go")
    return project


def go(project: Project) -> None:
    os.close(os.open(project.folder / "go", os.O_RDWR | os.O_NONBLOCK))


def begun(project: Project) -> int:
    file = project.folder / "run/begun"
    return len(file.read_text().splitlines()) if file.exists() else 0


@contextlib.contextmanager
def collecting(project: Project, name: str) -> Iterator[subprocess.Popen[str]]:
    """The command, until its handler has begun; it ends when that may go on."""
    with subprocess.Popen(
        [sys.executable, "-m", "salmon_revsmtp", "collect", name],
        cwd=project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            wait_for(lambda: begun(project))
            assert "451" in process.stdout.readline()  # "not done in 0.2 seconds"
            yield process
        finally:
            go(project)
            process.communicate(timeout=LONG)


def test_a_second_collect_while_a_handler_of_the_first_still_runs(slow: Project) -> None:
    with provider(message(451), message(250), no_more_mail) as port:
        slow.configure(isp(port), services=SERVICES)
        with collecting(slow, "isp"):
            busy = slow.run("collect", "isp")
            assert busy.returncode == 1
            assert "busy" in busy.stdout and "handler" in busy.stdout, busy
        slow.run("collect", "isp")
    assert begun(slow) == 1


def test_another_agent_brings_the_same_message_to_another_process(slow: Project) -> None:
    again = (message(451), message(250), no_more_mail)
    with provider(message(451)) as one, provider(*again) as other:
        slow.configure(isp(one), isp(other, name="'other'"), services=SERVICES)
        with collecting(slow, "isp"):
            done = slow.run("collect", "other")
            assert "handled elsewhere" in done.stdout, done
        slow.run("collect", "other")
    assert begun(slow) == 1


def test_the_next_collection_in_the_same_process_waits_for_the_handler(salmon: Salmon) -> None:
    """As in a server: it is not busy, and the message is not handled again."""
    handler = Handler()
    salmon.handle(".*", handler)

    async def late(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>")
        await provider.replied(250)
        await provider.replied(250)
        provider.writer.write(b"BDAT %d LAST\r\n" % len(MESSAGE) + MESSAGE)
        handler.go.set()
        await provider.replied(250)
        provider.say("QUIT")
        await provider.replied(221)

    async def main(collector: Collector) -> None:
        await collector.collect(collector.configuration.agents)
        await collector.collect(collector.configuration.agents)

    async def all_of_it() -> None:
        async with scripted(message(451), late, no_more_mail) as port:
            with quick(salmon, port) as collector:
                # The second one waits longer than the first.
                await main(collector)

    asyncio.run(all_of_it())
    assert handler.times == 1


class Handler:
    """Goes on when it may."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.times = 0

    def __call__(self, message: Any) -> None:
        self.times += 1
        self.begun.set()
        assert self.go.wait(LONG)


def quick(salmon: Salmon, port: int) -> Collector:
    """A collector whose provider soon hears 451."""
    plugins = Plugins.load()
    service = {"hostname": "mail.example.org", "handler_timeout": 0.5}
    valid = configuration(agent_keys(port), plugins=plugins, default=service)
    return Collector(valid, plugins, lambda: salmon.relay)


def test_a_signal_while_a_late_handler_is_waited_for_gives_it_the_grace(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.1)
    handler = Handler()
    salmon.handle(".*", handler)

    async def main() -> Collector:
        async with scripted(message(451)) as port:
            collector = quick(salmon, port)
            await collector.collect(collector.configuration.agents, signals=[signal.SIGUSR1])
        return collector

    collector = asyncio.run(main())
    assert handler.begun.wait(LONG)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with collector:
            pass
        assert collector.interrupted
        assert not handler.go.is_set()
    finally:
        handler.go.set()


def test_a_signal_while_a_message_is_being_handled_gives_it_the_grace(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.1)
    handler = Handler()
    salmon.handle(".*", handler)

    async def unanswered(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("421 ")

    async def main() -> Collector:
        async with scripted(unanswered) as port:
            valid = configuration(agent_keys(port))
            collector = Collector(valid, Plugins.load(), lambda: salmon.relay)
            collecting = asyncio.create_task(
                collector.collect(valid.agents, signals=[signal.SIGUSR1])
            )
            await asyncio.to_thread(handler.begun.wait, LONG)
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.wait_for(collecting, LONG)
        return collector

    try:
        with asyncio.run(main()) as collector:
            assert collector.interrupted
        assert not handler.go.is_set()
    finally:
        handler.go.set()


def test_an_agents_lock_lives_as_long_as_its_last_share(tmp_path: Path) -> None:
    ours = AgentLocks(tmp_path)
    file = tmp_path / "agent-isp.lock"

    def free() -> bool:
        with exclusive_lock(file) as had:
            return had

    assert ours.share("isp")() is None, "there is nothing to share"
    with ours.collecting("isp") as first, ours.collecting("isp") as second:
        assert (first, second) == (True, False)
        one, other = ours.share("isp"), ours.share("isp")
    one()
    assert not free()
    with AgentLocks(tmp_path).collecting("isp") as elsewhere:
        assert not elsewhere
    with ours.collecting("isp") as again:
        assert again
        other()
        assert not free()
    assert free()


KEYS = [("default", f"{letter}@example.net", b"digest") for letter in "abc"]
IN_A_PROCESS = """
import sys
from salmon_revsmtp.journal.claims import Claims
from pathlib import Path
keys = [("default", f"{letter}@example.net", b"digest") for letter in "abc"]
print(sorted(key[1][0] for key in Claims(Path(sys.argv[1])).claim(keys)))
"""


def claimed_elsewhere(path: Path) -> str:
    """What another process may not have."""
    command = [sys.executable, "-c", IN_A_PROCESS, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_message_is_claimed_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / CLAIMS
    ours, others = Claims(path), Claims(path)
    assert ours.claim(KEYS[:2]) == set()
    assert ours.claim(KEYS[:2]) == set(), "it has them already"
    assert others.claim(KEYS) == set(KEYS[:2]), "of the same process"
    assert claimed_elsewhere(path) == "['a', 'b', 'c']"
    others.release(KEYS)
    assert claimed_elsewhere(path) == "['a', 'b']"
    ours.release(KEYS[:1])
    assert claimed_elsewhere(path) == "['b']"
    path.unlink()
    ours.release(KEYS)
    assert ours.claim(KEYS[:1]) == set()
    assert claimed_elsewhere(path) == "['a']"
    ours.release(KEYS)


def test_what_several_threads_claim_is_claimed_until_the_last_one_releases_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / CLAIMS
    ours, others = SharedClaims(path), Claims(path)
    assert others.claim(KEYS[2:]) == set()
    assert ours.claim(KEYS) == set(KEYS[2:])
    assert ours.claim(KEYS[:1]) == set()
    ours.release(KEYS[:2])
    assert claimed_elsewhere(path) == "['a', 'c']"
    ours.release(KEYS[:1])
    assert claimed_elsewhere(path) == "['c']"
    others.release(KEYS[2:])
    assert ours.claim(KEYS[2:]) == set()
    ours.release(KEYS[2:])
    assert claimed_elsewhere(path) == "[]"


def test_a_child_does_not_have_the_claims(tmp_path: Path) -> None:
    path = tmp_path / CLAIMS
    ours = Claims(path)
    ours.claim(KEYS)
    with living_child():
        ours.release(KEYS)
        assert claimed_elsewhere(path) == "[]"


def test_claims_that_cannot_be_made_are_no_reason_not_to_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    claims = Claims(tmp_path / CLAIMS)
    assert claims.claim(KEYS) == set()
    claims.release(KEYS)
    assert claims.claim(KEYS) == set()
    claims.release(KEYS)
    assert caplog.text.count("cannot be made") == 1
