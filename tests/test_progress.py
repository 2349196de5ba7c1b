"""What a person sees while collections run, of this process and of the running server, and what
ctrl-c does to each."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue, no_more_mail, scripted
from support.ends import Ends, both_ends
from support.messages import MESSAGE
from support.project import Project, isp, one_message, provider
from support.salmon import Salmon
from support.servers import free_port
from support.serving import RUN, server, wait_for
from support.terminal import on_a_terminal

from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.control import SOCKET, Answers, Control
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.server.overheard import MOST_LINES, Overheard


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path / "project")
    made.receiver_port = free_port()
    return made


def slow(until: threading.Event) -> Callable[[Dialogue], Awaitable[None]]:
    """A provider that sends a message and then waits."""

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        await provider.send(MESSAGE)
        await asyncio.to_thread(until.wait, 60)
        await provider.quit()

    return script


# -- progress --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_server", [False, True])
def test_progress_has_the_time_the_rate_the_phase_and_a_spinner_that_spins(
    project: Project, by_server: bool
) -> None:
    go_on = threading.Event()

    def let_go() -> str:
        go_on.set()
        return ""

    def collect() -> str:
        status, seen = on_a_terminal(
            project.folder, "collect", "isp", answers=[("next message, 3 s", let_go)]
        )
        assert status == 0
        return seen

    with provider(slow(go_on), no_more_mail) as port:
        project.configure(isp(port, every="None"))
        if by_server:
            with server(project, RUN):
                seen = collect()
        else:
            seen = collect()
    counts = rf"isp: 1 message, {len(MESSAGE)} bytes in 0:0\d"
    rate = r"\(\d+\.\d messages/s, [\d.]+ (bytes|KB)/s\)"
    assert re.search(rf"{counts} {rate}; waiting for the provider's next message", seen)
    times = re.findall(r"in 0:0(\d)", seen)
    assert times == sorted(times) and len(set(times)) > 1
    assert "asking the running server" not in seen
    assert len(set(re.findall("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", seen))) >= 5
    assert "isp: collected, 1 message" in seen


def test_a_server_that_is_slow_to_answer_is_waited_for_in_words(project: Project) -> None:
    project.configure(isp(1))
    go_on = threading.Event()

    async def stuck(request: dict[str, Any]) -> Answers:
        await asyncio.to_thread(go_on.wait, 60)
        yield {"report": {"agent": "isp", "protocol": "odmr", "outcome": "no-mail"}}
        yield {"end": True}

    def let_go() -> str:
        go_on.set()
        return ""

    async def main() -> None:
        control = Control(stuck, project.folder / SOCKET)
        await control.start()
        answers = [("isp: 0 messages, 0 bytes in 0:02; asking the running server", let_go)]
        status, seen = await asyncio.to_thread(
            on_a_terminal, project.folder, "collect", "isp", answers=answers
        )
        assert status == 0 and "isp: no-mail" in seen
        await control.stop()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("environment", "spun"),
    [({"PYTHONIOENCODING": "ascii"}, "-\\|/"), ({"NO_COLOR": "1"}, "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")],
)
def test_progress_on_a_narrow_terminal_without_unicode_or_colours(
    project: Project, environment: dict[str, str], spun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def let_go() -> str:
        go_on.set()
        return ""

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with provider(slow(go_on), no_more_mail) as port:
        project.configure(isp(port))
        answers = [("message, 2", let_go)]
        status, seen = on_a_terminal(project.folder, "collect", "isp", answers=answers, width=36)
    assert status == 0 and "Traceback" not in seen
    assert sum(f"{one} isp: " in seen for one in spun) >= 3


def test_a_terminal_that_obeys_nothing_gets_plain_lines(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port))
        status, seen = on_a_terminal(project.folder, "collect", "isp", term="dumb")
    assert status == 0
    assert seen.startswith("isp: collected, 1 message") and "\x1b" not in seen


def test_the_outcome_of_a_report_is_coloured_on_a_terminal_only(project: Project) -> None:
    async def refuses(provider: Dialogue) -> None:
        provider.say("554 go away")

    with provider(refuses, refuses) as port:
        project.configure(isp(port))
        _, seen = on_a_terminal(project.folder, "collect", "isp", colours=True)
        assert "isp: \x1b[31mrefused\x1b[0m" in seen
        done = project.run("collect", "isp", FORCE_COLOR="1")
        assert done.stdout.startswith("isp: refused") and "\x1b" not in done.stdout


# -- ctrl-c ----------------------------------------------------------------------------------------


def test_ctrl_c_leaves_a_collection_to_the_server_that_runs_it(project: Project) -> None:
    go_on = threading.Event()
    with provider(slow(go_on), no_more_mail) as port:
        project.configure(isp(port, every="None"))
        with server(project, RUN) as process:
            status, seen = on_a_terminal(
                project.folder, "collect", "isp", answers=[("isp: 1 message", "\x03")]
            )
            assert status == 1
            assert "error: interrupted; the server goes on collecting from isp: " in seen
            assert "`salmon-revsmtp history isp` shows how it ends" in seen
            assert process.poll() is None
            go_on.set()
            wait_for(lambda: project.run("history", "--json").stdout)
            row = json.loads(project.run("history", "--json").stdout)
    assert (row["outcome"], row["messages"], row["error"]) == ("collected", 1, None)


# -- the dialogue of the server --------------------------------------------------------------------


def test_verbose_shows_the_dialogue_of_a_collection_of_the_server(project: Project) -> None:
    with provider(one_message, no_more_mail, one_message, no_more_mail, no_more_mail) as port:
        project.configure(isp(port, every="None"))
        with server(project, RUN):
            done = project.run("collect", "isp", "-v")
            assert done.returncode == 0
            assert done.stdout.startswith("isp: collected, 1 message")
            lines = done.stderr.splitlines()
            assert lines[0].startswith("S: 220 ")
            for line in (
                "C: AUTH CRAM-MD5",
                "C: ***",
                "C: ATRN example.org",
                "S: 453 you have no mail",
            ):
                assert line in lines
            assert any(line.startswith("customer: 220 ") for line in lines)
            assert any("MAIL FROM:<a@example.net>" in line for line in lines)
            assert any(f"[{len(MESSAGE)} octets of a message]" in line for line in lines)
            assert "Subject" not in done.stderr and "hello" not in done.stderr
            # No one else hears it: not the log, and not who did not ask.
            quiet = project.run("collect", "isp", "--json")
            assert (quiet.returncode, quiet.stderr) == (0, "")
            both = project.run("collect", "isp", "-v", "--json")
            assert json.loads(both.stdout)["outcome"] == "no-mail"
            assert "C: ATRN example.org" in both.stderr
    assert "ATRN" not in (project.folder / "server.log").read_text()
    assert b"C: ATRN" not in b"".join(
        path.read_bytes() for path in (project.folder / "logs").iterdir()
    )


def test_verbose_names_the_agents_where_there_are_several(project: Project) -> None:
    with provider(no_more_mail) as one, provider(no_more_mail) as two:
        project.configure(isp(one, every="None"), isp(two, name="'two'", every="None"))
        with server(project, RUN):
            done = project.run("collect", "--all", "-v")
    assert {"isp C: ATRN example.org", "two C: ATRN example.org"} <= set(done.stderr.splitlines())


def test_verbose_says_so_if_the_collection_runs_already(project: Project) -> None:
    go_on = threading.Event()
    with provider(slow(go_on), no_more_mail) as port:
        project.configure(isp(port, every="60"))
        with server(project, RUN):
            wait_for(project.got)
            done = project.run("collect", "isp", "-v")
            assert done.stdout.startswith("isp: busy")
            assert "warning: isp: no dialogue is shown: it began before this command" in done.stderr
            go_on.set()
            wait_for(lambda: project.run("history", "--json").stdout)


def test_verbose_says_since_when_a_push_session_is_open(salmon: Salmon) -> None:
    async def work(ends: Ends) -> None:
        await ends.open()
        await ends.until(ends.home._pushing)
        request = {"do": "collect", "agents": ["isp"], "verbose": True}
        answers = [one async for one in ends.home._answer(request)]
        assert answers[0] == {"verbose": True}
        [why] = [one["unheard"] for one in answers if "unheard" in one]
        [report] = [one["report"] for one in answers if "report" in one]
        assert f"its push session is open since {report['push']}" in why
        assert not [one for one in answers if "dialogue" in one]

    both_ends(salmon, work)


def test_a_server_that_is_older_shows_none_and_this_is_said(project: Project) -> None:
    project.configure(isp(1))

    async def older(request: dict[str, Any]) -> Answers:
        yield {"agent": "isp", "messages": 0, "bytes": 0, "doing": "connecting", "seconds": 0.1}
        report = {"agent": "isp", "protocol": "odmr", "outcome": "no-mail", "messages": 0}
        yield {"report": report}
        yield {"end": True}

    async def main() -> None:
        control = Control(older, project.folder / SOCKET)
        await control.start()
        done = await asyncio.to_thread(project.run, "collect", "isp", "-v")
        assert done.returncode == 0
        assert done.stderr.startswith("warning: the running server is older than this command")
        assert done.stderr.count("older") == 1
        await control.stop()

    asyncio.run(main())


def test_what_is_not_read_in_time_is_counted_and_not_kept() -> None:
    overheard = Overheard()
    for number in range(10_000):
        overheard(f"line {number} " + "x" * 100_000)
    lines = list(overheard.taken())
    assert len(lines) == MOST_LINES + 1
    assert sum(map(len, lines)) < 400_000
    assert lines[0].startswith("line 0 ")
    assert lines[-1].startswith(f"[{10_000 - MOST_LINES} lines are left out: ")
    overheard("goes on")
    assert list(overheard.taken()) == ["goes on"]
    overheard.close()
    overheard("no one is there")
    assert list(overheard.taken()) == []


def test_who_asks_and_does_not_read_holds_up_nothing(salmon: Salmon) -> None:
    number = 600
    salmon.handle(".*")

    async def many(provider: Dialogue) -> None:
        await provider.reverse()
        for each in range(number):
            await provider.send(b"Subject: %d\r\n\r\n" % each)
        await provider.quit()

    async def main() -> None:
        plugins = Plugins.load()
        async with scripted(many, no_more_mail) as port:
            valid = configuration(agent_keys(port, every=None), plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                daemon = Daemon(collector, plugins)
                started = asyncio.Event()
                running = asyncio.create_task(daemon.run(started.set))
                await started.wait()
                request = {"do": "collect", "agents": ["isp"], "verbose": True}
                with socket.socket(socket.AF_UNIX) as asking:
                    asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    asking.connect(str(SOCKET))
                    asking.sendall(json.dumps(request).encode() + b"\n")
                    while not (entries := collector.journal.history()):
                        await asyncio.sleep(0.02)
                assert (entries[0].outcome, entries[0].messages) == ("collected", number)
                daemon.stop()
                await asyncio.wait_for(running, 60)

    asyncio.run(asyncio.wait_for(main(), 120))
