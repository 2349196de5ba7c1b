"""``salmon-revsmtp status``, and what needs a person."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import trustme
from salmon import queue
from support.configuration import PASSWORD, agent_keys, configuration
from support.messages import MESSAGE
from support.project import Project, isp
from support.serving import RUN, server, wait_for
from support.terminal import on_a_terminal

from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.files import LITTLE_ROOM, Room
from salmon_revsmtp.journal.collections import Entry, Journal
from salmon_revsmtp.plugins.facade import Trouble
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import Arrival
from salmon_revsmtp.server import health
from salmon_revsmtp.server.health import DAY, Deferring, Health, Holding, Live
from salmon_revsmtp.smtp.envelope import Envelope

NOW = 1_795_700_000.0
ACME = {"name": "acme", "password": PASSWORD, "domains": ["example.org"]}

KEYS = {
    "server": ["status", "up", "answers", "pid", "version", "since", "lag"],
    "agent": [
        *("status", "agent", "enabled", "running", "push", "failing_since", "outcome"),
        *("ended", "error", "next"),
    ],
    "provider": [
        *("status", "accounts", "online", "messages", "bytes", "aside", "oldest", "sessions"),
        "live",
    ],
    "service": ["status", "service", "replies", "bytes"],
    "certificate": ["status", "certificate", "file", "ends"],
    "queue": ["status", "queue", "folder", "messages", "oldest"],
    "trouble": ["status", "trouble", "since", "text"],
}


class Place:
    """A project's folder, in which what is looked at can be put, on a clock that the test sets."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, NOW
        self.free: dict[str, int] = {}

    def health(self, *agents: dict[str, Any], memory: bool = True, **settings: Any) -> Health:
        return Health(
            configuration(*agents, **settings),
            self.folder,
            clock=lambda: self.now,
            room=lambda folder: Room(hash(folder), self.free.get(folder.name, LITTLE_ROOM), None),
            memory=memory,
        )

    def troubles(self, health: Health, live: Live | None = None) -> dict[str, Trouble]:
        return {one.key: one for one in health.look(live or self.live()).troubles}

    def live(self, **more: Any) -> Live:
        return Live(1, "0.1.0", NOW - DAY, **more)

    def put(self, name: str, waited: float) -> Path:
        """A message in a queue that came so many seconds ago."""
        new = self.folder / name / "new"
        new.mkdir(parents=True, exist_ok=True)
        path = new / f"{int(self.now - waited)}.M1P1Q{len(list(new.iterdir()))}.home"
        path.write_bytes(b"Subject: x\n\nx\n")
        return path


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "run").mkdir()
    return Place(tmp_path)


# -- what needs a person --------------------------------------------------------------------------


def test_where_all_is_well_nothing_needs_a_person(place: Place) -> None:
    assert place.troubles(place.health(agent_keys(1))) == {}


def test_an_agent_that_fails_is_named_with_what_it_says(place: Place) -> None:
    keys = [agent_keys(1), agent_keys(1, name="off", enabled=False)]
    journal = Journal(place.folder / "run/revsmtp.sqlite3")
    for name in ("isp", "off"):
        said = (0, 0, 0, 0, 0, None, None, "connecting to localhost:1: refused")
        journal.record(Entry(name, "odmr", NOW - 99, NOW - 90, "failed", *said), False)
    live = place.live(failing={"isp": NOW - 90, "off": NOW - 90})
    for one in (live, None):
        found = Health(configuration(*keys), place.folder).look(one).troubles
        [trouble] = [one for one in found if one.key.startswith("agent:")]
        assert (trouble.key, trouble.since) == ("agent:isp", NOW - 90)
        assert "refused" in trouble.text and "salmon-revsmtp check isp" in trouble.text


def test_an_agent_with_a_push_session_does_not_fail(place: Place) -> None:
    live = place.live(failing={"isp": NOW - 90}, push={"isp": NOW - 1})
    found = place.health(agent_keys(1)).look(live)
    assert not found.troubles
    [agent] = [row for row in found.rows if row["status"] == "agent"]
    assert agent["push"] and agent["failing_since"] is None


def test_a_push_session_in_which_all_is_deferred_is_named(place: Place) -> None:
    looked, reply = place.health(agent_keys(1)), "451 4.3.0 the next host is down"
    live = place.live(push={"isp": NOW - 900}, deferring={"isp": Deferring(NOW - 60, reply)})
    assert place.troubles(looked, live) == {}, "a next host that restarts is no trouble"
    place.now += 300
    trouble = place.troubles(looked, live)["agent:isp:deferred"]
    assert reply in trouble.text and trouble.since == NOW - 60
    assert place.troubles(looked, place.live(push={"isp": NOW - 900})) == {}


def test_an_account_that_defers_its_mail_for_long_is_named(place: Place) -> None:
    looked, said = place.health(accounts=[ACME]), "the customer says 451 4.3.0 the disk is full"
    waits = Holding(3, 900, oldest=NOW - 9 * DAY, online=1, deferred=said)
    live = place.live(held={"acme": waits})
    assert place.troubles(looked, live) == {}, "it counts from the first look"
    place.now += 3600
    trouble = place.troubles(looked, live)["account:acme:deferred"]
    assert said in trouble.text and "3 messages" in trouble.text and trouble.since == NOW
    again = place.troubles(place.health(accounts=[ACME]), live)["account:acme:deferred"]
    assert again.since == NOW, "a server that starts again knows it"
    assert place.troubles(looked, place.live(held={"acme": waits._replace(deferred="")})) == {}
    place.now += 60
    assert place.troubles(looked, live) == {}, "it begins anew"
    place.troubles(looked, place.live())
    place.now += 3600
    assert place.troubles(looked, live) == {}, "all its mail had gone out"


def test_what_we_say_of_an_error_is_not_cut_and_a_longer_one_is_in_words(place: Place) -> None:
    journal = Journal(place.folder / "run/revsmtp.sqlite3")
    live, texts = place.live(failing={"isp": NOW - 90}), []
    for length in (900, 1900):
        said = (0, 0, 0, 0, 0, None, None, "x" * length)
        journal.record(Entry("isp", "odmr", NOW - 99, NOW - 90, "failed", *said), False)
        texts.append(place.troubles(place.health(agent_keys(1)), live)["agent:isp"].text)
    assert "x" * 900 in texts[0] and "characters more" not in texts[0]
    assert re.search(r"x [.]{3} 9\d\d characters more [.]{3} x", texts[1])


def test_nothing_has_begun_after_now_whatever_the_clock_was(place: Place) -> None:
    place.free = {"run": LITTLE_ROOM - 1}
    place.now = NOW + 9 * DAY
    assert place.troubles(place.health())["disk:run"].since == NOW + 9 * DAY
    place.now = NOW
    health = place.health()
    assert place.troubles(health)["disk:run"].since == NOW
    place.now = NOW + 60
    assert place.troubles(place.health())["disk:run"].since == NOW


def test_a_disk_that_fills_is_named_once_for_each_file_system(place: Place) -> None:
    health = place.health(accounts=[ACME], provider={"listen": "127.0.0.1:0"})
    place.free = {"run": LITTLE_ROOM - 1}
    assert set(place.troubles(health)) == {"disk:run"}
    (place.folder / "run/hold").mkdir()
    place.free = {"hold": LITTLE_ROOM - 1}
    found = place.troubles(health)
    assert set(found) == {"disk:run/hold"}
    assert "511 MiB are free" in found["disk:run/hold"].text
    place.free = {}
    assert place.troubles(health) == {}
    one = Health(configuration(), place.folder, room=lambda folder: Room(1, 0, None))
    assert [trouble.key for trouble in one.look(place.live()).troubles] == ["disk:run"]
    few = Health(configuration(), place.folder, room=lambda folder: Room(1, LITTLE_ROOM, 9))
    assert "room for 9 more files" in few.look(place.live()).troubles[0].text


def test_a_certificate_of_few_days_needs_no_one_before_it_was_made(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "certificate_lasts", lambda *paths: (NOW - 9, NOW + DAY))
    settings = {"listen": "127.0.0.1:0", "domains": ["example.org"]}
    pem = place.folder / "x.pem"
    pem.write_bytes(trustme.CA().issue_cert("x").private_key_and_cert_chain_pem.bytes())
    looked = place.health(mx={**settings, "tls_cert": str(pem)})
    assert place.troubles(looked)["certificate:service:mx"].since == NOW - 9


@pytest.mark.parametrize(
    ("days", "said"), [(-1, "has ended on"), (20, "ends on"), (22, None)], ids=str
)
def test_a_certificate_near_its_end_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch, days: int, said: str | None
) -> None:
    certificate = trustme.CA().issue_cert("localhost")
    pem = place.folder / "both.pem"
    pem.write_bytes(certificate.private_key_and_cert_chain_pem.bytes())
    lasts = (NOW - DAY, NOW + days * DAY)
    monkeypatch.setattr(health, "certificate_lasts", lambda *paths: lasts)
    looked = place.health(
        accounts=[ACME],
        provider={"listen": "127.0.0.1:0", "tls_cert": str(pem)},
        mx={"listen": "127.0.0.1:0", "domains": ["example.org"], "tls_cert": str(pem)},
    )
    found = place.troubles(looked)
    if said is None:
        assert found == {}
        return
    assert set(found) == {"certificate:provider", "certificate:service:mx"}
    assert (
        said in found["certificate:provider"].text
        and "both.pem" in found["certificate:provider"].text
    )


def test_a_certificate_that_cannot_be_read_is_named(place: Place) -> None:
    pem = place.folder / "both.pem"
    pem.write_bytes(trustme.CA().issue_cert("x").private_key_and_cert_chain_pem.bytes())
    looked = place.health(accounts=[ACME], provider={"listen": "127.0.0.1:0", "tls_cert": str(pem)})
    pem.unlink()
    assert "cannot be read" in place.troubles(looked)["certificate:provider"].text


@pytest.mark.parametrize(
    ("folder", "waits", "key"),
    [
        ("run/undeliverable", 1, "undeliverable"),
        ("run/unsent", 4 * 3600, "unsent"),
        ("run/inbound", 3600, "queue:run/inbound"),
    ],
)
def test_mail_that_waits_too_long_is_named(
    place: Place, folder: str, waits: float, key: str
) -> None:
    looked = place.health(default={"hostname": "x.example.org", "delivery": "queue"})
    path = place.put(folder, waits - 1)
    if key != "undeliverable":
        assert place.troubles(looked) == {}
    place.now += 1
    [found] = place.troubles(looked).values()
    assert (found.key, found.since) == (key, float(path.name.partition(".")[0]))
    path.unlink()
    assert place.troubles(looked) == {}


def test_an_account_is_unseen_when_its_mail_has_waited_for_a_day(place: Place) -> None:
    provider: dict[str, Any] = {"accounts": [ACME], "provider": {"listen": "127.0.0.1:0"}}
    looked = place.health(**provider)

    def found(**holding: Any) -> set[str]:
        held = {"acme": Holding(messages=2, octets=10, **holding)}
        return set(place.troubles(looked, place.live(held=held)))

    unseen = {"account:acme:unseen"}
    assert found(seen=NOW - DAY) == unseen
    assert found(seen=NOW - DAY + 1) == set()
    assert found(seen=NOW - 2 * DAY, online=1) == set()
    assert found(oldest=NOW - DAY) == unseen, "not seen since the server started, a day ago"
    # Another server does not know when it was seen; what was so is so still, with the same time.
    again = place.health(**provider)
    held = {"acme": Holding(2, 10, 0, NOW - 60)}
    young = Live(1, "0.1.0", NOW - 1, held=held)
    assert place.troubles(again, young)["account:acme:unseen"].since == NOW - DAY
    assert set(place.troubles(again, Live(1, "0.1.0", NOW, held={}))) == set()
    assert place.troubles(again, young) == {}, "and a server that has just started waits a while"


def test_what_is_set_aside_and_what_no_account_has_is_named(place: Place) -> None:
    off = {**ACME, "name": "off", "domains": ["example.com"], "enabled": False}
    looked = place.health(accounts=[ACME, off], provider={"listen": "127.0.0.1:0"})
    held = {
        "acme": Holding(3, 30, aside=2, seen=NOW),
        "gone": Holding(1, 10, oldest=NOW),
        "off": Holding(1, 10, oldest=NOW - 9 * DAY),
    }
    found = place.troubles(looked, place.live(held=held))
    assert set(found) == {"account:acme:aside", "account:gone:unseen"}
    assert "2 messages" in found["account:acme:aside"].text
    assert "customer_accounts has no more" in found["account:gone:unseen"].text
    place.now += 100
    later = place.troubles(looked, place.live(held=held))
    assert later["account:acme:aside"].since == NOW, "since when is remembered"


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, False),
        ({"agents": [agent_keys(1)]}, True),
        ({"agents": [agent_keys(1, every=None)]}, False),
        ({"agents": [agent_keys(1, enabled=False)]}, False),
        ({"default": {"listen": "127.0.0.1:0", "domains": ["example.org"]}}, True),
        ({"accounts": [ACME], "provider": {"listen": "127.0.0.1:0"}}, True),
    ],
)
def test_that_no_server_runs_needs_a_person_where_one_should(
    place: Place, settings: dict[str, Any], needed: bool
) -> None:
    agents = settings.pop("agents", ())
    looked = place.health(*agents, memory=False, **settings)
    assert [one.key for one in looked.look(None).troubles] == ["server"] * needed
    settings["agents"] = agents


def test_a_pid_file_that_a_killed_server_left_needs_force(place: Place) -> None:
    looked = place.health(accounts=[ACME], provider={"listen": "127.0.0.1:0"})
    gone = subprocess.Popen(["true"])
    gone.wait()
    for number, force in ((gone.pid, True), (os.getpid(), False), ("nonsense", False)):
        (place.folder / "run/smtp.pid").write_text(f"{number}\n")
        [trouble] = looked.look(None).troubles
        assert ("`salmon start --force`" in trouble.text) is force


def test_an_agent_that_someone_has_disabled_needs_no_server(place: Place) -> None:
    Journal(place.folder / "run/revsmtp.sqlite3").set_enabled("isp", False)
    assert place.health(agent_keys(1), memory=False).look(None).troubles == []


def test_the_log_says_once_what_begins_and_once_that_it_is_over(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    def lines() -> list[str]:
        found = [one.getMessage() for one in caplog.records if "trouble=" in one.getMessage()]
        caplog.clear()
        return found

    with caplog.at_level(logging.INFO):
        first, second = place.put("run/undeliverable", 10), None
        looked = place.health()
        place.troubles(looked)
        [line] = lines()
        assert line.startswith("trouble=undeliverable Undelivered: 1 message, ")
        second = place.put("run/undeliverable", 5)
        place.troubles(looked)
        first.unlink()
        looked = place.health()  # as after a restart
        place.troubles(looked)
        assert lines() == []
        second.unlink()
        place.troubles(looked)
        assert lines() == ["trouble=undeliverable is over"]
        place.troubles(place.health())
        assert lines() == []


def test_what_is_remembered_wrongly_does_no_harm(place: Place) -> None:
    for text in ("", "[]", "{", '{"troubles": [[]]}', '{"troubles": 1, "undeliverable": 2}'):
        (place.folder / "run/status.json").write_text(text)
        assert place.troubles(place.health()) == {}
    assert (place.folder / "run/status.json").stat().st_mode & 0o777 in (0o600, 0o644)


def test_what_cannot_be_read_is_named_and_hides_nothing_else(place: Place) -> None:
    (place.folder / "run/undeliverable").mkdir()
    (place.folder / "run/undeliverable/new").symlink_to("new")
    looked = place.health(accounts=[ACME], provider={"listen": "127.0.0.1:0"})
    held = {"acme": Holding(1, 10, seen=NOW - DAY)}
    found = place.troubles(looked, place.live(held=held))
    assert set(found) == {"queue:run/undeliverable", "account:acme:unseen"}
    found = place.troubles(looked, place.live(hold_error="no such table"))
    assert set(found) == {"queue:run/undeliverable", "hold", "account:acme:unseen"}
    assert "no such table" in found["hold"].text
    (place.folder / "run/hold").mkdir()
    (place.folder / "run/hold/index.sqlite3").write_bytes(b"this is no database")
    [hold] = [one for one in looked.look(None).troubles if one.key == "hold"]
    assert "run/hold/index.sqlite3: file is not a database" in hold.text


# -- the command ----------------------------------------------------------------------------------


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def held(project: Project, messages: int = 2) -> None:
    store = EmbeddedStore(project.folder / "run/hold")
    for _ in range(messages):
        store.put([Arrival(Envelope("a@example.net", ("b@example.org",)), ("acme",), [MESSAGE])])
    store.close()


@pytest.fixture
def both(project: Project) -> Project:
    """A project that collects, and holds mail."""
    project.configure(isp(1, every="None"))
    settings = project.folder / "config/settings.py"
    settings.write_text(
        f"{settings.read_text()}\ncustomer_accounts = {[ACME]!r}\n"
        "provider = {'hostname': 'mx.example.net', 'listen': '127.0.0.1:0'}\n"
    )
    held(project)
    return project


@pytest.mark.parametrize("running", [False, True])
def test_status_says_what_there_is(both: Project, running: bool) -> None:
    with server(both, RUN) if running else contextlib.nullcontext():
        began = time.monotonic()
        done = both.run("status", "--json")
        seconds = time.monotonic() - began
    assert seconds < 30, "with room for a busy machine; half a second by itself"
    found = rows(done)
    for row in found:
        assert list(row) == KEYS[row["status"]]
    named = {(row["status"], row.get("queue") or row.get("agent") or "") for row in found}
    assert named >= {
        ("server", ""),
        ("agent", "isp"),
        ("provider", ""),
        ("queue", "undeliverable"),
        ("queue", "unsent"),
    }
    [there] = [row for row in found if row["status"] == "server"]
    assert (there["up"], there["answers"], there["pid"] is not None) == (running,) * 3
    [provider] = [row for row in found if row["status"] == "provider"]
    assert (provider["messages"], provider["accounts"], provider["online"]) == (2, 1, 0)
    assert provider["bytes"] == 2 * len(MESSAGE) and provider["oldest"]
    troubles = [row["trouble"] for row in found if row["status"] == "trouble"]
    assert troubles == ([] if running else ["server"])
    assert done.returncode == (0 if running else 1)


def test_a_server_that_is_stopped_does_not_hang_status(both: Project) -> None:
    queue.Queue(str(both.folder / "run/undeliverable")).push(MESSAGE)
    with server(both, RUN) as process:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            done = both.run("status", "--json")
            seconds = time.monotonic() - began
        finally:
            os.kill(process.pid, signal.SIGCONT)
    assert done.returncode == 1 and seconds < 30
    assert "has not answered in 2 seconds" in done.stderr
    found = rows(done)
    assert [row["trouble"] for row in found if row["status"] == "trouble"] == [
        "server",
        "undeliverable",
    ]
    [provider] = [row for row in found if row["status"] == "provider"]
    assert provider["messages"] == 2, "also from a hold store that the stopped server has"


def test_an_older_server_is_said(both: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (both.folder / "old.py").write_text(
        "import salmon_revsmtp.server.daemon as daemon\n"
        "whole = daemon.Daemon._answer\n"
        "async def older(self, request):\n"
        "    asked = {} if request.get('do') == 'status' else request\n"
        "    async for answer in whole(self, asked):\n"
        "        yield answer\n"
        "daemon.Daemon._answer = older\n"
    )
    boot = both.folder / "config/boot.py"
    boot.write_text("import old\n" + boot.read_text())
    with server(both, RUN):
        done = both.run("status", "--json")
    assert "it is older than this command: restart it" in done.stderr
    assert [row["trouble"] for row in rows(done) if row["status"] == "trouble"] == ["server"]


def test_on_a_terminal_trouble_is_first_and_harmless(both: Project) -> None:
    error = "550 go \x1b[2J away\u202e"
    said = (0, 0, 0, 0, 0, None, None, error)
    Journal(both.folder / "run/revsmtp.sqlite3").record(
        Entry("isp", "odmr", NOW, NOW, "refused", *said), False
    )
    status, shown = on_a_terminal(both.folder, "status")
    assert status == 1
    assert shown.lstrip().startswith("Needs you\r\n")
    assert "550 go ?[2J away?" in shown
    order = [shown.index(word) for word in ("Needs you", "Server", "Agents", "Provider", "Queues")]
    assert order == sorted(order)
    assert all(len(line) <= 100 for line in shown.splitlines())


def test_a_server_that_starts_again_says_nothing_twice(both: Project) -> None:
    queue.Queue(str(both.folder / "run/undeliverable")).push(MESSAGE)
    log = both.folder / "server.log"
    memory = both.folder / "run/status.json"
    with server(both, RUN) as process:
        wait_for(memory.exists, process)
    assert log.read_text().count("trouble=undeliverable") == 1
    with server(both, RUN):
        assert both.run("status").returncode == 1
    assert "trouble=undeliverable" not in log.read_text()
    assert memory.stat().st_mode & 0o777 == 0o600


def test_unsent_notifications_are_counted(both: Project) -> None:
    Outbox(lambda: None, both.folder / "run/unsent").put("ann@example.net", b"Subject: x\n\nx\n")
    found = rows(both.run("status", "--json"))
    [unsent] = [row for row in found if row.get("queue") == "unsent"]
    assert unsent["messages"] == 1 and unsent["oldest"]
