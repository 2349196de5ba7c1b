"""XFORWARD with Postfix, which defined it: what it tells us of where mail came from, what comes of
that where it is not believed, and what it makes of what our provider tells."""

from __future__ import annotations

import asyncio
import smtplib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from salmon import queue
from salmon.mail import MailRequest
from support.collecting import collect
from support.configuration import etrn_keys
from support.listener import listener
from support.salmon import Salmon
from support.servers import Postfix, free_port, until
from support.world import ACME, world

from salmon_revsmtp import Envelope, QueueConsumer, Reply, hookimpl
from salmon_revsmtp.plugins.manager import Plugins

pytestmark = pytest.mark.interop

Roots = Callable[[str], Path]

# Where a message came from: the source address of its client, what the client says of another host
# before it, what it says in EHLO; and what the address and the EHLO name are that we shall hear of.
DIRECT = ("127.0.0.1", "", "direct.example.com", "127.0.0.1", "direct.example.com")
IPV4 = (
    "127.0.0.1",
    "XFORWARD NAME=mail.example.com ADDR=203.0.113.9 PORT=41234 PROTO=ESMTP HELO=helo.example.com",
    "before.example.net",
    "203.0.113.9",
    "helo.example.com",
)
IPV6 = (
    "127.0.0.1",
    "XFORWARD ADDR=IPv6:2001:db8::9 PORT=41235 PROTO=SMTP HELO=[IPv6:2001:db8::9]",
    "before.example.net",
    "2001:db8::9",
    "[IPv6:2001:db8::9]",
)
LOOPBACK = ("::1", "", "six.example.com", "::1", "six.example.com")


class Forwarding(Postfix):
    """Says where it got mail from, to whoever lists XFORWARD; and believes what it hears."""

    def configure(self) -> None:
        super().configure()
        main, master = self.folder / "conf/main.cf", self.folder / "conf/master.cf"
        text = main.read_text() + "smtp_send_xforward_command = yes\n"
        text += "smtpd_authorized_xforward_hosts = 127.0.0.0/8\n"
        if HAS_IPV6:
            text = text.replace("inet_protocols = ipv4", "inet_protocols = all")
            text = text.replace("inet_interfaces = 127.0.0.1", "inet_interfaces = 127.0.0.1, ::1")
            text = text.replace("mynetworks = 127.0.0.0/8", "mynetworks = 127.0.0.0/8, [::1]/128")
            master.write_text(f"{master.read_text()}[::1]:{self.port} inet n - n - - smtpd\n")
        main.write_text(text)

    def submit_from(self, origin: tuple[str, ...], number: int) -> int:
        """Give it a message from there; returns the port that it came from."""
        address, said, helo, *_ = origin
        with smtplib.SMTP(address, self.port, local_hostname=helo) as client:
            assert client.sock is not None
            port = int(client.sock.getsockname()[1])
            client.ehlo()
            if said:
                port = int(said.partition("PORT=")[2].split()[0])
                assert client.docmd(said)[0] == 250
            data = f"Subject: {number}\r\n\r\nhello\r\n"
            assert client.sendmail("a@example.net", ["b@example.org"], data) == {}
        return port


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


# As it logs the host that nothing but the address is known of.
SIX = "unknown[2001:db8::9]"

HAS_IPV6 = _has_ipv6()
ORIGINS = [DIRECT, IPV4, IPV6, *([LOOPBACK] if HAS_IPV6 else [])]


class Watcher:
    """A plugin that sees envelopes, in the order of their messages' subjects."""

    def __init__(self) -> None:
        self.envelopes: dict[int, Envelope] = {}

    @hookimpl
    def message_received(self, agent: Any, envelope: Any, message: bytes) -> Reply | None:
        self.envelopes[int(message.partition(b"Subject: ")[2].split(b"\n")[0])] = envelope
        return None


def by_subject(handled: list[MailRequest]) -> list[MailRequest]:
    return sorted(handled, key=lambda message: int(message["Subject"]))


@pytest.mark.parametrize("delivery", ["router", "queue"])
def test_handlers_see_where_postfix_got_the_mail_from(
    salmon: Salmon, chroot: Roots, delivery: str
) -> None:
    salmon.handle(".*")
    watcher, plugins = Watcher(), Plugins.load()
    plugins.register(watcher)
    ports: list[int] = []

    async def main() -> None:
        keys: dict[str, Any] = {"forwarded_from": ["127.0.0.1"], "delivery": delivery}
        async with listener(salmon, plugins=plugins, **keys) as one:
            with Forwarding(chroot("postfix"), next_hop=one.port) as postfix:
                for number, origin in enumerate(ORIGINS):
                    ports.append(await asyncio.to_thread(postfix.submit_from, origin, number))
                await until(lambda: len(watcher.envelopes) == len(ORIGINS), postfix)
                await until(lambda: postfix.waiting() == 0, postfix)

    asyncio.run(main())
    if delivery == "queue":
        assert len(queue.Queue("run/inbound")) == len(ORIGINS)
        QueueConsumer("run/inbound").start(one_shot=True)
    for number, message in enumerate(by_subject(salmon.handled)):
        *_, address, helo = ORIGINS[number]
        envelope = watcher.envelopes[number]
        assert message.Peer == (address, ports[number])
        assert (envelope.helo, envelope.forwarded_by) == (helo, "mx.example.net")
        assert envelope.client is not None and envelope.client.ident, "Postfix tells its queue ID"
        received = " ".join(message.Data.decode().partition("\n\tby ")[0].split())
        literal = f"[IPv6:{address}]" if ":" in address else f"[{address}]"
        assert received.startswith(f"Received: from {helo} (") and f"{literal})" in received
        assert received.endswith(" (forwarded by mx.example.net [127.0.0.1])")
    assert len(salmon.handled) == len(ORIGINS)


def test_a_postfix_that_is_not_believed_changes_nothing(salmon: Salmon, chroot: Roots) -> None:
    salmon.handle(".*")

    async def main() -> None:
        async with listener(salmon, forwarded_from=["192.0.2.0/24"]) as one:
            with Forwarding(chroot("postfix"), next_hop=one.port) as postfix:
                for number, origin in enumerate(ORIGINS):
                    await asyncio.to_thread(postfix.submit_from, origin, number)
                await until(lambda: len(salmon.handled) == len(ORIGINS), postfix)
                assert "XFORWARD" not in postfix.log()

    asyncio.run(main())
    for message in salmon.handled:
        assert message.Peer[0] == "127.0.0.1"
        assert message.Data.startswith(b"Received: from mx.example.net ([127.0.0.1])\n\tby ")


def test_postfix_understands_what_our_provider_tells(salmon: Salmon, chroot: Roots) -> None:
    """After ETRN: it logs the client that the provider's intake had."""

    async def main() -> None:
        with Forwarding(chroot("postfix"), next_hop=free_port()) as home:
            account = {**ACME, "etrn": f"127.0.0.1:{home.port}"}
            async with world(salmon, accounts=[account], forwarded_from=["127.0.0.1"]) as here:
                for origin in ORIGINS[:3]:
                    await asyncio.to_thread(say, here.mx, origin)
                assert len(here.held()) == 3
                [report] = await collect(salmon, etrn_keys(here.mx, "example.org"))
                assert report.outcome.value == "requested"
                await until(lambda: not here.held(), home)
                lines = home.log().splitlines()
                found = [one.partition("orig_client=")[2] for one in lines if "orig_client=" in one]
                assert found == ["unknown[127.0.0.1]", "mail.example.com[203.0.113.9]", SIX]
                assert [one for one in lines if "warning" in one or "XFORWARD" in one] == []

    def say(port: int, origin: tuple[str, ...]) -> None:
        _, said, helo, *_ = origin
        with smtplib.SMTP("127.0.0.1", port, local_hostname=helo) as client:
            client.ehlo()
            if said:
                assert client.docmd(said)[0] == 250
            data = f"Subject: {helo} {said[-10:]}\r\n\r\nhello\r\n"
            assert client.sendmail("a@example.net", ["b@example.org"], data) == {}

    asyncio.run(main())
