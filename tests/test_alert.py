"""The alarm: who is told what, when, and how often."""

from __future__ import annotations

import email
import email.policy
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from salmon import queue
from support.configuration import agent_keys
from support.messages import MESSAGE
from support.project import Project, isp
from support.serving import RUN, server, wait_for

from salmon_revsmtp import SettingsError, Trouble
from salmon_revsmtp.alert.alarm import (
    LONGEST_RETRY,
    MOST_TOLD,
    RETRY,
    Alarm,
    command_environment,
    run_command,
)
from salmon_revsmtp.alert.settings import AlertSettings
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.configuration import load

NOW = 1_795_700_000.0
HOUR = 3600.0
FAILS = Trouble("agent:isp", "The agent isp has not collected.", NOW)
DISK = Trouble("disk:run", "The disk of run fills.", NOW + 60)


class Rig:
    """A server whose troubles the test sets, and an alarm that tells the test."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        (folder / "run").mkdir(exist_ok=True)
        self.project, self.now = folder, NOW
        self.wrong = 0.0  # seconds by which someone has set the clock
        self.there: list[Trouble] = []
        self.told: list[tuple[str, list[str]]] = []
        self.texts: list[str] = []
        self.facts: list[Mapping[str, str]] = []
        self.mails: list[tuple[str, EmailMessage]] = []
        self.error: Exception | None = None
        self.settings = AlertSettings(**(settings or {"command": ("true",)}))
        self.alarm = self.start()

    def start(self) -> Alarm:
        """A new one, as after a restart."""
        server: Any = self
        self.alarm = Alarm(
            server, self.settings, lambda: self.now, self.run, lambda: self.now - self.wrong
        )
        return self.alarm

    def troubles(self) -> list[Trouble]:
        return list(self.there)

    def send(self, message: EmailMessage, to: str) -> None:
        if self.error is not None:
            raise self.error
        self.mails.append((to, message))

    def run(
        self, command: Sequence[str], text: str, facts: Mapping[str, str], folder: Path
    ) -> None:
        if self.error is not None:
            raise self.error
        self.told.append((facts["ALERT_STATE"], facts["ALERT_TROUBLES"].split("\n")))
        self.texts.append(text)
        self.facts.append(facts)

    def look(self, at: float) -> list[tuple[str, list[str]]]:
        """What is told when the time is that many seconds after the beginning."""
        self.now, before = NOW + at + self.wrong, len(self.told)
        self.alarm.look()
        return self.told[before:]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_once_when_it_has_lasted_and_once_when_it_is_over(rig: Rig) -> None:
    rig.there = [FAILS]
    assert rig.look(0) == rig.look(HOUR - 1) == []
    assert rig.look(HOUR) == [("begun", ["agent:isp"])]
    assert rig.look(HOUR + 60) == rig.look(99 * HOUR) == []
    rig.there = []
    assert rig.look(100 * HOUR) == [("over", ["agent:isp"])]
    assert rig.look(101 * HOUR) == []
    assert "The agent isp has not collected." in rig.texts[0] and "over" in rig.texts[1]


def test_what_is_over_before_no_one_hears_of(rig: Rig) -> None:
    rig.there = [FAILS]
    assert rig.look(HOUR - 1) == []
    rig.there = []
    assert rig.look(HOUR) == []
    rig.there = [Trouble(FAILS.key, FAILS.text, NOW + HOUR + 60)]
    assert rig.look(2 * HOUR) == [], "it is a new one"
    assert rig.look(2 * HOUR + 60) == [("begun", ["agent:isp"])]


def test_a_restart_repeats_nothing_and_forgets_nothing(rig: Rig) -> None:
    rig.there = [FAILS, DISK]
    assert rig.look(HOUR) == [("begun", ["agent:isp"])]
    rig.start()
    assert rig.look(HOUR + 30) == []
    assert rig.look(HOUR + 60) == [("begun", ["disk:run"])]
    rig.start()
    assert rig.look(HOUR + 90) == []
    rig.there = []
    rig.start()
    assert rig.look(2 * HOUR) == [("over", ["agent:isp", "disk:run"])]
    rig.start()
    assert rig.look(3 * HOUR) == []
    assert (rig.project / "run/alert.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("days", [-20_000, 20_000])
def test_a_clock_that_was_wrong_neither_mutes_it_nor_sets_it_off(
    rig: Rig, days: float, known: bool
) -> None:
    rig.wrong = days * 24 * HOUR
    rig.there = [Trouble("server", "?", NOW + rig.wrong if known else None)]
    assert rig.look(0) == []
    rig.wrong = 0
    assert rig.look(60) == rig.look(HOUR - 1) == []
    assert rig.look(HOUR) == [("begun", ["server"])]
    [kept] = json.loads((rig.project / "run/alert.json").read_text()).values()
    assert kept["since"] <= NOW + HOUR


def test_who_could_not_be_told_while_the_clock_was_wrong_is_told_in_time(rig: Rig) -> None:
    rig.there, rig.error, rig.wrong = [FAILS], OSError("no"), 20_000 * 24 * HOUR
    assert rig.look(HOUR) == []
    rig.error, rig.wrong = None, 0
    assert rig.look(HOUR + 120) == [("begun", ["agent:isp"])]


def test_a_time_that_is_not_known_is_that_of_the_first_look(rig: Rig) -> None:
    rig.there = [Trouble("server", "?", None)]
    assert rig.look(5) == []
    rig.start()
    assert rig.look(HOUR) == []
    assert rig.look(HOUR + 5) == [("begun", ["server"])]


def test_who_cannot_be_told_is_told_later_and_not_all_the_time(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.there, rig.error = [FAILS], OSError("no such luck \x1b[2J")
    tries = 0
    with caplog.at_level(logging.WARNING):
        for minute in range(60, 60 + 24 * 60):
            before = len(caplog.records)
            rig.look(minute * 60)
            tries += len(caplog.records) > before
    assert tries == len(caplog.records) == 11, "2, 4, 8 ... minutes, then every six hours"
    assert "no such luck ?[2J" in caplog.records[0].getMessage()
    rig.error = None
    later = (60 + 24 * 60) * 60 + LONGEST_RETRY
    assert rig.look(later) == [("begun", ["agent:isp"])]
    assert rig.look(later + RETRY) == []


def test_what_is_over_is_told_later_too(rig: Rig) -> None:
    rig.there = [FAILS]
    rig.look(HOUR)
    rig.there, rig.error = [], OSError("no")
    assert rig.look(2 * HOUR) == []
    rig.error = None
    rig.start()
    assert rig.look(3 * HOUR) == [("over", ["agent:isp"])]


def test_many_at_once_are_told_in_one_text(rig: Rig) -> None:
    rig.there = [Trouble(f"account:{n}:unseen", f"Account {n}.", NOW) for n in range(1000)]
    [(state, keys)] = rig.look(HOUR)
    assert state == "begun" and len(keys) == 1000
    assert f"And {1000 - MOST_TOLD} more" in rig.texts[0] and len(rig.texts[0]) < 4000


def test_the_facts_are_in_the_environment(rig: Rig) -> None:
    rig.there = [FAILS, Trouble("undeliverable", "Undelivered \x1b[2J", NOW + 5)]
    rig.look(HOUR + 5)
    [facts] = rig.facts
    assert facts["ALERT_STATE"] == "begun"
    assert facts["ALERT_TROUBLES"] == "agent:isp\nundeliverable"
    assert facts["ALERT_SINCE"].startswith("2026-")
    said = f"salmon-revsmtp in {rig.project.name}: agent:isp and 1 more needs you"
    assert facts["ALERT_SUBJECT"].endswith(said)
    assert facts["ALERT_PROJECT"] == str(rig.project)
    assert "\x1b" not in rig.texts[0]


def test_a_mail_says_that_it_is_automatic_and_comes_from_whom_you_say(tmp_path: Path) -> None:
    rig = Rig(tmp_path, mail="postmaster@example.org", sender="alarm@example.net")
    rig.there = [Trouble("agent:isp", "Der Agent für \u20ac.", NOW)]
    rig.look(HOUR)
    [(to, mail)] = rig.mails
    parsed = email.message_from_bytes(mail.as_bytes(), policy=email.policy.default)
    assert (to, parsed["To"], parsed["From"]) == (
        "postmaster@example.org",
        "postmaster@example.org",
        "alarm@example.net",
    )
    assert parsed["Auto-Submitted"] == "auto-generated"
    assert parsed["Date"] and parsed["Message-ID"] and "needs you" in parsed["Subject"]
    assert mail.as_bytes().isascii()
    assert "für \u20ac" in parsed.get_content()


def test_a_command_that_fails_does_not_keep_the_mail(tmp_path: Path) -> None:
    rig = Rig(tmp_path, mail="postmaster@example.org", command=("true",))
    rig.there = [FAILS]

    def broken(*arguments: Any) -> None:
        raise OSError("broken")

    rig.alarm._run = broken
    rig.look(HOUR)
    rig.look(HOUR + 60)
    assert len(rig.mails) == 1
    rig.start()
    assert rig.look(2 * HOUR) == [("begun", ["agent:isp"])]
    assert len(rig.mails) == 1


def test_a_death_while_one_is_told_does_not_tell_the_other_twice(tmp_path: Path) -> None:
    rig = Rig(tmp_path, mail="postmaster@example.org", command=("true",))
    rig.there = [FAILS]

    class Death(BaseException):
        pass

    def dies(message: EmailMessage, to: str) -> None:
        raise Death

    rig.send = dies  # type: ignore[method-assign]
    with pytest.raises(Death):
        rig.look(HOUR)
    del rig.send
    rig.start()
    assert rig.look(HOUR + 60) == []
    assert (len(rig.told), len(rig.mails)) == (1, 1)


def test_what_is_remembered_wrongly_does_no_harm(rig: Rig) -> None:
    for text in ("", "[]", "{", '{"a": 1}', '{"a": {"since": "x"}}'):
        (rig.project / "run/alert.json").write_text(text)
        rig.start()
        assert rig.look(0) == []


# -- the command ----------------------------------------------------------------------------------

GIVEN = (
    "import os, sys; print(sys.stdin.read() + os.environ['ALERT_STATE'], file=open('told', 'a'))"
)


def test_a_command_gets_the_text_and_the_facts(tmp_path: Path) -> None:
    run_command([sys.executable, "-c", GIVEN], "the text\n", {"ALERT_STATE": "begun"}, tmp_path)
    assert (tmp_path / "told").read_text() == "the text\nbegun\n"


def test_a_command_gets_no_password_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISP_PASSWORD", "sesame")
    monkeypatch.setenv("LOGIN", "acme:sesame")
    monkeypatch.setenv("TOKEN_OF_THE_COMMAND", "other")
    settings = SimpleNamespace(collection_agents=[{"name": "isp", "password": "sesame"}])
    given = command_environment(settings)
    assert given["TOKEN_OF_THE_COMMAND"] == "other"
    assert "sesame" not in str(given)


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="status 3: no network"):
        run_command(["sh", "-c", "echo no network; exit 3"], "", {}, tmp_path)
    with pytest.raises(OSError, match="nothing-of-that-name"):
        run_command(["nothing-of-that-name"], "", {}, tmp_path)


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    script = "sleep 1000 & echo $! > child; wait"
    with pytest.raises(OSError, match="has not ended in 1 seconds"):
        run_command(["sh", "-c", script], "x" * 1_000_000, {}, tmp_path, timeout=1)
    child = int((tmp_path / "child").read_text())
    gone = time.monotonic() + 60
    while _runs(child):
        assert time.monotonic() < gone
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- the settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alert", "said"),
    [
        ("1h", "alert: found a text, allowed: a dict"),
        ({}, "alert: command: missing, and no mail"),
        ({"comand": ["true"]}, "alert: comand: unknown key"),
        ({"command": "true"}, "alert: command: found that value (a single string is not a list)"),
        ({"command": ["no-such-program"]}, "there is no such program"),
        ({"command": ["true"], "after": 60}, "alert: after: found 60, allowed: a time above 0"),
        ({"command": ["true"], "after": "0h"}, "alert: after: found '0h'"),
        ({"command": ["true"], "after": "1 week"}, "alert: after: found '1 week'"),
        ({"mail": "postmaster"}, "alert: mail: found 'postmaster' (that is no address)"),
        ({"mail": "a@b\nBcc: c@d"}, "alert: mail: found"),
        ({"mail": "a@example.org", "sender": "a@b, c@d"}, "alert: sender: found"),
    ],
)
def test_a_wrong_setting_is_said_before_anything_starts(alert: object, said: str) -> None:
    module: Any = SimpleNamespace(collection_agents=[agent_keys(1, every=0)], alert=alert)
    with pytest.raises(SettingsError) as caught:
        load(module, Plugins.load())
    problems = caught.value.problems
    assert len(problems) == 2, "with all others"
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("after", "seconds"), [("90s", 90), ("30m", 1800), ("1h", 3600), ("2d", 172800)]
)
def test_a_time_may_be_in_seconds_minutes_hours_and_days(after: str, seconds: float) -> None:
    assert AlertSettings(after=after, mail="a@example.org").seconds == seconds


def test_check_and_run_say_it(project: Project) -> None:
    project.configure(isp(1))
    settings = project.folder / "config/settings.py"
    settings.write_text(settings.read_text() + "\nalert = {'after': '1y', 'mail': 'a@b'}\n")
    for command in ("check", "run", "agents"):
        done = project.run(command)
        assert done.returncode == 2
        assert "alert: after: found '1y'" in done.stderr


# -- as a whole -----------------------------------------------------------------------------------


def test_a_server_tells_of_undeliverable_mail_and_that_it_is_over(project: Project) -> None:
    project.configure()
    settings = project.folder / "config/settings.py"
    settings.write_text(
        f"{settings.read_text()}\n"
        f"alert = {{'after': '1s', 'command': [{sys.executable!r}, '-c', {GIVEN!r}],"
        " 'mail': 'postmaster@example.org'}\n"
    )
    queue.Queue(str(project.folder / "run/undeliverable")).push(MESSAGE)
    told = project.folder / "told"
    with server(project, RUN) as process:
        wait_for(told.exists, process)
        wait_for(lambda: "undelivered" in told.read_text().lower(), process)
        wait_for(lambda: list((project.folder / "run/unsent").glob("new/*")), process)
        assert project.run("undelivered", "drop", "--all", "--yes").returncode == 0
        wait_for(lambda: "over" in told.read_text(), process)
    assert told.read_text().count("begun") == told.read_text().count("\nover") == 1
    [mail, *_] = sorted((project.folder / "run/unsent/new").iterdir())
    stored = mail.read_bytes()
    assert stored.startswith(b"Return-Path: <>\nDelivered-To: postmaster@example.org\n")
    assert b"\nAuto-Submitted: auto-generated\n" in stored
    known = json.loads((project.folder / "run/alert.json").read_text())
    assert known == {}
