"""``salmon-revsmtp check``: all that can fail, before it does."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import io
import json
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import trustme
from salmon.routing import Router
from salmon.server import Relay
from support.configuration import PASSWORD, agent_keys, configuration
from support.dialogue import Dialogue
from support.project import Project, isp, one_message, provider
from support.salmon import Salmon
from support.servers import free_port
from support.serving import RUN, server
from support.terminal import on_a_terminal

from salmon_revsmtp import hookimpl
from salmon_revsmtp.cli.output import has_colours
from salmon_revsmtp.customer.agent import Agent, Check
from salmon_revsmtp.customer.collection import Collection
from salmon_revsmtp.customer.settings import AgentSettings
from salmon_revsmtp.delivery.router import undeliverable_queue
from salmon_revsmtp.delivery.sample import sample_warning
from salmon_revsmtp.files import LITTLE_ROOM, NO_ROOM, Room, room_in
from salmon_revsmtp.hooks import HookFailedError
from salmon_revsmtp.journal.collections import Entry, Journal
from salmon_revsmtp.journal.file import JournalFile
from salmon_revsmtp.net.outcome import Deferred, Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server import checks, reaching
from salmon_revsmtp.server.checks import FAILED, OK, SKIPPED, WARNING, Finding
from salmon_revsmtp.service.policy import Service

KEYS = ["check", "subject", "result", "text"]


def check(project: Project, *options: str, status: int = 0) -> dict[tuple[str, str], Finding]:
    """What ``check --json`` says, by check and subject; the summary's subject is empty."""
    done = project.run("check", "--json", *options)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == status, done.stdout
    assert all(list(row)[:4] == KEYS for row in rows)
    assert rows[-1]["check"] == "summary" and rows[-1]["ready"] == (status == 0)
    assert rows[-1]["problems"] == [row["text"] for row in rows[:-1] if row["result"] == FAILED]
    findings = [Finding(*(row[key] for key in KEYS)) for row in rows]
    return {(one.check, one.subject): one for one in findings}


def results(found: dict[tuple[str, str], Finding]) -> dict[str, str]:
    return {name: one.result for (name, _), one in found.items()}


async def lets_in(provider: Dialogue) -> None:
    await provider.up_to_atrn()
    await provider.asks("QUIT", "221 bye")


@pytest.fixture
def receiver(project: Project) -> Iterator[Callable[[], None]]:
    """Gives Salmon's receiver a port that no one has; call it after ``configure``."""

    def place() -> None:
        settings = project.folder / "config/settings.py"
        text = f"receiver_config = {{'host': '127.0.0.1', 'port': {free_port()}}}\n"
        settings.write_text(settings.read_text() + text)

    yield place


# -- the whole -------------------------------------------------------------------------------------


def test_a_project_that_works(project: Project, receiver: Callable[[], None]) -> None:
    (project.folder / ".env").chmod(0o600)
    with provider(lets_in) as port:
        project.configure(isp(port), services="{'default': {'listen': '127.0.0.1:0'}}")
        receiver()
        found = check(project)
    assert [one for one in results(found).values() if one == FAILED] == []
    for name, subject, text in (
        ("settings", "config.settings", "1 agent, 1 service listening"),
        ("boot", "config.boot", "it can be imported"),
        ("handlers", "app.handlers.sample", "1 module, 1 route"),
        ("folder", "run", "it can be written"),
        ("folder", "logs", "it can be written"),
        ("journal", "run/revsmtp.sqlite3", "not there yet, it is made when it is needed"),
        ("undeliverable", "run/undeliverable", "it can be written; empty"),
        ("unsent", "run/unsent", "not there yet, it is made when it is needed"),
        ("listen", "127.0.0.1:0", "service=default can listen there"),
        ("agent", "isp", f"localhost:{port} reached in the clear, logged in with CRAM-MD5"),
    ):
        assert (found[name, subject].result, found[name, subject].text) == (OK, text)
    relay = found["relay", "localhost:8825"]
    assert relay.result == WARNING
    assert relay.text.startswith("Connection refused; is it running, is the port right? (mail is ")
    assert found["summary", ""].text.startswith("the server can start; 1 warning")
    assert not list(project.folder.glob("run/.check-*"))


def test_a_person_reads_one_line_for_each_thing(
    project: Project, receiver: Callable[[], None]
) -> None:
    (project.folder / ".env").chmod(0o600)
    project.configure(isp(1, enabled="False"))
    receiver()
    done = project.run("check")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == ""
    assert "ok       boot config.boot: it can be imported" in lines
    assert "skipped  agent isp: disabled, so it was not tried" in lines
    assert lines[-1] == "the server can start; 1 warning"
    status, shown = on_a_terminal(project.folder, "check")
    assert status == 0
    assert "ok       boot config.boot: it can be imported\r\n" in shown
    assert shown.endswith("the server can start; 1 warning\r\n")


@pytest.mark.parametrize(
    ("variables", "colours"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], colours: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert has_colours(Terminal()) == colours
    assert not has_colours(io.StringIO())


NO_DNS = """
import ipaddress, socket
real = socket.getaddrinfo
def no_dns(host, *rest, **more):
    ipaddress.ip_address(host)
    return real(host, *rest, **more)
socket.getaddrinfo = no_dns
socket.getfqdn = socket.gethostbyname = None
"""


def test_offline_asks_no_one(project: Project) -> None:
    """Neither the relay, nor the agent's server, nor DNS; no address is taken."""
    with socket.socket() as relay, socket.socket() as agent:
        for one in (relay, agent):
            one.bind(("127.0.0.1", 0))
            one.listen()
            one.setblocking(False)
        port, taken = agent.getsockname()[1], relay.getsockname()[1]
        services = f"{{'default': {{'listen': '127.0.0.1:{taken}'}}}}"
        project.configure(isp(port, server="'127.0.0.1'"), services=services)
        settings = project.folder / "config/settings.py"
        settings.write_text(
            settings.read_text()
            + f"relay_config = {{'host': '127.0.0.1', 'port': {taken}}}\n"
            + f"receiver_config = {{'host': '127.0.0.1', 'port': {taken}}}\n"
            + NO_DNS
        )
        found = check(project, "--offline")
        for one in (relay, agent):
            with pytest.raises(BlockingIOError):
                one.accept()
    for name in ("listen", "relay", "agent"):
        assert results(found)[name] == SKIPPED
    assert results(found)["boot"] == OK
    assert project.run("check", "isp", "--offline").returncode == 2


def test_wrong_settings_are_rows_too(project: Project) -> None:
    project.configure(isp(1, evry="10"))
    done = project.run("check", "--json")
    assert done.returncode == 2
    *rows, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["result"] for row in rows] == [FAILED]
    assert "did you mean every?" in rows[0]["text"]
    assert (summary["ready"], summary["problems"]) == (False, [rows[0]["text"]])


def test_names_that_are_nearly_ours_and_nothing_to_do(
    project: Project, receiver: Callable[[], None]
) -> None:
    project.configure()
    receiver()
    settings = project.folder / "config/settings.py"
    settings.write_text(settings.read_text() + "collection_agent = [{'name': 'isp'}]\n")
    text = project.run("check").stdout
    assert "collection_agent: there is no such setting, so it is ignored" in text
    assert "there is nothing to do; fill in collection_agents" in text
    told = project.run("collect", "--all").stderr
    assert "warning: collection_agent: there is no such setting" in told


def test_a_database_is_named_without_its_password(
    project: Project, receiver: Callable[[], None]
) -> None:
    project.configure()
    receiver()
    settings = project.folder / "config/settings.py"
    settings.write_text(
        settings.read_text()
        + "customer_accounts = [{'name': 'a', 'password': 'x', 'domains': ['a.example']}]\n"
        + f"provider = {{'listen': '127.0.0.1:{free_port()}', "
        + "'hold': 'postgresql://acme:hunter2@db.example.net/mail'}\n"
    )
    found = check(project, "--offline", status=0)
    assert found["hold", "postgresql://db.example.net/mail"].result == SKIPPED
    assert not any(subject == "run/hold" for _, subject in found)
    assert "hunter2" not in str(found)


def test_a_database_that_cannot_be_had_keeps_the_server_from_starting(
    project: Project, receiver: Callable[[], None]
) -> None:
    project.configure()
    receiver()
    settings = project.folder / "config/settings.py"
    with settings.open("a") as file:
        file.write("customer_accounts = []\n")
        file.write(
            f"provider = {{'hold': 'postgresql://acme:hunter2@127.0.0.1:{free_port()}/mail'}}\n"
        )
    found = check(project, status=1)
    assert found["summary", ""].text.startswith("the server cannot start; ")
    [hold] = [one for one in found.values() if one.check == "hold"]
    assert hold.result == FAILED and "is the database running" in hold.text
    assert "hunter2" not in hold.text

    # Without the extra, that is what is said, and also offline.
    settings.write_text(f"{settings.read_text()}\nimport sys\nsys.modules['psycopg'] = None\n")
    for options in ((), ("--offline",)):
        [hold] = [one for one in check(project, *options, status=1).values() if one.check == "hold"]
        assert hold.result == FAILED
        assert "pip install 'salmon-revsmtp[postgres]'" in hold.text


def test_a_boot_module_without_attach(project: Project, receiver: Callable[[], None]) -> None:
    project.configure(isp(1, enabled="False"))
    receiver()
    boot = project.folder / "config/boot.py"
    boot.write_text(boot.read_text().replace("salmon_revsmtp.attach(settings, ", "(").strip())
    found = check(project)["boot", "config.boot"]
    assert found.result == WARNING
    assert "nothing in it calls salmon_revsmtp.attach" in found.text


# -- the project's code ----------------------------------------------------------------------------


def test_a_handler_that_salmon_goes_on_without(
    project: Project, receiver: Callable[[], None]
) -> None:
    project.configure(isp(1, enabled="False"))
    receiver()
    settings = project.folder / "config/settings.py"
    settings.write_text(
        settings.read_text()
        + "handlers = ['app.handlers.sample', 'app.handlers.orders', 'app.handlers.ordrs']\n"
    )
    (project.folder / "app/handlers/orders.py").write_text("import a_module_that_is_not_there\n")
    found = check(project, status=1)
    orders = found["handlers", "app.handlers.orders"]
    assert orders.result == FAILED
    assert "No module named 'a_module_that_is_not_there'" in orders.text
    assert "(app/handlers/orders.py, line 1)" in orders.text
    assert "goes on without it" in orders.text
    misspelt = found["handlers", "app.handlers.ordrs"]
    assert "see how it is spelled" in misspelt.text and "--chdir" not in misspelt.text
    assert found["summary", ""].text.startswith("the server can start; 2 things would fail")


def test_handlers_without_a_route(project: Project, receiver: Callable[[], None]) -> None:
    project.configure(isp(1, enabled="False"))
    receiver()
    (project.folder / "app/handlers/sample.py").write_text("")
    assert "no handler has a route" in check(project, status=1)["handlers", "routes"].text


def test_a_boot_module_that_fails_keeps_nothing_else_from_being_looked_at(
    project: Project,
) -> None:
    project.configure(isp(1, enabled="False"))
    boot = project.folder / "config/boot.py"
    boot.write_text("raise ValueError('no such thing')\n")
    found = check(project, status=1)
    assert found["boot", "config.boot"].text == (
        "ValueError: no such thing (config/boot.py, line 1)"
    )
    assert results(found)["journal"] == OK and results(found)["agent"] == SKIPPED
    assert results(found)["handlers"] == SKIPPED
    assert found["relay", "settings.relay"].result == SKIPPED
    assert found["summary", ""].text.startswith("the server cannot start; ")


# -- Salmon's sample -------------------------------------------------------------------------------

GENERATED = """
from salmon.routing import route, route_like


@route("(address)@(host)", address=".+")
def START(message, address=None, host=None):
    return NEW_USER


@route_like(START)
def NEW_USER(message, address=None, host=None):
    return NEW_USER


@route_like(START)
def END(message, address=None, host=None):
    return START
"""
STATELESS = """
from salmon.routing import route, stateless

@route("{}@(host)")
@stateless
def TAKE(message, host=None):
    pass
"""
KEEPS = GENERATED.replace("    return START", "    message.keep()\n    return START")


@pytest.mark.parametrize(
    ("modules", "accused"),
    [
        ({"sample": GENERATED}, "sample"),
        ({"inbox": '"""Ours."""\n# by another name\n' + GENERATED}, "inbox"),
        ({"orders": STATELESS.format("orders"), "sample": GENERATED}, "sample"),
        ({"sample": STATELESS.format(".+")}, None),
        ({"sample": KEEPS}, None),
        ({"sample": GENERATED, "keeps": STATELESS.format(".+")}, None),
        ({"orders": STATELESS.format("orders")}, None),
        ({}, None),
    ],
)
def test_the_sample_is_known_by_what_it_does(
    salmon: Salmon,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    modules: dict[str, str],
    accused: str | None,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    Router.defaults(host=r"example\.org")
    for name, source in modules.items():
        (tmp_path / f"{name}_of_a_test.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"{name}_of_a_test", raising=False)
        Router.load([f"{name}_of_a_test"])
        monkeypatch.delitem(sys.modules, f"{name}_of_a_test")
    warning = sample_warning(["Example.org"])
    assert (warning or "").startswith(
        f"{accused}_of_a_test is the sample handler" if accused else ""
    )
    assert (warning is None) == (accused is None)
    assert sample_warning(["example.com"]) is None, "mail for it is undeliverable, and kept"
    assert sample_warning([]) is None


def test_a_fresh_project_is_warned_of(project: Project) -> None:
    """By ``check``, by ``collect`` before it collects, alone and by the server, and in its log."""
    (project.folder / "app/handlers/sample.py").write_text(GENERATED)
    words = "app.handlers.sample is the sample handler of `salmon gen`"
    instead = 'handlers = ["salmon_revsmtp.handlers.maildir"]'
    with provider(one_message, lets_be, lets_be) as port:
        project.configure(isp(port, every="None"))
        warning = check_offline(project)["handlers", "sample"]
        assert warning.result == WARNING and words in warning.text and instead in warning.text
        done = project.run("collect", "isp")
        assert done.returncode == 0 and f"warning: {words}" in done.stderr
        with server(project, RUN):
            done = project.run("collect", "isp", "--json")
            assert json.loads(done.stdout)["outcome"] == "no-mail"
            assert f"warning: {words}" in done.stderr
    assert (project.folder / "logs/salmon.log").read_text().count(words) == 1


def check_offline(project: Project) -> dict[tuple[str, str], Finding]:
    return check(project, "--offline")


async def lets_be(provider: Dialogue) -> None:
    await provider.up_to_atrn()
    await provider.asks("ATRN", "453 no mail")
    await provider.left()


# -- folders, the journal, the disk, the clock -----------------------------------------------------


def test_folders_that_cannot_be_written(project: Project) -> None:
    project.configure(isp(1), services="{'default': {'delivery': 'queue'}}")
    run = project.folder / "run"
    (run / "unsent").write_text("")
    (run / "inbound").mkdir()
    (run / "inbound/new").write_text("")
    found = check(project, "--offline", status=1)
    assert found["unsent", "run/unsent"].text == (
        "run/unsent cannot be written: Not a directory; it is no folder"
    )
    assert results(found)["queue"] == OK, "what is missing of a queue is made"


def test_the_hold_store_of_a_provider(project: Project) -> None:
    project.configure()
    settings = project.folder / "config/settings.py"
    settings.write_text(
        settings.read_text()
        + "customer_accounts = [{'name': 'a', 'password': 'p', 'domains': ['example.org']}]\n"
        + "provider = {'hostname': 'mx.example.net', 'hold': 'mail/hold'}\n"
    )
    assert check(project, "--offline")["folder", "mail/hold"].text.startswith("not there yet")
    (project.folder / "mail").write_text("")
    hold = check(project, "--offline", status=1)["folder", "mail/hold"]
    assert hold.text == "mail cannot be written: Not a directory; it is no folder"


def test_what_waits_is_counted(project: Project) -> None:
    project.configure(isp(1), services="{'default': {'delivery': 'queue'}}")
    for name, parts in {
        "unsent": ["new"],
        "undeliverable": ["new", "cur"],
        "inbound": ["new"],
    }.items():
        for part in ("new", "cur", "tmp"):
            (project.folder / "run" / name / part).mkdir(parents=True, exist_ok=True)
        for part in parts:
            (project.folder / "run" / name / part / "1.M1P1Q1.x").write_text("x")
    found = check(project, "--offline")
    assert found["unsent", "run/unsent"].text == "1 message to senders, for the relay to take"
    assert found["undeliverable", "run/undeliverable"].text.startswith(
        "2 messages that no handler took; see `salmon-revsmtp undelivered`"
    )
    assert found["queue", "run/inbound"].text == "1 message, for the queue's consumer"
    assert [results(found)[name] for name in ("unsent", "undeliverable", "queue")] == [
        *(WARNING, WARNING, OK)
    ]


def test_a_queue_of_ones_own_is_counted_where_undelivered_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = SimpleNamespace(dir="run/elsewhere", push=lambda message: "1")
    monkeypatch.setattr(Router, "UNDELIVERABLE_QUEUE", own)
    (tmp_path / "run/elsewhere/new").mkdir(parents=True)
    (tmp_path / "run/elsewhere/new/1.M1P1Q1.x").write_text("x")
    assert undeliverable_queue().folder == tmp_path / "run/elsewhere"
    [found] = [one for one in checks._queues(configuration()) if one.check == "undeliverable"]
    assert found.subject == "run/elsewhere" and found.text.startswith("1 message that no")


def test_a_journal_of_another_time(project: Project) -> None:
    """Its clock was right, and ours is not, or the other way round."""
    project.configure(isp(1))
    ended = time.time() + 86400
    entry = Entry("isp", "odmr", ended, ended, "no-mail", 0, 0, 0, 0, 1, None, None, None)
    Journal(project.folder / "run/revsmtp.sqlite3").record(entry, True)
    found = check(project, "--offline")
    assert found["journal", "run/revsmtp.sqlite3"].text == "it can be written"
    assert "ended 1.0 days in the future, as the clock says" in found["clock", "journal"].text
    assert found["clock", "journal"].result == WARNING


def test_a_journal_that_is_none(project: Project) -> None:
    project.configure(isp(1))
    (project.folder / "run/revsmtp.sqlite3").write_text("no database " * 100)
    journal = check(project, "--offline", status=1)["journal", "run/revsmtp.sqlite3"]
    assert "file is not a database" in journal.text and "move it away" in journal.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_are_closed_to_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir(mode=0)
    found = checks._folder("folder", Path("run/hold"))
    assert found.result == FAILED and "Permission denied" in found.text
    assert "the mode of run is 0000; chmod u+wx run" in found.text
    assert [one.result for one in checks._journal(Path("run/revsmtp.sqlite3"))] == [FAILED]
    assert checks._queue("unsent", Path("run/unsent"), WARNING, "").result == FAILED


def test_a_journal_of_a_later_version_is_not_moved_away(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 1000")
    [finding] = checks._journal(path)
    assert finding.result == FAILED
    assert "of a later salmon-revsmtp" in finding.text and "move it away" not in finding.text


def test_a_journal_that_another_process_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "JOURNAL_PATIENCE", 0.1)
    path = tmp_path / "journal.sqlite3"
    with contextlib.closing(JournalFile(path).open()) as database:
        database.execute("BEGIN IMMEDIATE")
        [finding] = checks._journal(path)
    assert finding.result == WARNING and "another process is writing to it" in finding.text


def test_secrets_that_others_can_read(project: Project) -> None:
    project.configure(isp(1))
    for mode, result in ((0o644, WARNING), (0o600, None)):
        (project.folder / ".env").chmod(mode)
        found = check(project, "--offline").get(("settings", ".env"))
        assert (found.result if found else None) == result


@pytest.mark.parametrize(
    ("room", "result", "words"),
    [
        (Room(1, 5 * LITTLE_ROOM, None), OK, "2.5 GiB free"),
        (Room(1, LITTLE_ROOM - 1, None), WARNING, "0.5 GiB free; when it is full"),
        (Room(1, NO_ROOM - 1, None), FAILED, "mail is answered 452; make room"),
        (Room(1, 5 * LITTLE_ROOM, 10), WARNING, "room for 10 files"),
        (Room(1, 5 * LITTLE_ROOM, 0), FAILED, "room for 0 files"),
    ],
)
def test_the_room_on_a_disk(
    monkeypatch: pytest.MonkeyPatch, room: Room, result: str, words: str
) -> None:
    monkeypatch.setattr(checks, "room_in", lambda folder: room)
    [finding] = checks._disks(configuration())
    assert (finding.check, finding.result) == ("disk", result)
    assert words in finding.text


def test_the_room_where_a_folder_will_be(tmp_path: Path) -> None:
    assert room_in(tmp_path / "not/there").disk == tmp_path.stat().st_dev
    assert room_in(tmp_path).octets > 0


def test_a_clock_that_has_not_been_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks._clock().result == OK
    monkeypatch.setattr(time, "time", lambda: 3600.0)
    finding = checks._clock()
    assert finding.result == FAILED and "the clock is wrong" in finding.text


# -- the provider ----------------------------------------------------------------------------------


def test_a_certificate_that_is_read_again_is_found_wherever_a_handler_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    provider, accounts = certified(tmp_path, "mx.example.net", 90, tls_cert="both.pem")
    settings = configuration(provider=provider, accounts=accounts).provider
    assert settings is not None and settings.tls_cert == tmp_path / "both.pem"


def certified(
    tmp_path: Path, name: str, days: float, **keys: Any
) -> tuple[Any, list[dict[str, Any]]]:
    now = datetime.datetime.now(datetime.timezone.utc)
    made = trustme.CA().issue_cert(
        name,
        not_before=now - datetime.timedelta(days=400),
        not_after=now + datetime.timedelta(days=days),
    )
    file = tmp_path / "both.pem"
    made.private_key_and_cert_chain_pem.write_to_path(file)
    settings = {"hostname": "mx.example.net", "tls_cert": str(file), **keys}
    return settings, [{"name": "acme", "password": PASSWORD, "domains": ["example.org"]}]


@pytest.mark.parametrize(
    ("name", "days", "expected"),
    [
        ("mx.example.net", 90, {OK: "it ends on "}),
        ("mx.example.net", 10.5, {WARNING: ", in 10 days; renew it"}),
        ("mx.example.net", -1, {FAILED: "no one can verify it; renew it"}),
        ("*.example.net", 90, {OK: "it ends on "}),
        ("other.example.net", 90, {OK: "ends", WARNING: "it is for other.example.net, and hostn"}),
    ],
)
def test_a_certificate(tmp_path: Path, name: str, days: float, expected: dict[str, str]) -> None:
    provider, accounts = certified(tmp_path, name, days)
    found = list(checks._certificates(configuration(provider=provider, accounts=accounts), True))
    assert [one.result for one in found] == list(expected)
    for one, words in zip(found, expected.values(), strict=True):
        assert words in one.text and one.subject.startswith("provider, ")


@pytest.mark.parametrize(("listen", "warned"), [("0.0.0.0:366", True), ("127.0.0.1:366", False)])
def test_a_provider_without_a_certificate(listen: str, warned: bool) -> None:
    accounts = [{"name": "acme", "password": PASSWORD, "domains": ["example.org"]}]
    valid = configuration(provider={"listen": listen}, accounts=accounts)
    found = list(checks._certificates(valid, True))
    assert [one.result for one in found] == ([WARNING] if warned else [])
    assert all("is not encrypted; set tls_cert" in one.text for one in found)


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ({"delivery": "hold", "listen": "127.0.0.1:0"}, [("acme", OK), ("home", OK)]),
        (
            {"delivery": "hold", "listen": "127.0.0.1:0", "domains": ["example.org"]},
            [("acme", OK), ("home", WARNING)],
        ),
        ({"delivery": "hold"}, [("all", WARNING)]),
    ],
)
def test_accounts_whose_mail_no_service_takes(
    service: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    accounts = [
        {"name": "acme", "password": PASSWORD, "domains": ["example.org"]},
        {"name": "home", "password": PASSWORD, "domains": ["example.com"]},
    ]
    valid = configuration(provider={}, accounts=accounts, mx=service)
    found = list(checks._accounts(valid))
    assert [(one.subject, one.result) for one in found] == expected
    if expected[-1] == ("home", WARNING):
        assert "mail for example.com is refused" in found[-1].text


# -- by the network --------------------------------------------------------------------------------


class Odd(Agent):
    """A third party's, without a check of its own."""

    protocol: ClassVar[str] = "odd"

    async def collect(self, collection: Collection) -> Outcome:
        return Outcome.NO_MAIL


def odd(kind: type[Agent] = Odd) -> Agent:
    return kind(AgentSettings(name="odd", protocol="odd"))


def finding(agent: Agent, enabled: bool = True) -> Finding:
    service = Service("default", configuration().services["default"])
    return asyncio.run(reaching.agent_finding(agent, service, enabled))


def test_an_agent_type_without_a_check_says_so() -> None:
    found = finding(odd())
    assert (found.result, found.text) == (
        *(SKIPPED, "the agent type 'odd' has no check, so nothing was tried"),
    )
    assert finding(odd(), enabled=False).text == "disabled, so it was not tried"


def test_an_agent_type_whose_check_hangs_breaks_or_finds_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reaching, "AGENT_PATIENCE", 0.2)

    class Does(Odd):
        what: ClassVar[Callable[[], Any]]

        async def check(self, service: Service) -> Check:
            found = type(self).what()
            result: Check = await found if asyncio.iscoroutine(found) else found
            return result

    def raises(error: Exception) -> Callable[[], Any]:
        def work() -> Any:
            raise error

        return work

    for what, result, words in (
        (lambda: asyncio.sleep(60), FAILED, "no end of it in 0.2 seconds"),
        (raises(ZeroDivisionError("x")), FAILED, "bug in agent type 'odd': ZeroDivisionError: x"),
        (raises(Deferred("later")), FAILED, "later"),
        (lambda: Check(problems=["a", "b"]), WARNING, "a; b"),
        (lambda: Check(), OK, "reached in the clear, not logged in"),
    ):
        found = finding(odd(type("That", (Does,), {"what": staticmethod(what)})))
        assert (found.result, words in found.text) == (result, True), found.text


def test_agents_are_tried_at_the_same_time_and_told_of_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both, here = asyncio.Event(), []

    async def slow(agent: Agent, service: Service, enabled: bool = True) -> Finding:
        here.append(agent.name)
        if len(here) == 2:
            both.set()
        await asyncio.wait_for(both.wait(), 60)
        return Finding("agent", agent.name, OK, "")

    monkeypatch.setattr(reaching, "agent_finding", slow)
    valid = configuration(agent_keys(1, name="one"), agent_keys(1, name="two"))
    told: list[Finding] = []
    enabled = {"one": True, "two": True}
    asyncio.run(reaching.reached(valid, [], {}, enabled, None, False, told.append))
    assert [one.subject for one in told] == ["settings.relay", "one", "two"]


def test_the_console_and_the_metrics_are_to_listen_too(project: Project) -> None:
    port = free_port()
    project.configure()
    settings = project.folder / "config/settings.py"
    kept = settings.read_text()
    settings.write_text(
        kept + f"console = {{'listen': '127.0.0.1:{port}'}}\n"
        f"metrics = {{'listen': '127.0.0.1:{port}'}}\n"
    )
    rows = [json.loads(line) for line in project.run("check", "--json").stdout.splitlines()]
    assert [(row["result"], row["text"]) for row in rows if row["check"] == "listen"] == [
        (OK, "console can listen there"),
        (WARNING, "metrics is to listen there, and so is console; give one another port"),
    ]
    with socket.create_server(("127.0.0.1", port)):
        settings.write_text(kept + f"console = {{'listen': '127.0.0.1:{port}'}}\n")
        found = check(project)
    taken = found["listen", f"127.0.0.1:{port}"]
    assert taken.result == WARNING
    assert "Address already in use; another program has" in taken.text
    assert taken.text.endswith("; mail goes on without it")
    assert found["summary", ""].text.startswith("the server can start; ")
    skipped = check(project, "--offline")["listen", f"127.0.0.1:{port}"]
    assert skipped.result == SKIPPED


def test_a_plugin_that_listens_on_what_is_no_name() -> None:
    place = reaching.Place("odd", "a" * 300, 70, needed=False)
    found = asyncio.run(reaching._address(place, None, False))
    assert found.result == WARNING
    assert found.text.startswith(f"odd cannot listen on {place}: ")


def _fails() -> None:
    raise OSError("no such file")


@pytest.mark.parametrize(
    ("say", "words"),
    [
        (lambda: [("127.0.0.1", "x")], "plugin=odd hook=list_addresses returned no pairs"),
        (lambda: 5, "plugin=odd hook=list_addresses returned no pairs"),
        (lambda: (1 / 0 for _ in range(2)), "returned no pairs of host and port: division by zero"),
        (lambda: [("127.0.0.1", 70000)], "plugin=odd hook=list_addresses returned '127.0.0.1:7"),
        (lambda: [("a\0", 70)], "plugin=odd hook=list_addresses returned 'a"),
        (_fails, "plugin=odd hook=list_addresses raised OSError: no such file"),
    ],
)
def test_a_plugin_that_cannot_say_where_it_listens(say: Callable[[], Any], words: str) -> None:
    class Odd:
        @hookimpl
        def list_addresses(self) -> Any:
            return say()

    plugins = Plugins()
    plugins.register(Odd(), "odd")
    with pytest.raises((HookFailedError, ValueError), match=words):
        reaching.places_of_plugins(plugins, sys)


def test_a_disabled_agent_is_not_dialled(project: Project, receiver: Callable[[], None]) -> None:
    with provider() as port:  # which no one calls
        project.configure(isp(port))
        receiver()
        assert project.run("disable", "isp").returncode == 0
        found = check(project)
    assert found["agent", "isp"].text == "disabled, so it was not tried"


def test_a_relay_that_is_none_of_salmons() -> None:
    found = asyncio.run(reaching._relay(object()))
    assert (found.result, found.subject) == (SKIPPED, "object")
    found = asyncio.run(reaching._relay(Relay("127.0.0.1", free_port())))
    assert found.result == WARNING and found.text.startswith("Connection refused; ")


def test_beside_a_server_that_runs(project: Project) -> None:
    """Its addresses are ours; one that it does not have is from settings that it has not read."""
    port, other = free_port(), free_port()
    project.configure(
        isp(1, enabled="False"), services=f"{{'default': {{'listen': '127.0.0.1:{port}'}}}}"
    )
    with server(project, RUN):
        found = check(project)
        assert found["listen", f"127.0.0.1:{port}"].text == "the server that runs has it"
        assert found["summary", ""].text.startswith("the server is running")
        settings = project.folder / "config/settings.py"
        settings.write_text(settings.read_text().replace(str(port), str(other)))
        again = check(project)
        changed = again["listen", f"127.0.0.1:{other}"]
        assert changed.result == WARNING and "restart it" in changed.text
        newer = again["settings", "config/settings.py"]
        assert newer.result == WARNING and "restart it" in newer.text
        assert ("settings", "config/settings.py") not in found
    assert "a request failed" not in (project.folder / "logs/salmon.log").read_text()
