"""``undelivered`` and ``unsent``: what waits for a person, and what becomes of it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import smtplib
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from salmon import queue
from salmon.mail import MailRequest
from salmon.routing import Router
from salmon.server import SMTPError
from support.collecting import exchange
from support.project import Project
from support.salmon import Salmon, explodes, fails, waits_for
from support.serving import RUN, server
from support.terminal import on_a_terminal

from salmon_revsmtp.delivery.maildir import push_safely
from salmon_revsmtp.delivery.outbox import GIVEN_UP, Outbox
from salmon_revsmtp.delivery.retry import Retried, Retry
from salmon_revsmtp.delivery.router import undeliverable_queue
from salmon_revsmtp.delivery.trace import envelope_lines, unpack_undeliverable
from salmon_revsmtp.delivery.waiting import KEPT_MARK, WaitingMail
from salmon_revsmtp.files import FolderLock
from salmon_revsmtp.journal.connection import JournalConnection
from salmon_revsmtp.journal.deliveries import DeliveryJournal
from salmon_revsmtp.smtp.envelope import Envelope

EVIL = "\x1b[2J\u202e\x9b"
MESSAGE = b"From: Ann <ann@example.net>\nTo: bob@example.org\nSubject: hello\n\nhi\n"
ROW_KEYS = ["key", "since", "from", "to", "size", "subject", "reason", "envelope"]
WAITS = Path("run/undeliverable")


def keep(
    project: Project, data: bytes = MESSAGE, *, envelope: bool = True, to: str = "bob@example.org"
) -> str:
    """Put a message into the project's undeliverable queue; returns its key."""
    lines = envelope_lines("ann@example.net", to) + b"X-Undeliverable-Reason: no route\n"
    target = queue.Queue(str(project.folder / WAITS))
    if not envelope:
        return str(target.push(data))
    return push_safely(target, lines + data, mark=KEPT_MARK)


def keys(project: Project, folder: Path = WAITS) -> list[str]:
    return WaitingMail(project.folder / folder).keys()


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


# -- list and show --------------------------------------------------------------------------------


def test_what_waits_is_listed_with_the_reason_the_oldest_first(project: Project) -> None:
    project.configure()
    first, second = keep(project), keep(project, b"Subject: =?utf-8?q?caf=C3=A9?=\n\nx\n")
    done = project.run("undelivered", "--json")
    assert done.returncode == 0, done.stderr
    one, two = rows(done)
    assert list(one) == ROW_KEYS
    assert (one["key"], two["key"]) == (first, second)
    assert (one["from"], one["to"], one["subject"], one["reason"]) == (
        "ann@example.net",
        ["bob@example.org"],
        "hello",
        "no route",
    )
    assert one["envelope"] is True and two["subject"] == "café"
    limited = project.run("undelivered", "--limit", "1")
    assert first in limited.stdout and second not in limited.stdout
    assert f"--after {first}" in limited.stderr
    assert [one["key"] for one in rows(project.run("undelivered", "--json", "--after", first))] == [
        second
    ]


def test_of_what_salmons_own_receiver_took_the_header_is_what_is_known(project: Project) -> None:
    project.configure()
    key = keep(project, envelope=False)
    [row] = rows(project.run("undelivered", "--json"))
    assert (row["from"], row["to"]) == ("ann@example.net", ["bob@example.org"])
    assert row["envelope"] is False and row["reason"] == ""
    assert "envelope not kept" in project.run("undelivered", "show", key).stdout


def test_the_queue_of_the_boot_module_is_the_one_that_is_meant(project: Project) -> None:
    project.configure()
    boot = project.folder / "config/boot.py"
    boot.write_text(boot.read_text().replace("run/undeliverable", "run/elsewhere"))
    keep(project)
    assert project.run("undelivered", "--json").stdout == ""
    queue.Queue(str(project.folder / "run/elsewhere")).push(MESSAGE)
    assert len(rows(project.run("undelivered", "--json"))) == 1


def test_a_boot_module_that_fails_does_not_hide_what_waits(project: Project) -> None:
    project.configure()
    keep(project)
    (project.folder / "config/boot.py").write_text("import nothing_of_that_name\n")
    done = project.run("undelivered", "--json")
    assert len(rows(done)) == 1 and "nothing_of_that_name" in done.stderr


def test_what_a_stranger_wrote_is_harmless_on_a_terminal_and_raw_in_a_pipe(
    project: Project,
) -> None:
    project.configure()
    data = f"Subject: {EVIL}\nX-Evil: {EVIL}\n\n{EVIL}\n".encode()
    key = keep(project, data)
    for command in (
        ["undelivered"],
        ["undelivered", "show", key],
        ["undelivered", "show", key, "--content"],
    ):
        status, shown = on_a_terminal(project.folder, *command)
        assert status == 0
        assert not {"\x1b", "\u202e", "\x9b"} & set(shown), repr(shown)
    piped = subprocess.run(
        [sys.executable, "-m", "salmon_revsmtp", "undelivered", "show", key, "--content"],
        cwd=project.folder,
        capture_output=True,
        check=True,
    )
    assert piped.stdout == data
    [row] = rows(project.run("undelivered", "show", key, "--content", "--json"))
    assert base64.b64decode(row["content"]) == data


# -- drop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["retry", "drop"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the KEYs of messages, or give --all"),
        (["{key}", "--all"], "name the KEYs of messages, or give --all"),
        (["{key}", "17"], "no message is undelivered with the key 17; nothing is done"),
        (["../new/{key}"], "no message is undelivered with the key ../new/"),
        (["{file}"], "no message is undelivered with the key /"),
        (["{half}"], "no message is undelivered with the key"),
        ([""], "no message is undelivered with the key"),
    ],
)
def test_who_mistypes_deletes_nothing(
    project: Project, action: str, arguments: list[str], said: str
) -> None:
    project.configure()
    key = keep(project)
    file = project.folder / "config/settings.py"
    words = [one.format(key=key, half=key[:-1], file=file) for one in arguments]
    yes = ["--yes"] if action == "drop" else []
    done = project.run("undelivered", action, *words, *yes)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert keys(project) == [key] and project.got() == [] and file.exists()


def test_drop_says_what_it_is_about_to_do_and_asks(project: Project) -> None:
    project.configure()
    first, second = keep(project), keep(project)
    done = project.run("undelivered", "drop", first)
    assert done.returncode == 2 and "Delete 1 message" in done.stderr and "--yes" in done.stderr
    for answer, status, left in [("n", 1, [first, second]), ("y", 0, [second])]:
        found, shown = on_a_terminal(
            project.folder, "undelivered", "drop", first, answers=[("[y/N]", answer)]
        )
        assert found == status and "Delete 1 message" in shown
        assert keys(project) == left
    done = project.run("undelivered", "drop", "--all", "--yes", "--json")
    assert rows(done) == [{"action": "drop", "key": second, "done": True, "remark": ""}]
    assert keys(project) == []
    assert project.run("undelivered", "drop", "--all", "--yes").stdout == "nothing is undelivered\n"


# -- retry ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [False, True])
def test_retry_hands_a_message_to_the_handlers_and_deletes_it_then(
    project: Project, running: bool
) -> None:
    project.configure()
    with server(project, RUN) if running else contextlib.nullcontext():
        key = keep(project)
        done = project.run("undelivered", "retry", key)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout.startswith("delivered: 1 message, ")
    assert project.got() == [MESSAGE] and keys(project) == []


FAILING = """
from salmon.routing import route, stateless

@route("(address)@(host)", address=".+", host=".+")
@stateless
def FAIL(message, address=None, host=None):
    raise RuntimeError("still broken")
"""


def test_what_fails_again_stays_with_its_key_and_the_new_reason(project: Project) -> None:
    project.configure()
    (project.folder / "app/handlers/sample.py").write_text(FAILING)
    key = keep(project)
    done = project.run("undelivered", "retry", key)
    assert done.returncode == 1
    assert f"{key}: not delivered: a handler raised RuntimeError: still broken" in done.stderr
    [row] = rows(project.run("undelivered", "--json"))
    assert row["key"] == key and "still broken (sample.py, line 7" in row["reason"]
    file = project.folder / WAITS / "new" / key
    assert file.read_bytes().endswith(MESSAGE) and stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.fixture
def journal(salmon: Salmon) -> Iterator[DeliveryJournal]:
    found = DeliveryJournal(JournalConnection())
    yield found
    found.close()


@pytest.fixture
def retry(salmon: Salmon, journal: DeliveryJournal) -> Retry:
    """In this process, on the queue of the fixture ``salmon``."""
    return Retry(salmon.folder, journal, Outbox(lambda: salmon.relay), threading.Lock(), 5)


def kept(salmon: Salmon, *recipients: str, data: bytes = MESSAGE, reason: str = "why") -> str:
    return undeliverable_queue().keep(Envelope("ann@example.net", ()), recipients, data, reason)


def test_each_recipient_gets_it_once_however_often_it_is_tried(
    salmon: Salmon, retry: Retry
) -> None:
    broken = [True]

    def b_is_broken(message: MailRequest) -> None:
        if message.To == "b@example.org" and broken[0]:
            raise SMTPError(451, "not today")

    salmon.handle(".*", b_is_broken)
    key = kept(salmon, "a@example.org", "b@example.org", "c@example.org")
    [first] = retry.retry([key])
    assert first == Retried(key, False, "deferred with 451 not today")
    waiting = WaitingMail(salmon.folder / WAITS)
    found = waiting.find(key)
    assert found is not None and found.recipients == ("b@example.org",)
    broken.clear()
    broken.append(False)
    assert list(retry.retry([key])) == [Retried(key, True)]
    got = [one.To for one in salmon.handled]
    assert sorted(got) == ["a@example.org", "b@example.org", "b@example.org", "c@example.org"]
    assert waiting.keys() == []


def test_a_death_between_the_handler_and_the_deletion_handles_nothing_twice(
    salmon: Salmon, retry: Retry, monkeypatch: pytest.MonkeyPatch
) -> None:
    salmon.handle(".*")
    key = kept(salmon, "b@example.org")

    def dies(self: WaitingMail, key: str) -> bool:
        raise OSError("as if the process had died here")

    with monkeypatch.context() as patched:
        patched.setattr(WaitingMail, "drop", dies)
        [died] = retry.retry([key])
    assert not died.done and len(salmon.handled) == 1
    assert list(retry.retry([key])) == [Retried(key, True)]
    assert len(salmon.handled) == 1


def test_two_processes_never_try_at_once(salmon: Salmon, retry: Retry) -> None:
    salmon.handle(".*")
    key = kept(salmon, "b@example.org")
    with FolderLock(salmon.folder / WAITS).hold() as lock:
        assert lock.had
        [one] = retry.retry([key])
    assert not one.done and "another process" in one.remark
    assert salmon.handled == []


def test_a_handler_that_hangs_is_left_alone_and_the_message_stays(
    salmon: Salmon, tmp_path: Path
) -> None:
    go = threading.Event()
    salmon.handle(".*", waits_for(go))
    retry = Retry(salmon.folder, DeliveryJournal(), Outbox(lambda: None), threading.Lock(), 0.2)
    key, other = kept(salmon, "b@example.org"), kept(salmon, "b@example.org")
    one, two = retry.retry([key, other])
    go.set()
    assert not one.done and "the handler still runs" in one.remark
    assert not two.done and "another handler has not returned" in two.remark
    assert WaitingMail(salmon.folder / WAITS).keys() == [key, other]


def test_a_slow_handler_does_not_get_it_once_more_when_it_has_returned(
    salmon: Salmon, journal: DeliveryJournal
) -> None:
    go = threading.Event()
    salmon.handle(".*", waits_for(go))
    turn = threading.Lock()
    retry = Retry(salmon.folder, journal, Outbox(lambda: None), turn, 0.2)
    key = kept(salmon, "b@example.org")
    [one] = retry.retry([key])
    assert not one.done and "the handler still runs" in one.remark
    go.set()
    assert turn.acquire(timeout=60)
    turn.release()
    assert list(retry.retry([key])) == [Retried(key, True)]
    assert len(salmon.handled) == 1


def test_a_slow_handler_that_fails_in_the_end_is_asked_again(
    salmon: Salmon, journal: DeliveryJournal
) -> None:
    go = threading.Event()

    def waits_and_fails(message: MailRequest) -> None:
        go.wait(60)
        raise SMTPError(451, "not today")

    salmon.handle(".*", waits_and_fails)
    turn = threading.Lock()
    retry = Retry(salmon.folder, journal, Outbox(lambda: None), turn, 0.2)
    key = kept(salmon, "b@example.org")
    list(retry.retry([key]))
    go.set()
    assert turn.acquire(timeout=60)
    turn.release()
    assert list(retry.retry([key])) == [Retried(key, False, "deferred with 451 not today")]
    assert len(salmon.handled) == 2


def test_where_the_folder_cannot_be_written_no_handler_is_asked(
    salmon: Salmon, retry: Retry, monkeypatch: pytest.MonkeyPatch
) -> None:
    salmon.handle(".*")
    key = kept(salmon, "b@example.org")
    monkeypatch.setattr(os, "access", lambda *asked: False)
    [one] = retry.retry([key])
    assert not one.done and "cannot be written" in one.remark
    assert salmon.handled == []


def test_with_several_addresses_in_its_header_a_person_says_for_whom_it_is(
    salmon: Salmon, retry: Retry
) -> None:
    salmon.handle(".*")
    data = b"From: ann@example.net\nTo: a@example.org, b@example.org\n\nhi\n"
    key = str(queue.Queue(str(salmon.folder / WAITS)).push(data))
    [one] = retry.retry([key])
    assert not one.done and "--to ADDRESS" in one.remark and salmon.handled == []
    assert list(retry.retry([key], to="b@example.org")) == [Retried(key, True)]
    [message] = salmon.handled
    assert (message.To, message.From, message.Data) == ("b@example.org", "ann@example.net", data)


def test_a_handler_gets_it_as_it_would_have_at_first(salmon: Salmon, retry: Retry) -> None:
    failing = [True]

    def fails_once(message: MailRequest) -> None:
        if failing.pop():
            raise RuntimeError

    salmon.handle(".*", fails_once)
    exchange(salmon, "b@example.org", mail=" ENVID=7")
    failing.append(False)
    [key] = WaitingMail(salmon.folder / WAITS).keys()
    assert list(retry.retry([key])) == [Retried(key, True)]
    first, again = salmon.handled
    assert (first.Data, first.From, first.To) == (again.Data, again.From, again.To)


@pytest.fixture
def given_up(salmon: Salmon) -> str:
    """The key of a notification that the relay has refused for good."""
    taken, salmon.relay = salmon.relay, SimpleNamespace(deliver=refuses)
    outbox = Outbox(lambda: salmon.relay)
    outbox.put("ann@example.net", b"Subject: Undelivered mail\n\nsorry\n")
    outbox.send()
    salmon.relay = taken
    [key] = WaitingMail(salmon.folder / WAITS).keys()
    return key


def refuses(message: Any, To: str, From: str) -> None:
    raise smtplib.SMTPDataError(554, b"no bounces here")


def test_a_notification_goes_to_the_relay_and_not_to_the_handlers(
    salmon: Salmon, given_up: str, retry: Retry
) -> None:
    salmon.handle(".*")
    [one] = retry.retry([given_up])
    assert one.done and "unsent" in one.remark
    retry._outbox.wait(60)
    assert [whose for _, whose, _ in salmon.relayed] == ["ann@example.net"]
    assert salmon.handled == []


def test_what_only_says_that_it_is_a_notification_never_goes_to_the_relay(
    salmon: Salmon, given_up: str, retry: Retry
) -> None:
    """A stranger may have written so, in mail that Salmon's own receiver took."""
    salmon.handle(".*")
    forged = WaitingMail(salmon.folder / WAITS).read(given_up)
    assert forged is not None and GIVEN_UP.encode() in forged
    key = str(queue.Queue(str(salmon.folder / WAITS)).push(forged))
    [one] = retry.retry([key])
    assert not one.done and "--to ADDRESS" in one.remark and salmon.handled == []
    assert list(retry.retry([key], to="bob@example.org")) == [Retried(key, True)]
    retry._outbox.wait(60)
    assert salmon.relayed == [] and len(salmon.handled) == 1


def test_a_death_right_after_it_was_given_up_leaves_a_notification(
    salmon: Salmon, retry: Retry, monkeypatch: pytest.MonkeyPatch
) -> None:
    salmon.handle(".*")
    queues = undeliverable_queue()
    keep_stored = queues.keep_stored

    def dies(*stored: Any) -> str:
        keep_stored(*stored)
        raise KeyboardInterrupt

    outbox = Outbox(lambda: SimpleNamespace(deliver=refuses))
    outbox.put("ann@example.net", b"Subject: Undelivered mail\n\nsorry\n")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(queues, "keep_stored", dies)
        outbox.send()
    [key] = WaitingMail(salmon.folder / WAITS).keys()
    [one] = retry.retry([key])
    assert one.done and "unsent" in one.remark and salmon.handled == []


FORGED = (
    b"Return-Path: <ceo@example.org>\nDelivered-To: victim@example.com\n"
    b"X-Undeliverable-Reason: no route takes it\n"
)


@pytest.mark.parametrize("head", [FORGED, b""])
def test_a_stranger_does_not_say_whom_a_retry_is_for(
    salmon: Salmon, retry: Retry, head: bytes
) -> None:
    """What Salmon's own receiver took is whole, and its header is not an envelope."""
    salmon.handle(".*")
    data = head + b"From: ann@example.net\nTo: victim@example.com\n\nspam\n"
    undeliverable_queue().push(MailRequest("peer", "ann@example.net", "b@example.org", data))
    waiting = WaitingMail(salmon.folder / WAITS)
    [key] = waiting.keys()
    found = waiting.find(key)
    assert found is not None and not found.envelope and found.reason == ""
    assert found.sender == "ann@example.net"
    [one] = retry.retry([key])
    assert not one.done and "--to ADDRESS" in one.remark and salmon.handled == []
    assert list(retry.retry([key], to="b@example.org")) == [Retried(key, True)]
    [message] = salmon.handled
    assert message.To == "b@example.org" and message.Data.startswith(head)


def test_a_queue_class_of_ones_own_keeps_envelopes_too(
    salmon: Salmon, retry: Retry, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(queue.Queue):  # type: ignore[misc, unused-ignore]
        pass

    monkeypatch.setattr(Router, "UNDELIVERABLE_QUEUE", Own(str(salmon.folder / WAITS)))
    salmon.handle(".*")
    key = kept(salmon, "b@example.org")
    waiting = WaitingMail(salmon.folder / WAITS)
    found = waiting.find(key)
    assert found is not None and found.envelope and found.recipients == ("b@example.org",)
    assert list(retry.retry([key])) == [Retried(key, True)]
    assert waiting.keys() == [] and len(salmon.handled) == 1


def test_what_is_not_ours_and_fails_again_stays_as_it_is(salmon: Salmon, retry: Retry) -> None:
    salmon.handle(".*", explodes)
    key = str(queue.Queue(str(salmon.folder / WAITS)).push(MESSAGE))
    for _ in range(2):
        [one] = retry.retry([key], to="b@example.org")
        assert not one.done and "handler bug" in one.remark
    assert WaitingMail(salmon.folder / WAITS).read(key) == MESSAGE


def test_what_is_deleted_while_it_is_tried_does_not_come_back(salmon: Salmon, retry: Retry) -> None:
    waiting = WaitingMail(salmon.folder / WAITS)

    def deletes_and_fails(message: MailRequest) -> None:
        waiting.drop(key)
        raise SMTPError(451, "not today")

    salmon.handle(".*", deletes_and_fails)
    key = kept(salmon, "b@example.org")
    [one] = retry.retry([key])
    assert not one.done and waiting.keys() == []


def test_what_is_being_tried_is_not_dropped(project: Project) -> None:
    project.configure()
    key = keep(project)
    with FolderLock(project.folder / WAITS).hold():
        done = project.run("undelivered", "drop", key, "--yes")
    assert done.returncode == 1 and "another process is at work on it" in done.stderr
    assert keys(project) == [key]


def test_who_does_not_read_the_answers_stops_no_one(salmon: Salmon, retry: Retry) -> None:
    salmon.handle(".*")
    answers = retry.retry([kept(salmon, "b@example.org"), kept(salmon, "b@example.org")])
    assert next(answers).done
    with FolderLock(salmon.folder / WAITS).hold() as lock:
        assert lock.had
    outbox = Outbox(lambda: salmon.relay)
    for _ in range(2):
        outbox.put("ann@example.net", b"Subject: Undelivered mail\n\nsorry\n")
    sent = outbox.send_now(WaitingMail(salmon.folder / "run/unsent").keys())
    assert next(sent)[1]
    outbox.send()
    assert len(salmon.relayed) == 2


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (explodes, "a handler raised RuntimeError: handler bug"),
        (fails(550, "no such user"), "refused with 550 no such user"),
    ],
)
def test_no_one_is_told_of_what_fails_again(
    salmon: Salmon, retry: Retry, action: Any, said: str
) -> None:
    salmon.handle(".*", action)
    key = kept(salmon, "b@example.org")
    [one] = retry.retry([key])
    assert not one.done and said in one.remark
    assert len(salmon.undeliverable()) == 1 and salmon.relayed == []
    assert not (salmon.folder / "run/unsent").exists()


# -- unsent ---------------------------------------------------------------------------------------


def unsent(project: Project, *recipients: str) -> None:
    outbox = Outbox(lambda: None, project.folder / "run/unsent")
    for one in recipients:
        outbox.put(one, b"Subject: Undelivered mail\n\nsorry\n")


def test_unsent_says_what_the_relay_said_and_sends_when_it_is_asked_to(project: Project) -> None:
    project.configure()
    unsent(project, "ann@example.net", "bob@example.net")
    settings = project.folder / "config/settings.py"
    before = settings.read_text()
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    settings.write_text(f"{before}\nrelay_config = {{'host': 'localhost', 'port': {port}}}\n")
    done = project.run("unsent", "retry", "--all")
    assert done.returncode == 1 and "refused" in done.stderr
    one, two = rows(project.run("unsent", "--json"))
    assert [one["to"], two["to"]] == [["ann@example.net"], ["bob@example.net"]]
    assert "ConnectionRefusedError" in one["reason"] and "ConnectionRefusedError" in two["reason"]
    boot = project.folder / "config/boot.py"
    boot.write_text(boot.read_text() + TAKES_ALL)
    done = project.run("unsent", "retry", one["key"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sent: 1 message, ")
    assert (project.folder / "relayed").read_text() == "ann@example.net\n"
    assert keys(project, Path("run/unsent")) == [two["key"]]
    done = project.run("unsent", "drop", two["key"], "--yes")
    assert done.returncode == 0 and keys(project, Path("run/unsent")) == []


TAKES_ALL = """
class _Relay:
    def deliver(self, message, To=None, From=None):
        with open("relayed", "a") as file:
            print(To, file=file)

settings.relay = _Relay()
"""


def test_a_server_that_is_stopped_is_said(project: Project) -> None:
    project.configure()
    keep(project)
    with server(project, RUN) as process:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            done = project.run("undelivered", "retry", "--all")
        finally:
            os.kill(process.pid, signal.SIGCONT)
    assert done.returncode == 1 and "has not answered" in done.stderr
    assert len(keys(project)) == 1


def test_messages_are_counted_by_their_names(tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    for number in range(1000):
        (new / f"{1795000000 + number}.M1P1Q{number}.home").touch(mode=0)
    (new / ".hidden").touch()
    count = WaitingMail(tmp_path).count()
    assert count == (1000, 1795000000.0)


# -- deaths ----------------------------------------------------------------------------------------

DIES = """
import json, os, sys, threading
from pathlib import Path
from salmon import queue
from salmon.routing import Router, route, stateless
from support.dying import die_at
from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.retry import Retry
from salmon_revsmtp.delivery.maildir import push_safely
from salmon_revsmtp.delivery.trace import undeliverable_envelope
from salmon_revsmtp.delivery.waiting import KEPT_MARK
from salmon_revsmtp.journal.connection import JournalConnection
from salmon_revsmtp.journal.deliveries import DeliveryJournal
from salmon_revsmtp.smtp.envelope import Envelope

TO = ["good@example.org", "bad@example.org"]

@route(".*")
@stateless
def TAKE(message):
    # What a handler does lasts when it has returned: a line in a file.
    with open("run/handled", "a") as file:
        file.write(message.To + "\\n")
    if message.To == TO[1] and not Path("run/mended").exists():
        raise RuntimeError("not yet")

def retry(die):
    place = Path.cwd()
    Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")
    journal = DeliveryJournal(JournalConnection())
    [key] = Router.UNDELIVERABLE_QUEUE.keys()
    again = Retry(place, journal, Outbox(lambda: None), threading.Lock())
    if die:
        die_at(die, ["delivery/retry.py", "delivery/router.py", "delivery/waiting.py"])
    list(again.retry([key]))

def child(die):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            retry(die)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]

def stored():
    return [one.read_bytes().decode() for one in Path("run/undeliverable").glob("[nc]*/*")]

start = Path.cwd()
for die in range(1, 2000):
    folder = start / str(die)
    (folder / "run").mkdir(parents=True)
    os.chdir(folder)
    lines = undeliverable_envelope(Envelope("ann@example.net", ()), TO, "why")
    push_safely(queue.Queue("run/undeliverable"), lines + MESSAGE, mark=KEPT_MARK)
    died, left = child(die), stored()
    Path("run/mended").touch()
    ended = child(0)
    handled = Path("run/handled").read_text().split()
    print(json.dumps([died, left, ended, stored(), *map(handled.count, TO)]), flush=True)
    if died == 0:
        break
"""


def test_a_death_at_any_line_loses_nothing_and_repeats_one_delivery_at_most(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"MESSAGE = {MESSAGE!r}\n{DIES}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and rows[-1][0] == 0, done.stderr
    *deaths, whole = rows
    assert len(deaths) > 50 and all(died == signal.SIGKILL for died, *_ in deaths)
    for _, left, ended, afterwards, good, bad in rows:
        [stored] = left
        envelope, _, message = unpack_undeliverable(stored.encode())
        assert message == MESSAGE and envelope.recipients[-1] == "bad@example.org"
        assert (ended, afterwards) == (0, [])
        assert 1 <= good <= 2 and 1 <= bad <= 2, "bad is refused once, and taken once"
    assert whole[4:] == [1, 2]
    repeated = [good for *_, good, _ in deaths].count(2)
    assert 0 < repeated < len(deaths) / 4, "only between the handler's end and the record"
