"""The console's pages without a browser's script: what they say of a server that runs, and what
their forms have it do."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from salmon import queue
from support.console import Answer, Browser, console
from support.messages import MESSAGE
from support.site import SECRET, Site, running_site

from salmon_revsmtp.console import words
from salmon_revsmtp.console.chart import BELOW, HEIGHT, LEFT, WIDTH, drawn

ACCOUNT = "/provider/account?name=away%2F%3Ci%3E"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    for one in running_site(tmp_path_factory.mktemp("site") / "home"):
        for number in range(4):
            one.send(f"m{number}@away.example", f"number {number}", sender=f"s{number}@example.net")
        for _ in range(2):
            queue.Queue(str(one.project.folder / "run/undeliverable")).push(MESSAGE)
        yield one


@pytest.fixture(scope="module")
def browser(site: Site) -> Browser:
    one = Browser(int(site.url.rpartition(":")[2]))
    assert one.log_in(SECRET).status == 303
    return one


def read(answer: Answer) -> str:
    """What a person reads of a page."""
    assert answer.status == 200, answer.text
    _, _, main = answer.text.partition("<main")
    text = re.sub(r"<[^>]+>", " ", main.partition(">")[2])
    return html.unescape(re.sub(r"\s+", " ", text))


def keys(page: Answer, what: str = "") -> list[str]:
    rows = page.text.split("<tr")[2:]
    found = (re.search(r'name="key" value="([^"]+)"', row) for row in rows if what in row)
    return [match[1] for match in found if match is not None]


def follow(browser: Browser, answer: Answer) -> str:
    assert answer.status == 303, answer.text
    return read(browser.get(str(answer.headers["location"])))


def treat(browser: Browser, page: Answer, path: str, **fields: str) -> Answer:
    return browser.post(path, {"csrf": page.csrf, **fields})


# -- pages -----------------------------------------------------------------------------------------


def test_health_says_what_needs_a_person_with_the_way_there(browser: Browser) -> None:
    page = browser.get("/")
    text = read(page)
    assert "One thing needs you" in text and "Undelivered: 2 messages" in text
    assert 'href="/queues">See them' in page.text
    assert "Accounts online 1 of 3" in text or "Accounts online 0 of 3" in text
    assert "<title>(1) Health" in page.text


def test_every_page_names_itself_and_says_where_one_is(browser: Browser) -> None:
    for path, name, here in (
        ("/", "Health", "Health"),
        ("/agents", "Agents", "Agents"),
        ("/agents/vps", "vps", "Agents"),
        ("/provider", "Provider", "Provider"),
        (ACCOUNT, "away/<i>", "Provider"),
        ("/queues", "Queues", "Queues"),
        ("/log", "Log", "Log"),
    ):
        page = browser.get(path)
        assert f"<h1>{html.escape(name)}</h1>" in page.text, path
        [current] = re.findall(r'aria-current="page">(\w+)', page.text)
        assert current == here
        assert "style=" not in page.text and not re.search(r"<[^>]+ on\w+=", page.text)
        assert page.text.count("<script") == 1, "the one of ours"


def test_an_agents_page_shows_what_is_in_force_and_no_secret(browser: Browser) -> None:
    text = read(browser.get("/agents/office"))
    assert "example.com" in text and "password ***" in text and "on demand" in text
    assert "Last day" in text and "No messages" in text


def test_the_history_is_filtered(browser: Browser, site: Site) -> None:
    site.project.run("collect", "isp")
    assert "failed" in read(browser.get("/agents/isp?outcome=failed")).partition("History")[2]
    text = read(browser.get("/agents/isp?outcome=collected"))
    assert "There is none with this outcome." in text
    assert browser.get("/agents/isp?outcome=<script>").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/agents/nobody",
        "/provider/account?name=nobody",
        "/provider/account",
        "/provider/message?key=999",
        "/provider/message?key=x",
        "/provider/message?key=%D9%A3",
        "/queues/undeliverable/nothing",
        "/queues/elsewhere/1",
    ],
)
def test_what_is_not_there_is_said(browser: Browser, path: str) -> None:
    assert browser.get(path).status == 404


def test_no_link_makes_a_page_say_what_its_writer_likes(browser: Browser) -> None:
    text = read(browser.get("/queues?said=We+are+hacked&n=%3Cb%3E"))
    assert "hacked" not in text
    assert "They were deleted." in read(browser.get("/queues?said=drop&n=call+1-800"))


def test_the_log_has_the_newest_first_and_what_is_looked_for(browser: Browser) -> None:
    text = read(browser.get("/log?q=HELD+as"))
    assert text.index("<m3@away.example>") < text.index("<m0@away.example>")
    assert "logged in" not in text
    assert "No such line" in read(browser.get("/log?q=held+as&level=error"))


def test_with_a_console_there_are_metrics_without_a_setting_of_their_own(browser: Browser) -> None:
    page = browser.get("/metrics")
    assert page.status == 200 and "\nrevsmtp_up 1.0\n" in page.text
    assert 'revsmtp_held_messages{account="away/<i>"}' in page.text


# -- forms -----------------------------------------------------------------------------------------


def test_a_message_is_dropped_when_it_is_meant_and_no_other(browser: Browser) -> None:
    page = browser.get(ACCOUNT)
    before = keys(page)
    [key] = keys(page, "s1@example.net")
    fields = {"account": "away/<i>", "key": key, "do": "drop"}
    asked = treat(browser, page, "/provider/treat", **fields)
    text = read(asked)
    assert "Delete?" in text and "s1@example.net" in text and "Drop 1 message" in text
    assert keys(browser.get(ACCOUNT)) == before
    done = treat(browser, asked, "/provider/treat", **fields, sure="yes")
    assert "1 message was deleted." in follow(browser, done)
    assert keys(browser.get(ACCOUNT)) == [one for one in before if one != key]


def test_a_key_of_another_account_is_not_touched(browser: Browser, site: Site) -> None:
    page = browser.get(ACCOUNT)
    key, before = keys(page)[0], len(keys(page))
    fields = {"account": "acme", "key": key, "do": "drop", "sure": "yes"}
    text = follow(browser, treat(browser, page, "/provider/treat", **fields))
    assert "deleted" not in text
    assert len(keys(browser.get(ACCOUNT))) == before


def test_a_held_message_shows_its_header(browser: Browser) -> None:
    key = keys(browser.get(ACCOUNT), "s0@example.net")[0]
    text = read(browser.get(f"/provider/message?key={key}"))
    assert "Subject: number 0" in text and "m0@away.example" in text and "hello" not in text


def test_bounced_mail_is_unsent_while_the_relay_is_down(browser: Browser) -> None:
    page = browser.get(ACCOUNT)
    [key] = keys(page, "s2@example.net")
    fields = {"account": "away/<i>", "key": key, "do": "bounce", "sure": "yes"}
    done = treat(browser, page, "/provider/treat", **fields)
    assert "1 message was returned to the sender." in follow(browser, done)
    assert "s2@example.net" in read(browser.get("/queues")).partition("Unsent")[2]


def test_undeliverable_mail_is_tried_again_and_dropped(browser: Browser, site: Site) -> None:
    page = browser.get("/queues")
    first, second = keys(page)[:2]
    assert "Subject" in read(browser.get(f"/queues/undeliverable/{first}"))
    treated = "/queues/undeliverable/treat"
    done = treat(browser, page, treated, key=first, do="retry", to="b@example.org")
    assert "1 message was tried again." in follow(browser, done)
    done = treat(browser, page, treated, key=second, do="drop", sure="yes")
    assert "1 message was deleted." in follow(browser, done)
    left = read(browser.get("/queues")).partition("Unsent")[0]
    assert "Empty." in left


def test_nothing_else_is_done(browser: Browser) -> None:
    page = browser.get("/queues")
    for path in ("/queues/undeliverable/treat", "/provider/treat"):
        assert treat(browser, page, path, key="1", do="explode").status == 404
        answer = treat(browser, page, path, do="drop", account="acme")
        assert "No message was chosen." in follow(browser, answer)


def test_a_check_says_what_would_fail(browser: Browser) -> None:
    page = browser.get("/agents/isp")
    text = read(treat(browser, page, "/agents/isp/check"))
    assert "It would not work" in text and "Connection refused" in text
    text = read(treat(browser, page, "/agents/office/check"))
    assert "It works: it may collect." in text


# -- words and drawings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "said"),
    [
        *((0, "0 B"), (419, "419 B"), (999, "999 B"), (1000, "1.0 kB"), (21503, "21.5 kB")),
        *((99_960, "100 kB"), (999_600, "1.0 MB"), (5 * 2**30, "5.4 GB")),
        (7 * 10**15, "7,000.0 TB"),
    ],
)
def test_octets_are_said_in_three_digits(number: int, said: str) -> None:
    assert words.octets(number) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [
        *((0, "0 s"), (0.0312, "0.031 s"), (4, "4 s"), (59.6, "60 s"), (100, "1 min 40 s")),
        *((7200, "2 h"), (12000, "3 h 20 min"), (180_000, "2 d 2 h")),
    ],
)
def test_seconds_are_said_in_their_unit(number: float, said: str) -> None:
    assert words.seconds(number) == said


def test_a_moment_is_as_short_as_it_is_clear() -> None:
    now = datetime.now().astimezone().replace(microsecond=0)
    assert re.fullmatch(r"\d\d:\d\d", words.moment(now.isoformat()))
    assert re.fullmatch(r"\d+ \w+ \d\d\d\d", words.moment((now - timedelta(400)).isoformat()))
    assert len(words.moment((now - timedelta(1)).isoformat())) > 5


def test_accounts_and_sessions_that_another_host_has(tmp_path: Path) -> None:
    provider: dict[str, Any] = {
        **{"status": "provider", "accounts": None, "online": 1, "messages": 0, "bytes": 0},
        **{"aside": 0, "oldest": None, "sessions": 1, "live": {}},
    }
    account: dict[str, Any] = {
        **{"account": "acme", "from": "postgres", "enabled": True, "messages": 0, "bytes": 0},
        **{"quota_messages": None, "quota_bytes": None, "oldest": None, "aside": 0},
        **{"last_seen": None, "push": None, "peer": None, "failed_logins": 0},
    }
    session: dict[str, Any] = {
        **{"account": "acme", "peer": "192.0.2.1:5", "since": "2026-11-26T12:00:00+00:00"},
        **{"push": True, "live": None, "fell_back": None, "messages": None, "tls": None},
        "host": "mx2",
    }
    with console(tmp_path) as here:
        server: Any = here.server
        rows = server.status()
        server.status = lambda: [*rows, provider]
        server.accounts, server.sessions = lambda: [account], lambda: [session]
        browser = here.browser()
        assert browser.log_in().status == 303
        assert "Accounts online 1 1 session" in read(browser.get("/"))
        text = read(browser.get("/provider"))
        assert "192.0.2.1:5 ? ? none mx2" in text
        session |= {"messages": 4, "live": 1234, "host": None}
        text = read(browser.get("/provider"))
        assert "192.0.2.1:5 4 1,234 none" in text and "Host" not in text


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 9, 10, 11, 99, 101, 4711, 1_000_000])
def test_a_drawing_keeps_to_its_frame(most: int) -> None:
    now = time.time()
    buckets = [(now - 86400 + 1800 * number, most * (number == 7), 1) for number in range(48)]
    chart = drawn("day", "Last day", buckets, 86400)
    for bar in chart.bars:
        assert bar.x >= LEFT and bar.x + bar.width <= WIDTH
        assert bar.y >= 0 and bar.y + bar.height == pytest.approx(HEIGHT - BELOW)
        assert f"{most:,} message" in bar.title
    assert len(chart.bars) == (most > 0)
    assert all(LEFT <= tick.x <= WIDTH for tick in chart.ticks) and chart.ticks
    top = float(chart.lines[-1].text.replace(",", ""))
    assert max(most, 1) <= top <= max(2.5 * most, 1)
    assert chart.described == "No messages." if not most else f"{most:,}" in chart.described
