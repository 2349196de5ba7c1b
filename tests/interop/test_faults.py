"""What must not be lost or doubled, with real servers at the other end."""

from __future__ import annotations

import asyncio
import email
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from salmon import queue
from salmon.mail import MailRequest
from salmon.server import Relay, SMTPError
from support.collecting import exchange
from support.configuration import agent_keys, configuration, etrn_keys
from support.messages import MESSAGE
from support.processes import KillableProcess
from support.salmon import Salmon, fails
from support.servers import ACCOUNTS, Exim, Postfix, Server, free_port, until
from support.tls import CERTIFICATE, PRIVATE_KEY

from salmon_revsmtp import Envelope, Reply
from salmon_revsmtp.delivery.dsn import RecipientStatus, notification
from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector

pytestmark = pytest.mark.interop

Roots = Callable[[str], Path]


def test_killed_at_random_while_exim_sends(salmon: Salmon, chroot: Roots) -> None:
    """Exim is the provider and speaks PRDR; every delivery is handled at least once, and again only
    if the process died before it was recorded."""
    chance = random.Random(2645)
    expected = set()
    with Exim(chroot("exim")) as exim:
        for number in range(60):
            subject = f"m{number}"
            names = ("ann", "bob") if number % 3 else ("ann",)
            recipients = [f"{name}@example.org" for name in names]
            exim.submit("a@example.net", recipients, b"Subject: %s\r\n\r\nx\r\n" % subject.encode())
            expected |= {(subject, recipient) for recipient in recipients}
        keys = agent_keys(exim.port, server="127.0.0.1", password=ACCOUNTS["acme"])
        killable = KillableProcess(salmon.folder, keys, "router")
        try:
            kills = sum(
                killable.run("collect", kill_after=chance.uniform(0.05, 0.4)) == -9
                for _ in range(25)
            )
            assert kills >= 5
            for _ in range(30):
                assert killable.run("collect") == 0
                if exim.waiting() == 0:
                    break
        finally:
            killable.close()
        assert exim.waiting() == 0, exim.log()
    handled = Counter(
        (subject, recipient)
        for what, subject, recipient, _ in map(str.split, Path("ledger").read_text().splitlines())
        if what == "end"
    )
    assert set(handled) == expected
    repeats = sum(handled.values()) - len(handled)
    assert repeats <= kills, "at most the one in hand, each time"
    database = sqlite3.connect("run/revsmtp.sqlite3")
    [recorded] = database.execute("SELECT count(*) FROM deliveries").fetchone()
    database.close()
    assert recorded == len(expected)


BOTH = ["ann@example.org", "bob@example.org"]
SHORT = b"Subject: m0\r\n\r\nx\r\n"
LARGE = b"Subject: m0\r\n\r\n" + b"%098d\r\n" % 0 * 50_000


@pytest.mark.parametrize(
    ("instant", "message"),
    [
        ("the first RCPT", SHORT),
        ("RCPT", SHORT),
        ("RCPT", LARGE),
        ("DATA", SHORT),
        ("DATA", LARGE),
        ("the message", LARGE),
        ("the end", SHORT),
        ("the end", LARGE),
    ],
)
def test_killed_within_a_message_exim_in_the_clear_keeps_it(
    salmon: Salmon, chroot: Roots, instant: str, message: bytes
) -> None:
    """Exim takes the end of the connection there for success: it has to hear a reply."""
    with Exim(chroot("exim")) as exim:
        exim.submit("a@example.net", BOTH, message)
        keys = agent_keys(exim.port, server="127.0.0.1", password=ACCOUNTS["acme"])
        killable = KillableProcess(salmon.folder, keys, "router")
        try:
            for times in (1, 2):
                assert killable.run("collect", die_in=instant) == -9
                _queue_runs_end(exim, times)
                assert "Completed" not in exim.log(), exim.log()
            assert not Path("ledger").exists()
            _collect_all(killable, exim)
        finally:
            killable.close()
        assert _handled() == BOTH, exim.log()


@pytest.mark.parametrize("tls", ["none", "starttls"])
@pytest.mark.parametrize("instant", ["the first RCPT", "RCPT", "DATA"])
def test_stopped_within_a_message_exim_keeps_what_was_not_answered(
    salmon: Salmon, chroot: Roots, instant: str, tls: str
) -> None:
    certificate = (CERTIFICATE, PRIVATE_KEY) if tls == "starttls" else (None, None)
    with Exim(chroot("exim"), *certificate) as exim:
        exim.submit("a@example.net", BOTH, SHORT)
        exim.submit("a@example.net", BOTH, SHORT.replace(b"m0", b"m1"))
        keys = {"server": "127.0.0.1", "tls": tls, "password": ACCOUNTS["acme"]}
        if tls == "starttls":
            keys["ca_file"] = str(CERTIFICATE)
        killable = KillableProcess(salmon.folder, agent_keys(exim.port, **keys), "router")
        try:
            assert killable.run("collect", stop_in=instant) == 0
            _queue_runs_end(exim, 1)
            _collect_all(killable, exim)
        finally:
            killable.close()
        assert _handled() == sorted(BOTH * 2), exim.log()


def _collect_all(killable: KillableProcess, exim: Exim) -> None:
    """Collect until Exim has no more; it waits a second before it tries a recipient again."""

    def collected() -> bool:
        return killable.run("collect") == 0 and exim.waiting() == 0

    asyncio.run(until(collected, exim))


def _queue_runs_end(exim: Exim, number: int) -> None:
    """Wait for the end of so many: what became of each message is in its log then."""
    asyncio.run(until(lambda: exim.log().count("End queue run") >= number, exim))


def _handled() -> list[str]:
    words = [line.split() for line in Path("ledger").read_text().splitlines()]
    return sorted(recipient for what, _, recipient, _ in words if what == "end")


def test_partial_success_with_postfix_which_has_no_prdr(salmon: Salmon, chroot: Roots) -> None:
    """One recipient is served, one refused, one deferred: Postfix hears 451 and tries all three
    again; only the last is handled again, and the sender gets one notification."""
    ready: list[bool] = []

    def not_yet(message: MailRequest) -> None:
        if not ready:
            raise SMTPError(451, "later")

    salmon.handle("ann@.*")
    salmon.handle("bob@.*", fails(550, "5.1.1 no bob here"))
    salmon.handle("cyd@.*", not_yet)
    with Postfix(chroot("postfix"), next_hop=free_port()) as postfix:
        postfix.submit(
            "sender@example.net", ["ann@example.org", "bob@example.org", "cyd@example.org"], MESSAGE
        )
        asyncio.run(until(lambda: postfix.deferred() == 1, postfix))
        for round_ in range(2):
            asyncio.run(_flushed(salmon, postfix, 3 + round_))
            ready.append(True)
    names = [message.To.partition("@")[0] for message in salmon.handled]
    assert sorted(names) == ["ann", "bob", "cyd", "cyd"]
    [(sender, to, text)] = salmon.relayed
    assert (sender, to) == ("<>", "sender@example.net")
    assert "bob@example.org" in text
    assert "ann@example.org" not in text and "cyd@example.org" not in text


async def _flushed(salmon: Salmon, server: Server, handled: int) -> None:
    """Ask for the mail until so many deliveries have been handled and the server has heard."""
    service = {"listen": f"127.0.0.1:{server.next_hop}", "hostname": "mail.example.org"}
    keys = etrn_keys(server.port, "example.org")
    valid = configuration(keys, default={**service, "domains": ["example.org"]})
    with Collector(valid, Plugins.load(), lambda: salmon.relay) as collector:
        [listener] = await collector.listeners()
        await listener.start()
        await collector.collect(valid.agents)
        answered = 250 if handled == 4 else 451
        await until(lambda: len(salmon.handled) >= handled, server)
        await until(lambda: f"said: {answered}" in server.log() or server.waiting() == 0, server)
        await listener.stop(5)


def test_a_notification_waits_for_the_relay_and_goes_out_by_postfix(
    salmon: Salmon, chroot: Roots
) -> None:
    root = chroot("postfix")
    port: list[int] = [free_port()]

    class Late:
        """Salmon's own relay, to wherever Postfix listens by now."""

        def deliver(self, message: Any, To: str, From: str) -> None:
            Relay(host="127.0.0.1", port=port[0]).deliver(message, To=To, From=From)

    salmon.relay = Late()
    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(550, "5.1.1 no b here"))
    heard, _ = exchange(salmon, "a@example.org", "b@example.org", sender="sender@example.org")
    assert heard[0].startswith("250 ")
    unsent = queue.Queue("run/unsent")
    assert len(unsent) == 1, "no one listens there"
    with Postfix(root, next_hop=free_port()) as postfix:
        port[0] = postfix.port
        exchange(salmon, "a@example.org", data=MESSAGE + b"another\r\n")
        assert len(unsent) == 0
        listing = postfix.inside("postqueue", "-c", f"{postfix.place}/conf", "-j")
        # A message that goes from one queue into another just now is listed twice.
        found = {one["queue_id"]: one for one in map(json.loads, listing.splitlines())}
        [waiting] = found.values()
        assert waiting["sender"] == "MAILER-DAEMON"
        assert [one["address"] for one in waiting["recipients"]] == ["sender@example.org"]
        shown = postfix.inside("postcat", "-c", f"{postfix.place}/conf", "-q", waiting["queue_id"])
        assert "Content-Type: multipart/report" in shown
        assert "Diagnostic-Code: smtp; 550 5.1.1 no b here" in shown


class StrictPostfix(Postfix):
    """Takes no mail whose MIME structure is wrong, or that says less than it is."""

    def configure(self) -> None:
        super().configure()
        with (self.folder / "conf/main.cf").open("a") as conf:
            for key in ("strict_mime_encoding_domain", "strict_7bit_headers", "strict_8bitmime"):
                conf.write(f"{key} = yes\n")


def test_every_kind_of_notification_passes_a_strict_postfix_as_it_is(
    salmon: Salmon, chroot: Roots
) -> None:
    sender, bob = "sender@example.org", "b@example.org"
    refused = RecipientStatus.failed(bob, Reply(550, "5.1.1 " + "no caf\u00e9 here " * 30))
    greek = RecipientStatus.failed("\u03b4@example.org", Reply(550, "no"))
    utf8 = {"SMTPUTF8": ""}
    odd = b"Subject: caf\xe9 \xff = \x00\n" + b"X: " + b"x" * 2000 + b"\n\nbody\n"
    reports = [
        notification("mx.example.org", Envelope(sender, (), said), [about], message)
        for said, about, message in (
            ({"ENVID": "QQ+2B1"}, refused, MESSAGE),
            ({"RET": "FULL"}, refused, MESSAGE),
            ({}, refused, odd),
            ({"RET": "FULL"}, refused, odd),
            ({**utf8, "RET": "FULL"}, greek, "Subject: δ\n\nbody\n".encode()),
            (utf8, greek, "Subject: \u03b4\n\nbody\n".encode()),
        )
    ]
    with StrictPostfix(chroot("postfix"), next_hop=free_port()) as postfix:
        outbox = Outbox(lambda: Relay(host="127.0.0.1", port=postfix.port))
        for report in reports:
            outbox.put(sender, report)
        outbox.send()
        assert salmon.undeliverable() == []
        listing = postfix.inside("postqueue", "-c", f"{postfix.place}/conf", "-j")
        found = []
        # A message that goes from one queue into another just now is listed twice.
        for key in {json.loads(line)["queue_id"] for line in listing.splitlines()}:
            shown = postfix.inside("postcat", "-c", f"{postfix.place}/conf", "-hbq", key)
            found.append(shown.partition("Content-Type: ")[2])
    expected = [one.decode().partition("Content-Type: ")[2] for one in reports]
    assert sorted(found) == sorted(expected)
    assert all(not email.message_from_string("Content-Type: " + one).defects for one in found)
