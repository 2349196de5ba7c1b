"""What ``history`` lists: when, of which, and what was interrupted."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from support.dialogue import Dialogue, no_more_mail
from support.messages import MESSAGE
from support.project import Project, isp, one_message, provider
from support.terminal import on_a_terminal

from salmon_revsmtp.journal.collections import Entry, Journal

SETTINGS = """
collection_agents = [
    {"name": "isp", "protocol": "odmr", "server": "odmr.provider.example.net",
     "account": "acme", "password": "secret", "domains": ["example.org"]},
]
"""
NOW = time.time()
HOUR, DAY = 3600, 86400
TOKYO = timezone(timedelta(hours=9))
ERROR = "connecting to odmr.provider.example.net:366: Connection refused; is it running there?"

# The outcomes, and how many seconds ago each ended.
PAST = [
    ("collected", 10 * DAY),
    ("deferred", 3 * DAY),
    ("failed", DAY + HOUR),
    ("no-mail", 5 * HOUR),
    ("refused", HOUR),
    ("requested", 60),
]


@pytest.fixture
def past(tmp_path: Path) -> Path:
    """A project with collections; each took an hour."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config/settings.py").write_text(SETTINGS)
    journal = Journal(tmp_path / "run/revsmtp.sqlite3")
    for outcome, age in PAST:
        good = outcome in ("collected", "no-mail", "requested")
        error = None if good else ERROR
        ended = NOW - age
        counts = (3, 4, 21_503, 0, 1)
        journal.record(
            Entry("isp", "odmr", ended - HOUR, ended, outcome, *counts, None, None, error), good
        )
    return tmp_path


def history(folder: Path, *options: str, zone: str = "UTC") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "salmon_revsmtp", "history", *options],
        cwd=folder,
        env={"TZ": zone, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def outcomes(folder: Path, *options: str, zone: str = "UTC") -> list[str]:
    done = history(folder, "--json", *options, zone=zone)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["outcome"] for line in done.stdout.splitlines()]


ALL = [outcome for outcome, _ in reversed(PAST)]


@pytest.mark.parametrize(
    ("since", "listed"),
    [
        ("30s", []),
        ("30m", ALL[:1]),
        ("2h", ALL[:2]),
        ("1d", ALL[:3]),
        ("1d2h", ALL[:4]),
        ("2w", ALL),
        ("1970-01-02", ALL),
    ],
)
def test_since_a_while_ago_or_a_time(past: Path, since: str, listed: list[str]) -> None:
    assert outcomes(past, "--since", since) == listed


def test_a_time_may_have_a_zone(past: Path) -> None:
    at = datetime.fromtimestamp(NOW - 2 * HOUR, TOKYO)
    assert outcomes(past, "--since", at.isoformat()) == ALL[:2]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
def test_a_time_without_a_zone_is_local(
    past: Path, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        local = datetime.fromtimestamp(NOW - 2 * HOUR)
    finally:
        monkeypatch.undo()
        time.tzset()
    for text in (str(local), local.strftime("%Y-%m-%d %H:%M"), local.isoformat("T", "seconds")):
        assert outcomes(past, "--since", text, zone=zone) == ALL[:2]


@pytest.mark.parametrize(
    "since", ["yesterdayish", "", "2", "d", "-2d", "2x", "2026-13-01", "25:00", "9" * 5000 + "d"]
)
def test_what_is_no_time_is_said(past: Path, since: str) -> None:
    done = history(past, "--since", since)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is neither how long ago, such as 2d" in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_time_to_come_is_said(past: Path) -> None:
    done = history(past, "--since", "9999-01-01")
    assert done.returncode == 2 and "is in the future" in done.stderr


def test_no_fewer_than_one_is_listed(past: Path) -> None:
    for limit in ("0", "-1"):
        done = history(past, "--limit", limit)
        assert done.returncode == 2 and "is not in the range" in done.stderr


def test_failed_is_what_did_not_end_well(past: Path) -> None:
    assert outcomes(past, "--failed") == ["refused", "failed", "deferred"]
    assert outcomes(past, "--failed", "--since", "2d") == ["refused", "failed"]
    assert outcomes(past, "--failed", "--limit", "1") == ["refused"]


def test_json_has_its_keys_and_times_with_a_zone(past: Path) -> None:
    done = history(past, "--json", "--limit", "1", zone="Asia/Tokyo")
    row = json.loads(done.stdout)
    assert list(row) == [*Entry.__annotations__, "seconds"]
    assert row["started"].endswith("+09:00")
    assert datetime.fromisoformat(row["ended"]).timestamp() == int(NOW - 60)
    assert row["seconds"] == HOUR


def test_at_80_columns_a_collection_is_a_line_and_its_error_below(
    past: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    status, seen = on_a_terminal(past, "history", width=80)
    assert status == 0
    lines = [line.rstrip() for line in seen.splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["started", "agent", "outcome", "messages", "refused", "lasted"]
    [row] = [line for line in lines if " refused " in line and "isp" in line]
    assert row[:19] == datetime.fromtimestamp(NOW - 2 * HOUR, TOKYO).isoformat(" ")[:19]
    assert row.split()[2:] == ["isp", "refused", "3", "0", "1", "h"]
    below = lines[lines.index(row) + 1 :]
    assert " ".join(below[:2]).split()[: len(ERROR.split())] == ERROR.split()


# -- what was interrupted --------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupted_collection_is_listed_with_what_it_had_brought(
    project: Project, times: int
) -> None:
    """The first ctrl-c comes between two messages, or while the provider is silent in one."""
    begun, ended = threading.Event(), threading.Event()

    async def within(provider: Dialogue) -> None:
        await provider.reverse()
        await provider.send(MESSAGE)
        if times == 2:
            provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>")
            await provider.replied(250)
            await provider.replied(250)
            provider.say(f"BDAT {len(MESSAGE)} LAST")
        await asyncio.to_thread(begun.set)
        await asyncio.to_thread(ended.wait, 60)

    with provider(within) as port:
        project.configure(isp(port))
        with subprocess.Popen(
            [sys.executable, "-m", "salmon_revsmtp", "collect", "isp"],
            cwd=project.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            assert begun.wait(60)
            process.send_signal(signal.SIGINT)
            if times == 2:
                time.sleep(0.5)  # it waits for the message in hand; nothing says so
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            ended.set()
    assert process.returncode == 1
    assert errors.startswith("error: interrupted; ")
    [row] = map(json.loads, project.run("history", "--json").stdout.splitlines())
    assert (row["messages"], row["recipients"], row["bytes"]) == (1, 1, len(MESSAGE))
    assert row["error"] == "interrupted"
    assert row["outcome"] == ("collected" if times == 1 else "failed")


def test_what_a_person_interrupts_does_not_fail(project: Project) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def silent(provider: Dialogue) -> None:
        await asyncio.to_thread(begun.set)
        await asyncio.to_thread(ended.wait, 60)

    with provider(silent) as port:
        project.configure(isp(port))
        with subprocess.Popen(
            [sys.executable, "-m", "salmon_revsmtp", "collect", "isp", "--json"],
            cwd=project.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            assert begun.wait(60)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            ended.set()
    assert outcomes_of(project) == [("failed", "interrupted")]
    assert Journal(project.folder / "run/revsmtp.sqlite3").state("isp").failing_since is None
    assert "fails" not in log_of(project)


def outcomes_of(project: Project) -> list[tuple[str, str]]:
    lines = project.run("history", "--json").stdout.splitlines()
    return [(row["outcome"], row["error"]) for row in map(json.loads, lines)]


# -- failures that begin by hand -------------------------------------------------------------------


def log_of(project: Project) -> str:
    return "".join(path.read_text() for path in sorted((project.folder / "logs").glob("*.log")))


async def busy(provider: Dialogue) -> None:
    provider.say("421 busy")


def test_a_failure_by_hand_is_in_the_log_once_and_so_is_the_recovery(project: Project) -> None:
    with provider(busy, busy, one_message, no_more_mail, no_more_mail) as port:
        project.configure(isp(port))
        for number in range(4):
            done = project.run("collect", "isp")
            assert done.returncode == (1 if number < 2 else 0)
            assert done.stderr == ""  # the report says it
            assert log_of(project).count("agent=isp fails: deferred: ") == 1
            assert log_of(project).count("agent=isp recovered after 0 minutes") == (number > 1)
