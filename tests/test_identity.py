"""The sender's identity travels: from the provider's intake to the customer's handlers, and from a
host of ours that is believed; whoever else claims one is refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from salmon import queue
from salmon.mail import MailRequest
from support.collecting import collect
from support.configuration import PASSWORD, agent_keys, configuration, etrn_keys
from support.dialogue import Dialogue
from support.holding import Holding
from support.listener import listener
from support.messages import MESSAGE
from support.salmon import Salmon
from support.world import ACME, World, in_the_world, world

from salmon_revsmtp import Envelope, QueueConsumer, Reply, SettingsError, hold, hookimpl
from salmon_revsmtp.delivery.trace import Origin, stored_envelope, unpack
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.hold import embedded
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.server import holding
from salmon_revsmtp.smtp.envelope import Client

ORIGIN = Client("203.0.113.9", 41234, "mail.example.com", "ESMTP", "helo.example.com", "4711")
# What a handler holds need not be the message that had the ident.
OF_A_COPY = replace(ORIGIN, ident="")
SAID = (
    "XFORWARD NAME=mail.example.com ADDR=203.0.113.9 PORT=41234",
    "XFORWARD PROTO=ESMTP HELO=helo.example.com IDENT=4711",
)


class Watcher:
    """A plugin that sees envelopes."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []

    @hookimpl
    def message_received(self, agent: Any, envelope: Any, message: bytes) -> Reply | None:
        self.envelopes.append(envelope)
        return None


def watched() -> tuple[Watcher, Plugins]:
    watcher, plugins = Watcher(), Plugins.load()
    plugins.register(watcher)
    return watcher, plugins


def trace(message: MailRequest) -> list[str]:
    """The Received lines of a message, the newest first, each on one line."""
    fields = re.split(r"\n(?![ \t])", message.Data.decode())
    return [" ".join(one.split()) for one in fields if one.startswith("Received: ")]


async def dial(port: int, host: str = "127.0.0.1") -> Dialogue:
    """A client that has greeted."""
    client = Dialogue(*await asyncio.open_connection(host, port))
    await client.replied(220)
    client.say("EHLO relay.example.net")
    await client.replied(250)
    return client


async def forward(
    client: Dialogue, *said: str, reply: str = "250", to: str = "b@example.org"
) -> None:
    """Send a message that is like no other, and of which this is said."""
    for line in said:
        client.say(line)
        await client.hear(reply)
    data = b"Subject: %d\r\n\r\nhello\r\n" % len(client.heard)
    assert (await client.send(data, to)).startswith("250")


async def log_in(customer: Dialogue) -> None:
    """Be a customer up to ATRN."""
    await customer.replied(220)
    customer.say("EHLO x")
    await customer.replied(250)
    customer.say("AUTH CRAM-MD5")
    challenge = base64.b64decode((await customer.replied(334))[4:])
    digest = hmac.new(PASSWORD.encode(), challenge, hashlib.md5).hexdigest()
    customer.say(base64.b64encode(f"acme {digest}".encode()))
    await customer.replied(235)
    customer.say("ATRN")
    await customer.replied(250)


# -- from the provider to the customer ------------------------------------------------------------


def test_the_customers_handlers_see_the_client_of_the_intake(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    salmon.handle(".*")
    watcher, plugins = watched()

    async def work(here: World) -> None:
        ports = []
        for helo in ("one.example.com", "two.example.com"):
            client = await dial(here.mx)
            ports.append(client.writer.get_extra_info("sockname")[1])
            client.say(f"EHLO {helo}")
            await client.replied(250)
            await client.send(MESSAGE, f"{helo[:3]}@example.org", "other@example.org")
            await client.quit()
        held = [one.envelope.client for one in here.held()]
        assert [one.port for one in held if one] == ports
        [report] = await collect(salmon, agent_keys(here.odmr), plugins=plugins)
        assert report.messages == 2
        assert [message.Peer for message in salmon.handled] == [
            ("127.0.0.1", port) for port in ports for _ in range(2)
        ]

    in_the_world(salmon, work)
    helos = ["one.example.com", "two.example.com"]
    assert [one.helo for one in watcher.envelopes] == [one for one in helos for _ in range(2)]
    assert {one.forwarded_by for one in watcher.envelopes} == {"mx.example.net"}
    ours, theirs = trace(salmon.handled[0])
    assert ours.startswith(
        "Received: from one.example.com ([127.0.0.1]) (forwarded by mx.example.net [127.0.0.1]) by "
        "mail.example.org (salmon-revsmtp agent isp) with ESMTPA id "
    )
    assert theirs.startswith("Received: from one.example.com ([127.0.0.1]) by mx.example.net ")
    assert "agent=isp client=127.0.0.1 from=<a@example.net> to=<one@example.org>" in caplog.text
    assert "service=mx from=<a@example.net>" in caplog.text, "no one told the provider"


def test_a_message_of_which_nothing_is_known_inherits_nothing(
    salmon: Salmon, tmp_path: Path
) -> None:
    salmon.handle(".*")
    held = Holding(tmp_path / "provider")
    clients = [ORIGIN, None, Client("2001:db8::1", 25, helo="six.example.com"), None, ORIGIN]

    async def main() -> None:
        async with held.provider() as provider:
            for number, client in enumerate(clients):
                envelope = Envelope("a@example.net", ("b@example.org",), client=client)
                held.put(envelope, b"Subject: %d\r\n\r\nhello\r\n" % number)
            await collect(salmon, agent_keys(provider.port))

    asyncio.run(main())
    peers = [message.Peer for message in salmon.handled]
    own = peers[1]
    assert own[0] in ("127.0.0.1", "::1") and own == peers[3]
    assert peers == [("203.0.113.9", 41234), own, ("2001:db8::1", 25), own, ("203.0.113.9", 41234)]
    assert trace(salmon.handled[0])[0].startswith(
        "Received: from helo.example.com (mail.example.com [203.0.113.9]) (forwarded by "
        "odmr.example.net ["
    )
    assert trace(salmon.handled[1])[0].startswith("Received: from odmr.example.net ([")
    assert "forwarded" not in trace(salmon.handled[1])[0]
    assert "from six.example.com ([IPv6:2001:db8::1]) (forw" in trace(salmon.handled[2])[0]
    held.close()


def test_after_etrn_too_where_the_provider_is_believed(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def work(believed: list[str]) -> None:
        async with listener(salmon, forwarded_from=believed) as home:
            account = {**ACME, "etrn": f"127.0.0.1:{home.port}"}
            async with world(salmon, accounts=[account]) as here:
                client = await dial(here.mx)
                await client.send(MESSAGE, "b@example.org")
                port = client.writer.get_extra_info("sockname")[1]
                await client.quit()
                [report] = await collect(salmon, etrn_keys(here.mx, "example.org"))
                assert report.outcome.value == "requested"
                while here.held():
                    await asyncio.sleep(0.01)
        assert (salmon.handled[-1].Peer == ("127.0.0.1", port)) == bool(believed)

    asyncio.run(work(["127.0.0.0/8"]))
    assert "(forwarded by mx.example.net [127.0.0.1])" in trace(salmon.handled[0])[0]
    asyncio.run(work([]))
    assert "forwarded" not in trace(salmon.handled[1])[0]


def test_a_customer_that_lists_it_and_refuses_it_gets_its_mail(
    salmon: Salmon, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    held = Holding(tmp_path / "provider")

    async def main() -> None:
        async with held.provider() as provider:
            for number in range(40):
                envelope = Envelope("a@example.net", ("b@example.org",), client=ORIGIN)
                held.put(envelope, b"Subject: %d\r\n\r\nhello\r\n" % number)
            customer = Dialogue(*await asyncio.open_connection("127.0.0.1", provider.port))
            await log_in(customer)
            assert await refuse(customer) == (40, 8)
        assert len(held) == 0

    async def refuse(customer: Dialogue) -> tuple[int, int]:
        """Be a server that does so; how often it took mail, and refused an XFORWARD."""
        customer.say("220 home")
        await customer.hear("EHLO")
        customer.say("250-home", "250-PIPELINING", "250-CHUNKING", "250 XFORWARD ADDR")
        taken = refused = 0
        while not (line := await customer.hear()).startswith("QUIT"):
            if line.startswith("XFORWARD"):
                refused += 1
                customer.say("550 5.7.0 no")
            elif line.startswith("BDAT"):
                taken += 1
                await customer.reader.readexactly(int(line.split()[1]))
                customer.say("250 taken")
            else:
                customer.say("250 ok")
        customer.say("221 bye")
        return taken, refused

    asyncio.run(main())
    said = "account=acme XFORWARD reply='550 5.7.0 no'"
    assert [said in one.getMessage() for one in caplog.records].count(True) == 1


# -- a listening service --------------------------------------------------------------------------


def test_a_host_in_forwarded_from_is_believed(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    salmon.handle(".*")
    watcher, plugins = watched()

    async def main() -> None:
        async with listener(salmon, plugins=plugins, forwarded_from=["127.0.0.1"]) as one:
            client = await dial(one.port)
            assert client.heard[-1] == "250 XFORWARD NAME ADDR PORT PROTO HELO IDENT"
            await forward(client, *SAID)
            await forward(client, "XFORWARD NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8::1")
            await forward(client)
            client.say(SAID[0], "MAIL FROM:<a@example.net>", "RCPT TO:<x@elsewhere.example>")
            assert [await client.hear() for _ in range(3)][2].startswith("550")
            await client.quit()

    asyncio.run(main())
    first, second, third = salmon.handled
    assert (first.Peer, second.Peer) == (("203.0.113.9", 41234), ("2001:db8::1", 0))
    assert third.Peer[0] == "127.0.0.1" and third.Peer[1] > 0
    assert [one.helo for one in watcher.envelopes] == ["helo.example.com", "", "relay.example.net"]
    assert watcher.envelopes[0].client == ORIGIN
    assert trace(second)[0].startswith(
        "Received: from unknown ([IPv6:2001:db8::1]) (forwarded by relay.example.net [127.0.0.1]) "
        "by mail.example.org (salmon-revsmtp service default) with ESMTP id"
    )
    assert trace(third)[0].startswith("Received: from relay.example.net ([127.0.0.1]) by ")
    assert "service=default client=203.0.113.9 from=<a@example.net>" in caplog.text
    assert "service=default client=2001:db8::1 from=" in caplog.text
    refusal = r"peer=\('127.0.0.1', \d+\) client=203.0.113.9 to=<x@elsewhere.example> reply='550"
    assert re.search(refusal, caplog.text)


@pytest.mark.parametrize("networks", [[], ["192.0.2.0/24", "::1"]])
def test_a_strangers_claim_is_refused_and_changes_nothing(
    salmon: Salmon, caplog: pytest.LogCaptureFixture, networks: list[str]
) -> None:
    caplog.set_level(logging.INFO)
    salmon.handle(".*")

    async def main() -> None:
        async with listener(salmon, forwarded_from=networks) as one:
            client = await dial(one.port)
            assert "XFORWARD" not in " ".join(client.heard)
            await forward(client, *SAID, reply="550 5.7.0")
            await client.quit()

    asyncio.run(main())
    [message] = salmon.handled
    assert message.Peer[0] == "127.0.0.1"
    assert trace(message)[0].startswith("Received: from relay.example.net ([127.0.0.1]) by ")
    assert "203.0.113.9" not in message.Data.decode() + caplog.text


def test_access_control_is_for_the_host_that_connects(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def main() -> None:
        keys: dict[str, Any] = {"forwarded_from": ["127.0.0.1"], "deny": ["203.0.113.0/24"]}
        async with listener(salmon, allow=["127.0.0.0/8"], **keys) as one:
            client = await dial(one.port)
            await forward(client, *SAID)
            await client.quit()

    asyncio.run(main())
    assert salmon.handled[0].Peer == ("203.0.113.9", 41234)


def test_networks_are_checked_with_the_settings() -> None:
    keys = {"hostname": "mail.example.org", "listen": "127.0.0.1:0"}
    for value in ("127.0.0.1", ["mail.example.org"], ["192.0.2.0/33"], 25):
        with pytest.raises(SettingsError) as error:
            configuration(default={**keys, "forwarded_from": value})
        [problem] = error.value.problems
        assert "forwarded_from: found" in problem
        assert "allowed: a list of networks such as '192.0.2.0/24'" in problem


# -- queue mode -----------------------------------------------------------------------------------


def test_the_queue_carries_the_client_along(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def main() -> None:
        async with listener(salmon, delivery="queue", forwarded_from=["127.0.0.1"]) as one:
            client = await dial(one.port)
            await forward(client, *SAID)
            await forward(client)
            await client.quit()

    asyncio.run(main())
    inbound = queue.Queue("run/inbound")
    stored = [inbound.mbox.get_bytes(key) for key in inbound.keys()]
    assert (
        sum(b"\nX-Envelope-Parameters: MAIL RCPT XFORWARD NAME=mail.ex" in one for one in stored)
        == 1
    )
    # What an older version has put there has no client, and no name of its own.
    inbound.mbox.add(
        b"Return-Path: <a@example.net>\nDelivered-To: old@example.org\nSubject: x\n\nx\n"
    )
    QueueConsumer("run/inbound").start(one_shot=True)
    peers = {message.Peer for message in salmon.handled}
    assert ("203.0.113.9", 41234) in peers and ("run/inbound", 0) in peers
    assert sum(peer[0] == "127.0.0.1" for peer in peers) == 1
    assert not any(b"X-Envelope" in message.Data for message in salmon.handled)


def test_what_the_queue_has_is_the_envelope_again() -> None:
    envelope = Envelope(
        "a@example.net",
        ("b@example.org",),
        {"ENVID": "x"},
        {"b@example.org": {"NOTIFY": "NEVER"}},
        "helo.example.com",
        client=ORIGIN,
    )
    found, message = unpack(stored_envelope(envelope, "b@example.org") + b"Subject: x\n\nx")
    assert (found, message) == (envelope, b"Subject: x\n\nx")
    # No message can say it: our own lines are before it, and then there is no third.
    lines = b"Return-Path: <a@example.net>\nDelivered-To: b@example.org\n"
    spoilt = lines + b"X-Envelope-Parameters: MAIL RCPT XFORWARD ADDR=x\nSubject: x\n\nx"
    assert unpack(spoilt)[0].client is None


# -- what a handler holds -------------------------------------------------------------------------


def holds(salmon: Salmon, work: Callable[[World], Awaitable[None]], **service: Any) -> None:
    salmon.handle(".*", hold)
    keys = {"delivery": "router", "domains": ["example.org"], "forwarded_from": ["127.0.0.1"]}
    in_the_world(salmon, work, **{**keys, **service})


def test_what_a_handler_holds_keeps_its_client(salmon: Salmon) -> None:
    async def work(here: World) -> None:
        client = await dial(here.mx)
        await forward(client, *SAID)
        await forward(client)
        await client.quit()
        first, second = (one.envelope for one in here.held())
        assert (first.client, first.helo) == (OF_A_COPY, "helo.example.com")
        assert second.client is not None and second.client.address == "127.0.0.1"

    holds(salmon, work)


def test_a_consumer_in_another_process_tells_the_server_of_it(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    (salmon.folder / "ourconfig.py").write_text(
        f"customer_accounts = [{ACME!r}]\nprovider = {{}}\nrelay = None\n"
    )
    monkeypatch.setenv("SALMON_SETTINGS_MODULE", "ourconfig")
    monkeypatch.setattr(holding, "PROJECT", salmon.folder)
    monkeypatch.syspath_prepend(str(salmon.folder))

    async def work(here: World) -> None:
        client = await dial(here.mx)
        await forward(client, *SAID)
        await client.quit()
        holding._here.clear()  # as it is in another process
        consumer = QueueConsumer("run/inbound")
        await asyncio.to_thread(consumer.start, one_shot=True)
        [held] = here.held()
        assert held.envelope.client == OF_A_COPY

    holds(salmon, work, delivery="queue")


# -- the hold store -------------------------------------------------------------------------------


def test_what_an_older_version_holds_is_read(tmp_path: Path) -> None:
    place = tmp_path / "hold"
    place.mkdir()
    with sqlite3.connect(place / "index.sqlite3") as database:
        for version, block in enumerate(embedded.MIGRATIONS[:2], start=1):
            for statement in block.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {version}")
        database.execute(
            "INSERT INTO messages (sender, said, size, streams, ascii, body, accounts) VALUES "
            """('a@example.net', '[{"ENVID": "7"}, "old.example.com", true]', 1, 0, 1, 'x', 1)"""
        )
        database.execute(
            "INSERT INTO held (message, account, recipients, size, arrived) VALUES "
            """(1, 'acme', '[["b@example.org", null]]', 1, 0)"""
        )
    database.close()
    store = EmbeddedStore(place)
    [held] = store.listing("acme")
    expected = Envelope("a@example.net", ("b@example.org",), {"ENVID": "7"}, {}, "old.example.com")
    assert held.envelope == expected and held.envelope.client is None
    store.close()


def test_an_older_version_is_told_that_it_cannot_read_this(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EmbeddedStore(tmp_path / "hold").close()
    monkeypatch.setattr(embedded, "MIGRATIONS", embedded.MIGRATIONS[:2])
    with pytest.raises(OSError, match="of a later salmon-revsmtp than this one"):
        EmbeddedStore(tmp_path / "hold")


# -- the Received line ----------------------------------------------------------------------------

# RFC 5321 4.4 and RFC 5322 3.2.2, for what we write.
_LITERAL = r"\[[A-Za-z0-9.:]+\]"
_DOMAIN = rf"(?:[A-Za-z0-9._:?-]+|{_LITERAL})"
_STAMP = re.compile(
    rf"Received: from {_DOMAIN}(?: \((?:{_DOMAIN} )?{_LITERAL}\))?\n"
    rf"(?:\t\(forwarded by {_DOMAIN} {_LITERAL}\)\n)?"
    r"\tby [a-z.]+ \([a-z -]+\)\n"
    r"\twith E?SMTP id [0-9a-f]{16}\n\tfor <b@example.org>; [A-Za-z0-9 ,:+-]+\n"
)


@pytest.mark.parametrize(
    "client",
    [
        ORIGIN,
        Client(),
        Client("2001:db8::1"),
        Client(name="mail.example.com"),
        Client("203.0.113.9", helo="evil) by x\r\nX-Evil: (" * 40, name="(" * 300),
    ],
)
def test_our_received_line_is_always_one(client: Client) -> None:
    origin = Origin("default", "mail.example.org", None, ("192.0.2.1", 25))
    for by in ("", "provider.example.net", "[192.0.2.1]", "x) by (evil\n" * 50):
        envelope = Envelope(
            "a@example.net", ("b@example.org",), helo=client.helo, client=client, forwarded_by=by
        )
        line = origin.received(envelope, "b@example.org").decode()
        assert _STAMP.fullmatch(line), line
        assert ("forwarded by" in line) == bool(by)
        assert max(map(len, line.split("\n"))) < 998
