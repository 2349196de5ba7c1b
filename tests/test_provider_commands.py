"""``salmon-revsmtp provider``: beside no server, and on one that runs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from salmon import queue
from support.configuration import PASSWORD, configuration
from support.dialogue import Dialogue
from support.messages import MESSAGE
from support.project import Project
from support.salmon import Salmon
from support.terminal import on_a_terminal
from support.tls import CERTIFICATE, PRIVATE_KEY

from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.rates import Limit, RateLimit
from salmon_revsmtp.delivery.reporter import Reporter
from salmon_revsmtp.journal.counts import CountJournal
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.expiry import Expiry
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import Arrival, HoldStore, State
from salmon_revsmtp.provider.notices import Notices
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.provider.settings import AccountSettings
from salmon_revsmtp.provider.upkeep import UNDER_WAY, Upkeep
from salmon_revsmtp.server import provider_requests
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.control import SOCKET
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.verifier import Verifier

ACME = {"name": "acme", "password": PASSWORD, "domains": ["example.org"]}
OTHER = {"name": "other", "password": PASSWORD, "domains": ["example.com"], "enabled": False}
PROVIDER = {"hostname": "mx.example.net", "listen": "127.0.0.1:0"}
EVIL = "\x1b[2J\u202e\x9b"
PATIENCE = 60

HELD_KEYS = ["key", "account", "from", "to", "size", "arrived", "state", "strikes", "reason"]
ACCOUNT_KEYS = [
    "account",
    "from",
    "enabled",
    "domains",
    "messages",
    "quota_messages",
    "bytes",
    "quota_bytes",
    "oldest",
    "aside",
    "last_seen",
    "push",
    "peer",
    "failed_logins",
]


def put(
    store: HoldStore,
    account: str = "acme",
    *to: str,
    sender: str = "a@example.net",
    data: bytes = MESSAGE,
) -> int:
    """Hold a message; returns its key."""
    recipients = to or ("b@example.org",)
    envelope = Envelope(sender, recipients)
    [[key]] = store.put([Arrival(envelope, (account,) * len(recipients), [data])])
    return key


def settings_of(folder: Path) -> None:
    """Make the project in a folder a provider."""
    settings = folder / "config/settings.py"
    settings.parent.mkdir(exist_ok=True)
    text = settings.read_text() if settings.exists() else ""
    settings.write_text(f"{text}\ncustomer_accounts = {[ACME, OTHER]!r}\nprovider = {PROVIDER!r}\n")


@pytest.fixture
def holder(project: Project) -> Project:
    """A project that is a provider; no server runs."""
    settings_of(project.folder)
    return project


@contextlib.contextmanager
def store_of(project: Project) -> Iterator[EmbeddedStore]:
    store = EmbeddedStore(project.folder / "run/hold")
    try:
        yield store
    finally:
        store.close()


def held(project: Project) -> list[int]:
    with store_of(project) as store:
        return [one.key for one in store.listing(messages=10_000)]


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# -- beside no server ------------------------------------------------------------------------------


def test_accounts_has_what_is_held_against_the_quotas(holder: Project) -> None:
    with store_of(holder) as store:
        first = put(store)
        put(store, "acme", data=b"x" * 1000)
        put(store, "gone", "x@gone.example")
        store.strike(first, 1, "it broke")
    done = holder.run("provider", "accounts")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    size = len(MESSAGE)
    assert lines[1][:4] == [
        "acme",
        "example.org",
        "2 of 100,000",
        f"{size + 1000:,} of 5,368,709,120",
    ]
    assert lines[1][5:] == ["1", "-", "-"]
    assert lines[2][:3] == ["other (Disabled)", "example.com", "0 of 100,000"]
    assert lines[3][:4] == ["gone (no such account)", "-", "1", str(size)]
    first_row, *_, last = rows(holder.run("provider", "accounts", "--json").stdout)
    assert list(first_row) == ACCOUNT_KEYS
    assert (first_row["messages"], first_row["bytes"], first_row["aside"]) == (2, size + 1000, 1)
    assert (last["account"], last["enabled"], last["quota_bytes"]) == ("gone", None, None)


def test_held_lists_the_oldest_first_page_by_page(holder: Project) -> None:
    with store_of(holder) as store:
        keys = [put(store, name) for name in ("acme", "other", "acme")]
        many = put(store, "acme", *(f"r{number}@example.org" for number in range(9)), sender="")
        store.strike(keys[0], 1, "it broke")
    found = rows(holder.run("provider", "held", "--json").stdout)
    assert [row["key"] for row in found] == [*keys, many]
    assert all(list(row) == HELD_KEYS for row in found)
    assert (found[0]["state"], found[0]["strikes"], found[0]["reason"]) == ("aside", 1, "it broke")
    assert (found[-1]["from"], len(found[-1]["to"])) == ("", 9)
    done = holder.run("provider", "held", "--limit", "2", "--after", str(keys[0]))
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines[1:]] == [str(keys[1]), str(keys[2])]
    assert f"--after {keys[2]}" in done.stderr
    done = holder.run("provider", "held", "--account", "acme", "--after", str(keys[2]))
    [_, line] = [line.split("\t") for line in done.stdout.splitlines()]
    assert line[2:4] == ["<>", "r0@example.org, r1@example.org, r2@example.org and 6 more"]
    assert line[6:8] == ["waiting", "0"] and done.stderr == ""


def test_show_has_the_envelope_and_the_header_or_the_octets(holder: Project) -> None:
    data = b"Received: us\r\nSubject: hi\r\n there\r\n\r\nbody \xff\x00\r\n\n.x"
    with store_of(holder) as store:
        key = str(put(store, "acme", "b@example.org", "c@example.org", data=data))
    done = holder.run("provider", "held", "show", key)
    envelope, _, header = done.stdout.partition("\n\n")
    assert header == "Received: us\nSubject: hi\n there\n"
    shown = [line.split(None, 1) for line in envelope.splitlines()]
    assert ["from", "<a@example.net>"] in shown and ["state", "waiting"] in shown
    assert [value for word, value in shown if word == "to"] == [
        "<b@example.org>",
        "<c@example.org>",
    ]
    [row] = rows(holder.run("provider", "held", "show", key, "--json").stdout)
    assert list(row) == [*HELD_KEYS, "header"] and row["header"] == header
    content = subprocess.run(
        [sys.executable, "-m", "salmon_revsmtp", "provider", "held", "show", key, "--content"],
        cwd=holder.folder,
        capture_output=True,
        check=True,
    )
    assert content.stdout == data
    [row] = rows(holder.run("provider", "held", "show", key, "--json", "--content").stdout)
    assert base64.b64decode(row["content"]) == data


def test_a_message_of_many_pieces_comes_whole(holder: Project) -> None:
    data = bytes(range(256)) * 4096
    with store_of(holder) as store:
        key = put(store, data=data)
    [row] = rows(holder.run("provider", "held", "show", str(key), "--content", "--json").stdout)
    assert base64.b64decode(row["content"]) == data
    # Nothing but a header, and longer than what is shown of one.
    with store_of(holder) as store:
        key = put(store, data=b"X: y\r\n" * 20_000)
    done = holder.run("provider", "held", "show", str(key))
    assert done.stdout.endswith("(there is more of this header)\n")


def test_what_strangers_wrote_is_harmless(holder: Project) -> None:
    evil = f"{EVIL}@example.org"
    with store_of(holder) as store:
        key = put(store, "acme", evil, sender=evil, data=f"X: {EVIL}\r\n\r\n{EVIL}".encode())
        store.strike(key, 1, f"the session broke: {EVIL}")
    for command in (["held"], ["held", "show", str(key)], ["held", "--json"]):
        done = holder.run("provider", *command)
        assert "@example.org" in done.stdout
        assert not set(done.stdout) & set(EVIL) - set("[2J"), ascii(done.stdout)
    status, shown = on_a_terminal(holder.folder, "provider", "held", "show", str(key), "--content")
    assert (status, shown.strip()) == (0, "X: ?[2J??\r\n\r\n?[2J??")


def test_retry_has_what_is_set_aside_wait_again(holder: Project) -> None:
    with store_of(holder) as store:
        keys = [put(store) for _ in range(3)]
        for key in keys[:2]:
            store.strike(key, 1, "it broke")
    done = holder.run("provider", "held", "retry", str(keys[0]))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("to be tried again: 1 message, ")
    states = {row["key"]: row for row in rows(holder.run("provider", "held", "--json").stdout)}
    assert [states[key]["state"] for key in keys] == ["waiting", "aside", "waiting"]
    assert (states[keys[0]]["strikes"], states[keys[0]]["reason"]) == (0, "")
    [row] = rows(holder.run("provider", "held", "retry", "--account", "acme", "--json").stdout)
    assert row == {
        "account": "acme",
        "action": "retry",
        "key": keys[1],
        "done": True,
        "remark": "",
    }
    done = holder.run("provider", "held", "retry", "--account", "acme")
    assert (done.returncode, done.stdout) == (0, "nothing is set aside for acme\n")


def test_drop_deletes_what_is_named_and_nothing_else(holder: Project) -> None:
    with store_of(holder) as store:
        keys = [put(store) for _ in range(4)]
        other = put(store, "other", "b@example.com")
    done = holder.run("provider", "held", "drop", str(keys[1]), str(keys[1]), "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"deleted: 1 message, {len(MESSAGE)} bytes, held for acme\n"
    assert held(holder) == [keys[0], *keys[2:], other]
    done = holder.run("provider", "held", "drop", "--account", "acme", "--yes", "--json")
    assert [row["key"] for row in rows(done.stdout)] == [keys[0], *keys[2:]]
    assert held(holder) == [other]
    assert not (holder.folder / "run/unsent").exists()
    assert "the operator says" in (holder.folder / "logs/salmon.log").read_text()
    done = holder.run("provider", "held", "drop", "--account", "acme")
    assert (done.returncode, done.stdout) == (0, "nothing is held for acme\n")


def test_bounce_tells_the_senders(holder: Project) -> None:
    with store_of(holder) as store:
        keys = [
            put(store, sender="ann@example.net"),
            put(store, sender=""),
            put(store, sender="ann@example.net", data=b"List-Id: x\r\n\r\nx\r\n"),
        ]
    done = holder.run("provider", "held", "bounce", *map(str, keys), "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("returned: 3 messages, ")
    assert f"{keys[1]}: returned; its sender is not told: it has the null sender" in done.stderr
    assert f"{keys[2]}: returned; its sender is not told: it has the header list-id" in done.stderr
    assert held(holder) == []
    unsent = queue.Queue(str(holder.folder / "run/unsent"))
    [notice] = [unsent.mbox.get_bytes(key) for key in unsent.keys()]
    assert b"To: <ann@example.net>" in notice or b"To: ann@example.net" in notice
    for line in (b"Action: failed", b"Status: 5.0.0", b"Final-Recipient: rfc822; b@example.org"):
        assert line in notice
    assert b"the operator of the host" in b" ".join(notice.split())


@pytest.mark.parametrize("action", ["retry", "bounce", "drop"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the KEYs of messages, or give --account"),
        (["{key}", "--account", "acme"], "name the KEYs of messages, or give --account"),
        (["{key}", "999999"], "no message is held with the key 999999; nothing is done"),
        (["{key}", "--json", "77", "88"], "with the keys 77, 88; nothing is done"),
        (["all"], "'all' is no key"),
        (["0"], "0 is not in the range"),
        ([str(2**63)], "is not in the range"),
        (["--account", "acmee"], "no account is named 'acmee'; there are: acme, other"),
    ],
)
def test_who_mistypes_destroys_nothing(
    holder: Project, action: str, arguments: list[str], said: str
) -> None:
    with store_of(holder) as store:
        key = put(store)
        store.strike(key, 1, "it broke")
    yes = [] if action == "retry" else ["--yes"]
    words = [one.format(key=key) for one in arguments]
    done = holder.run("provider", "held", action, *words, *yes)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    with store_of(holder) as store:
        [left] = store.listing()
        assert (left.key, left.state) == (key, State.ASIDE)
    assert not (holder.folder / "run/unsent").exists()


@pytest.mark.parametrize("action", ["bounce", "drop"])
def test_without_a_terminal_yes_has_to_be_said(holder: Project, action: str) -> None:
    with store_of(holder) as store:
        keys = [put(store), put(store, "other", "b@example.com"), put(store)]
    done = holder.run("provider", "held", action, *map(str, keys))
    assert (done.returncode, done.stdout) == (2, "")
    size = 3 * len(MESSAGE)
    assert f"3 messages, {size} bytes, held for acme (2), other (1)" in done.stderr
    assert "--yes" in done.stderr
    assert held(holder) == keys


@pytest.mark.parametrize("action", ["bounce", "drop"])
@pytest.mark.parametrize("answer", ["", "n", "y"])
def test_a_terminal_is_asked(holder: Project, action: str, answer: str) -> None:
    with store_of(holder) as store:
        keys = [put(store), put(store)]
    command = ["provider", "held", action, "--account", "acme"]
    status, shown = on_a_terminal(holder.folder, *command, answers=[("[y/N]", answer)])
    assert f"2 messages, {2 * len(MESSAGE)} bytes, held for acme" in shown
    if answer == "y":
        assert (status, held(holder)) == (0, [])
    else:
        assert (status, held(holder)) == (1, keys)
        assert "nothing is done" in shown


def test_what_comes_while_a_person_thinks_is_not_meant(holder: Project) -> None:
    """And the hold store is free meanwhile."""
    with store_of(holder) as store:
        put(store)
    late: list[int] = []

    def think() -> str:
        with store_of(holder) as store:
            late.append(put(store))
        return "y"

    command = ["provider", "held", "drop", "--account", "acme"]
    status, _ = on_a_terminal(holder.folder, *command, answers=[("[y/N]", think)])
    assert status == 0
    assert held(holder) == late and len(late) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["held", "show", "7"], "no message with the key 7 is held"),
        (["held", "show", "abc"], "'abc' is no key; `salmon-revsmtp provider held` shows them"),
        (["held", "7"], "error: no such command '7'"),
        (["held", "--account", "nobody"], "no account is named 'nobody'; there are: acme, other"),
        (["held", "--account", "acme", "drop", "1", "--yes"], "--account goes after 'drop'"),
        (["held", "--json", "show", "1"], "--json goes after 'show'"),
        (["held", "--limit", "0"], "0 is not in the range"),
        (["nothing"], "error: no such command 'nothing'"),
    ],
)
def test_usage_errors_have_status_2(holder: Project, arguments: list[str], said: str) -> None:
    done = holder.run("provider", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_project_that_holds_no_mail_says_so(project: Project) -> None:
    project.configure()
    for command in (["accounts"], ["held"], ["sessions"], ["held", "drop", "1", "--yes"]):
        done = project.run("provider", *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert "no mail is held in this project" in done.stderr
    assert not (project.folder / "run/hold").exists()


def test_a_store_that_another_process_has_is_one_clear_error(holder: Project) -> None:
    with store_of(holder):
        done = holder.run("provider", "held")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"process {os.getpid()} has it" in done.stderr
    assert str(SOCKET) in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_a_command_of_root_makes_belongs_to_the_projects_owner(holder: Project) -> None:
    for one in (holder.folder, *holder.folder.rglob("*")):
        os.chown(one, 65534, 65534)
    assert holder.run("provider", "held", PYTHONDONTWRITEBYTECODE="1").returncode == 0
    made = list((holder.folder / "run").rglob("*"))
    assert "index.sqlite3" in {one.name for one in made}
    assert [one for one in made if one.lstat().st_uid != 65534] == []


# -- on a server that runs -------------------------------------------------------------------------


class Server:
    """A provider's server in this process, in whose folder commands run."""

    def __init__(self, salmon: Salmon, collector: Collector, daemon: Daemon) -> None:
        self.salmon, self.collector, self.daemon = salmon, collector, daemon

    @property
    def store(self) -> HoldStore:
        return self.collector.providing.store

    async def run(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salmon_revsmtp", "provider", *arguments]
        done = await asyncio.to_thread(
            lambda: subprocess.run(
                command, cwd=self.salmon.folder, capture_output=True, text=True, timeout=PATIENCE
            )
        )
        assert done.returncode == status, done.stderr
        assert PASSWORD not in done.stdout + done.stderr and "Traceback" not in done.stderr
        return done

    @property
    def provider(self) -> Provider:
        assert self.daemon.provider is not None
        return self.daemon.provider

    async def customer(self, push: bool = True, tls: ssl.SSLContext | None = None) -> Dialogue:
        """A customer that the test plays, after its ATRN."""
        port = self.provider.port
        reader, writer = await asyncio.open_connection("localhost", port, ssl=tls)
        customer = Dialogue(reader, writer)
        await customer.replied(220)
        customer.say("EHLO x", "AUTH CRAM-MD5")
        await customer.replied(250)
        challenge = base64.b64decode((await customer.hear("334 "))[4:])
        digest = hmac.new(PASSWORD.encode(), challenge, hashlib.md5).hexdigest()
        customer.say(base64.b64encode(f"acme {digest}".encode()).decode())
        await customer.replied(235)
        if push:
            customer.say("XHOLD")
            await customer.replied(250)
        customer.say("ATRN")
        await customer.replied(250)
        customer.say("220 customer")
        await customer.asks("EHLO", "250 HELP")
        return customer

    async def until(self, so: Callable[[], object]) -> None:
        async def wait() -> None:
            while not so():
                await asyncio.sleep(0.01)

        await asyncio.wait_for(wait(), PATIENCE)


@contextlib.asynccontextmanager
async def server(salmon: Salmon, provider: dict[str, Any]) -> AsyncIterator[Server]:
    settings_of(salmon.folder)
    plugins = Plugins.load()
    valid = configuration(plugins=plugins, accounts=[ACME, OTHER], provider=provider)
    with Collector(valid, plugins, lambda: salmon.relay) as collector:
        daemon = Daemon(collector, plugins)
        listening = asyncio.Event()
        running = asyncio.create_task(daemon.run(listening.set))
        await asyncio.wait_for(listening.wait(), PATIENCE)
        try:
            yield Server(salmon, collector, daemon)
        finally:
            daemon.stop()
            await asyncio.wait_for(running, PATIENCE)


def on_a_server(salmon: Salmon, work: Callable[[Server], Awaitable[None]], **provider: Any) -> None:
    async def main() -> None:
        async with server(salmon, {**PROVIDER, **provider}) as here:
            await work(here)

    asyncio.run(main())


async def give(customer: Dialogue, answer: str) -> None:
    """Take a message's envelope and data, and answer it."""
    await customer.asks("MAIL", "250 ok")
    await customer.asks("RCPT", "250 ok")
    await customer.asks("DATA", "354 go on")
    while (await customer.hear()) != ".":
        pass
    customer.say(answer)


def test_the_tables_of_a_server_that_runs(salmon: Salmon) -> None:
    async def work(here: Server) -> None:
        key = put(here.store)
        [row, _] = rows((await here.run("accounts", "--json")).stdout)
        assert (row["messages"], row["last_seen"], row["push"]) == (1, None, None)
        assert rows((await here.run("sessions", "--json")).stdout) == []
        customer = await here.customer()
        await give(customer, "250 taken")
        await here.until(lambda: here.store.find(key) is None)
        [session] = rows((await here.run("sessions", "--json")).stdout)
        peer = "127.0.0.1:{}".format(customer.writer.get_extra_info("sockname")[1])
        assert session.pop("since")
        assert session == {
            "account": "acme",
            "peer": peer,
            "push": True,
            "messages": 1,
            "live": 0,
            "fell_back": 0,
            "tls": None,
            "host": None,
        }
        [row, _] = rows((await here.run("accounts", "--json")).stdout)
        assert (row["messages"], row["peer"]) == (0, peer)
        assert row["last_seen"] and row["push"]
        shown = (await here.run("accounts")).stdout.splitlines()[1].split("\t")
        assert shown[-1].startswith("since ") and shown[-1].endswith(f", {peer}")
        customer.writer.close()
        await here.until(lambda: not here.provider.sessions)
        [row, _] = rows((await here.run("accounts", "--json")).stdout)
        assert row["last_seen"] and (row["push"], row["peer"]) == (None, None)

    on_a_server(salmon, work)


def test_a_look_at_a_provider_has_who_is_there_and_what_waits(salmon: Salmon) -> None:
    async def work(here: Server) -> None:
        key = put(here.store, "other", "b@example.com")
        here.store.strike(key, 1, "it broke")
        customer = await here.customer()
        looked = await here.daemon.look()
        [row] = [one for one in looked.rows if one["status"] == "provider"]
        assert (row["accounts"], row["online"], row["messages"]) == (2, 1, 1)
        assert (row["bytes"], row["aside"], row["oldest"]) == (len(MESSAGE), 1, None)
        assert [one.key for one in looked.troubles] == ["account:other:aside"]
        customer.writer.close()
        await here.until(lambda: not here.provider.sessions)
        here.store.retry([key])
        looked = await here.daemon.look()
        [row] = [one for one in looked.rows if one["status"] == "provider"]
        assert (row["online"], row["aside"], row["oldest"] is not None) == (0, 0, True)
        assert looked.troubles == []

    on_a_server(salmon, work)


def test_sessions_shows_the_version_of_tls_and_who_does_not_push(salmon: Salmon) -> None:
    async def work(here: Server) -> None:
        put(here.store)
        trust = ssl.create_default_context(cafile=str(CERTIFICATE))
        customer = await here.customer(push=False, tls=trust)
        await customer.asks("MAIL", "250 ok")
        [row] = rows((await here.run("sessions", "--json")).stdout)
        tls = customer.writer.get_extra_info("ssl_object").version()
        assert (row["tls"], row["push"], row["messages"]) == (tls, False, 0)
        [_, line] = (await here.run("sessions")).stdout.splitlines()
        assert line.split("\t")[3:] == ["no", "0", tls, "0", "0", "-"]
        customer.writer.close()

    tls = {"tls_cert": str(CERTIFICATE), "tls_key": str(PRIVATE_KEY)}
    on_a_server(salmon, work, listen=None, listen_implicit="127.0.0.1:0", **tls)


def test_retry_wakes_a_session_that_is_open(salmon: Salmon) -> None:
    async def work(here: Server) -> None:
        key = put(here.store)
        here.store.strike(key, 1, "it broke")
        customer = await here.customer()
        done = await here.run("held", "retry", "--account", "acme")
        assert done.stdout.startswith("to be tried again: 1 message")
        await give(customer, "250 taken")
        await here.until(lambda: here.store.find(key) is None)
        customer.writer.close()

    on_a_server(salmon, work)


@pytest.mark.parametrize("action", ["drop", "bounce"])
@pytest.mark.parametrize("answer", ["250 taken", "451 later"])
def test_the_answer_to_what_is_being_sent_wins(salmon: Salmon, action: str, answer: str) -> None:
    async def work(here: Server) -> None:
        sent, aside = put(here.store), put(here.store)
        here.store.strike(aside, 1, "it broke")
        customer = await here.customer()
        await customer.asks("MAIL", "250 ok")
        keys = (str(sent), str(aside))
        done = await here.run("held", action, *keys, "--yes", status=1)
        assert f"{sent}: not " in done.stderr and UNDER_WAY in done.stderr
        assert "1 message, " in done.stdout
        assert [one.key for one in here.store.listing()] == [sent]
        await customer.asks("RCPT", "250 ok")
        await customer.asks("DATA", "354 go on")
        while (await customer.hear()) != ".":
            pass
        customer.say(answer)
        if answer.startswith("2"):
            await here.until(lambda: here.store.find(sent) is None)
        else:  # it waits again, and can go
            await here.until(lambda: here.store.listing()[0].reason)
            await here.run("held", action, str(sent), "--yes")
            assert here.store.find(sent) is None
        customer.writer.close()
        here.collector._outbox.wait(PATIENCE)
        told = sum(to == "a@example.net" for _, to, _ in salmon.relayed)
        assert told == (0 if action == "drop" else 1 if answer.startswith("2") else 2)

    on_a_server(salmon, work)


def test_more_than_a_page_and_more_than_a_request(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_requests, "PAGE", 7)

    async def work(here: Server) -> None:
        arrival = Arrival(Envelope("", ("b@example.org",)), ("acme",), [MESSAGE])
        keys = [key for [key] in here.store.put([arrival] * 1203)]
        listed = rows((await here.run("held", "--json", "--limit", "1300")).stdout)
        assert [row["key"] for row in listed] == keys
        await here.run("held", "drop", *map(str, keys[:1100]), "--yes")
        assert [one.key for one in here.store.listing(messages=5000)] == keys[1100:]
        done = await here.run("held", "drop", "--account", "acme", "--yes", "--json")
        assert [row["key"] for row in rows(done.stdout)] == keys[1100:]
        assert here.store.usages() == {}

    on_a_server(salmon, work)


def test_a_server_that_was_started_with_other_settings_says_so(salmon: Salmon) -> None:
    async def main() -> None:
        settings_of(salmon.folder)
        plugins = Plugins.load()
        with Collector(configuration(plugins=plugins), plugins, lambda: salmon.relay) as collector:
            daemon = Daemon(collector, plugins)
            listening = asyncio.Event()
            running = asyncio.create_task(daemon.run(listening.set))
            await asyncio.wait_for(listening.wait(), PATIENCE)
            done = await Server(salmon, collector, daemon).run("accounts", status=1)
            assert "restart it" in done.stderr
            daemon.stop()
            await asyncio.wait_for(running, PATIENCE)

    asyncio.run(main())


@pytest.mark.parametrize("said", [b"", b'{"held": {"ke'])
def test_a_server_that_ends_meanwhile_is_one_clear_error(holder: Project, said: bytes) -> None:
    (holder.folder / "run").mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(holder.folder / SOCKET))
        listening.listen()

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        done = holder.run("provider", "held")
        thread.join()
    assert (done.returncode, done.stdout) == (1, "")
    assert "the server ended before it had answered" in done.stderr


# -- what the operator does, and limits ------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    made = EmbeddedStore(tmp_path / "hold")
    yield made
    made.close()


def notices(salmon: Salmon, limit: int = 10) -> Notices:
    rates = RateLimit(CountJournal(), address=Limit(limit, 1 << 30))
    return Notices(Reporter(lambda: "mx.example.net", rates), Outbox(lambda: salmon.relay))


def test_whose_sender_cannot_be_told_in_this_hour_stays(
    salmon: Salmon, store: EmbeddedStore
) -> None:
    keys = [put(store) for _ in range(3)]
    first, *others = Upkeep(store, notices(salmon, limit=1)).bounce(keys)
    assert (first.key, first.done) == (keys[0], True)
    assert [one.done for one in others] == [False, False]
    assert all("too many notifications in this hour" in one.remark for one in others)
    assert [one.key for one in store.listing()] == keys[1:]
    # And they are anyone's.
    assert [one.key for one in store.feed("acme").take(10, 1 << 40)] == keys[1:]


def test_whose_notification_cannot_be_kept_stays(salmon: Salmon, store: EmbeddedStore) -> None:
    key = put(store)
    Path("run/unsent").write_text("this is no folder")
    [treated] = Upkeep(store, notices(salmon)).bounce([key])
    assert not treated.done and "the notification was not kept" in treated.remark
    assert store.find(key) is not None


def test_what_a_session_is_sending_does_not_expire(salmon: Salmon, store: EmbeddedStore) -> None:
    key = put(store)
    accounts = Accounts([AccountSettings.model_validate({**ACME, "hold_days": 1e-9})])
    expiry = Expiry(accounts, store, notices(salmon), Plugins.load())
    feed = store.feed("acme")
    assert [one.key for one in feed.take(10, 1 << 40)] == [key]
    expiry.check()
    assert store.find(key) is not None
    feed.close()
    expiry.check()
    assert store.find(key) is None


# -- passwords -------------------------------------------------------------------------------------


def password(given: bytes, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with this on its standard input; it needs no project."""
    command = [sys.executable, "-m", "salmon_revsmtp", "provider", "password", *arguments]
    done = subprocess.run(command, input=given, capture_output=True)
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def proves(verifier: str, text: str) -> bool:
    """Whether an account with this verifier lets in who has the password."""
    account = AccountSettings.model_validate({**ACME, "password": verifier})
    return Accounts([account]).secret("acme").is_password(text.encode())


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("text", [PASSWORD, " b\u00fccher ", "\u65e5\u672c$'\"\\"])
def test_a_password_from_standard_input(text: str, end: bytes) -> None:
    done = password(text.encode() + end)
    assert (done.returncode, done.stderr) == (0, "")
    verifier = done.stdout.removesuffix("\n")
    assert Verifier.parse(verifier) is not None
    assert proves(verifier, text) and not proves(verifier, text + "x")
    assert text not in done.stdout


def test_a_password_that_is_made() -> None:
    done = password(b"", "--generate", "acme")
    first, second = done.stdout.splitlines()
    text = first.removeprefix("password, for the customer: ")
    verifier = second.removeprefix("verifier, for customer_accounts: ")
    assert len(text) >= 24 and proves(verifier, text)
    [row] = rows(password(b"", "--generate", "acme", "--json").stdout)
    assert list(row) == ["account", "password", "verifier"]
    assert row["password"] != text and proves(row["verifier"], row["password"])
    [row] = rows(password(b"xyz\n", "--json").stdout)
    assert (row["account"], "password" in row) == (None, False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "the password is empty"),
        (b"\n", "the password is empty"),
        (b"a\nb\n", "more than one line"),
        (b"\xff\n", "no UTF-8"),
        (b"a\tb\n", "control characters"),
        (b"x" * 10_000, "more than 8192 octets"),
        (b"SCRAM-SHA-256$4096:eA==$eA==:eA==", "a verifier already"),
        ("\u0627\u0031a".encode(), "letters that SCRAM forbids"),
    ],
)
def test_what_cannot_be_a_password(given: bytes, said: str) -> None:
    done = password(given)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_terminal_is_asked_for_a_password_twice_and_does_not_show_it(tmp_path: Path) -> None:
    answers = [("Password of acme: ", PASSWORD), ("confirmation: ", PASSWORD)]
    status, shown = on_a_terminal(tmp_path, "provider", "password", "acme", answers=answers)
    assert (status, PASSWORD in shown) == (0, False)
    assert proves(shown.split()[-1], PASSWORD)


def test_two_passwords_that_differ_are_asked_for_again(tmp_path: Path) -> None:
    answers = [
        ("Password: ", "one"),
        ("confirmation: ", "another"),
        ("Password: ", PASSWORD),
        ("confirmation: ", PASSWORD),
    ]
    status, shown = on_a_terminal(tmp_path, "provider", "password", answers=answers)
    assert status == 0 and "do not match" in shown
    assert proves(shown.split()[-1], PASSWORD)
