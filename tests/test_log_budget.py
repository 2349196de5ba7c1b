"""What a peer can make us log: of each line so much, and of lines so many."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest
from support.collecting import collect_from, exchange
from support.dialogue import Dialogue
from support.listener import listener
from support.salmon import Salmon, fails

from salmon_revsmtp import safelog
from salmon_revsmtp.journal.collections import Journal
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.safelog import LogBudget, log_safely
from salmon_revsmtp.smtp.replies import Reply

log = logging.getLogger("salmon_revsmtp.test")


def test_lines_beyond_the_budget_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = LogBudget(burst=1000, refill=100)
    for number in range(50):
        budget.log(log, logging.WARNING, "line %d", number)
    written = len(caplog.messages)
    assert 10 <= written <= 16
    now = 5.0
    budget.log(log, logging.WARNING, "the next")
    more = f"and {50 - written} more lines, which are left out: too much was to be logged"
    assert caplog.messages[written:] == [more, "the next"]


def test_the_number_of_the_last_ones_is_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    budget = LogBudget(burst=100, refill=0)
    for number in range(50):
        budget.log(log, logging.WARNING, "line %d", number)
    budget.settle(log)
    assert caplog.messages == ["line 0"]
    budget.close(log)
    budget.close(log)
    assert caplog.messages[1:] == [
        "and 49 more lines, which are left out: too much was to be logged"
    ]


def test_a_level_that_is_off_costs_nothing() -> None:
    budget = LogBudget(burst=100, refill=0)
    quiet = logging.getLogger("salmon_revsmtp.quiet")
    quiet.setLevel(logging.ERROR)
    for _ in range(50):
        budget.log(quiet, logging.INFO, "x" * 90)
    budget.close(quiet)


def test_a_line_and_each_of_its_values_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    log_safely(log, logging.WARNING, "from=<%s> to=<%s> end", "a" * 90_000, "b" * 90_000)
    log_safely(log, logging.WARNING, "%s", ValueError("c" * 90_000))
    first, second = caplog.messages
    assert len(first) < 900 and first.endswith("b> end") and "...[" in first
    assert len(second) <= 4000


def test_a_traceback_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("c" * 10_000_000)
    except ValueError:
        log_safely(log, logging.ERROR, "it raised", error=True)
    assert len(caplog.text) < 30_000
    assert "Traceback" in caplog.text


def test_the_same_failure_again_and_again_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safelog, "_tracebacks", LogBudget(burst=5000, refill=0))
    for number in range(100):
        try:
            raise ValueError(f"failure {number}")
        except ValueError:
            log_safely(log, logging.ERROR, "it raised", error=True)
    assert 5 <= caplog.text.count("Traceback") <= 30
    assert "failure 0" in caplog.text and "failure 99" in caplog.text


# -- what a peer says ------------------------------------------------------------------------------

LONG = [f"450-{'x' * 500}" for _ in range(110)]


def test_a_provider_that_says_far_too_much_fills_nothing(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        await provider.asks("ATRN", *LONG, "450 the end")
        await provider.left()

    report = collect_from(salmon, script)
    assert report.outcome is Outcome.DEFERRED and report.error is not None
    assert len(report.error) < 2000 and "the end" in report.error
    [entry] = Journal().history()
    assert entry.error == report.error
    assert max(map(len, caplog.messages), default=0) < 4000


def test_what_a_handler_says_is_cut_on_the_wire_and_in_the_log(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    salmon.handle(".*", fails(451, "because " * 100_000))
    heard, report = exchange(salmon, "b@example.org")
    assert len(heard[0]) <= 512 and heard[0].startswith("451")
    assert report.error is not None and len(report.error) <= 2000
    assert max(map(len, caplog.messages)) < 4000


def test_a_refusal_of_a_message_for_many_names_a_few_of_them(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with listener(salmon, max_message_size=10) as one:
            client = Dialogue(*await asyncio.open_connection("127.0.0.1", one.port))
            await client.replied(220)
            client.say("EHLO x")
            await client.replied(250)
            recipients = [f"r{number}{'x' * 200}@example.org" for number in range(500)]
            assert (await client.send(b"far too large", *recipients)).startswith("552")
            client.abort()

    asyncio.run(main())
    [line] = [one for one in caplog.messages if "552" in one]
    assert "and 495 more" in line and len(line) < 2000


def test_a_reply_of_a_plugin_is_as_good_as_a_peers() -> None:
    assert len(Reply(554, "y" * 1_000_000).text) <= 2000
