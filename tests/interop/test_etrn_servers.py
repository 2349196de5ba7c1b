"""ETRN with real servers: their answers, and the whole way of the mail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from support.configuration import configuration, etrn_keys
from support.salmon import Salmon
from support.servers import Exim, Postfix, Sendmail, Server, free_port, until

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.demo.samples import samples
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector

pytestmark = pytest.mark.interop

# Exim rewrites a UTF-8 mailbox when it goes out on a connection that it has used before.
DOWNCONVERTED = ("xn--jxalpdlp@", "δοκιμή@")

DOMAINS = ["example.org", "example.com"]


def requested(salmon: Salmon, server: Server, expected: int, *domains: str) -> Report:
    """Listen, collect, and wait until the server has delivered so many messages."""

    async def main() -> Report:
        service = {"listen": f"127.0.0.1:{server.next_hop}", "hostname": "mail.example.org"}
        keys = etrn_keys(server.port, *domains)
        valid = configuration(keys, default={**service, "domains": DOMAINS})
        plugins = Plugins.load()
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            [listener] = await collector.listeners()
            await listener.start()
            [report] = await collector.collect(valid.agents)
            await until(lambda: delivered(salmon) >= expected, server)
            await until(lambda: server.waiting() == 0, server)
            await listener.stop(5)
        return report

    return asyncio.run(main())


def delivered(salmon: Salmon) -> int:
    return len(salmon.handled) + len(salmon.undeliverable())


def asked(salmon: Salmon, server: Server, *domains: str) -> Report:
    async def main() -> Report:
        valid = configuration(etrn_keys(server.port, *domains), default={"domains": DOMAINS})
        with Collector(valid, Plugins.load(), lambda: salmon.relay) as collector:
            [report] = await collector.collect(valid.agents)
        return report

    return asyncio.run(main())


def submit(server: Server) -> list[tuple[str, bytes]]:
    """All samples, and what is expected of each: its recipient and its body.  (A server on the way
    may add headers, and Postfix breaks lines of 998 octets only above its limit.)"""
    expected = []
    for sample in samples():
        options = [
            f"{key}={value}" if value else key
            for key, value in sample.envelope.mail_options.items()
        ]
        server.submit(
            sample.envelope.reverse_path, sample.envelope.recipients, sample.data, options
        )
        body = sample.data.replace(b"\r\n", b"\n").removesuffix(b"\n").partition(b"\n\n")[2]
        expected += [(recipient, body) for recipient in sample.envelope.recipients]
    return sorted(expected)


def arrived(salmon: Salmon) -> list[tuple[str, bytes]]:
    found = [(one.To, one.Data.partition(b"\n\n")[2]) for one in salmon.handled]
    for one in salmon.undeliverable():
        recipient = one.split(b"\n")[1].removeprefix(b"Delivered-To: ").decode()
        found.append((recipient, one.partition(b"\n\n")[2]))
    return sorted(found)


@pytest.mark.parametrize("kind", [Postfix, Exim])
def test_mail_that_waits_comes_when_it_is_asked_for(
    salmon: Salmon, chroot: Callable[[str], Path], kind: type[Server]
) -> None:
    salmon.handle(".*")
    with kind(chroot(kind.program), next_hop=free_port()) as server:
        expected = submit(server)
        messages = len(samples())
        # Our listener is down: the server tries in vain and keeps the mail.
        asyncio.run(until(lambda: server.waiting() == messages, server))
        if isinstance(server, Postfix):
            postfix = server
            asyncio.run(until(lambda: postfix.deferred() == messages, server))
        if isinstance(server, Exim):
            server.wait_until_idle()
        report = requested(salmon, server, len(expected), *DOMAINS)
        assert report.outcome is Outcome.REQUESTED, (report, server.log())
        found = [(one.replace(*DOWNCONVERTED), body) for one, body in arrived(salmon)]
        assert sorted(found) == expected


@pytest.mark.parametrize("kind", [Postfix, Exim])
def test_a_domain_that_it_does_not_serve(
    salmon: Salmon, chroot: Callable[[str], Path], kind: type[Server]
) -> None:
    with kind(chroot(kind.program), next_hop=free_port()) as server:
        report = asked(salmon, server, "example.net")
    assert report.outcome is Outcome.REFUSED, report
    assert report.error is not None and "example.net" in report.error


def test_the_answers_of_sendmail(salmon: Salmon, chroot: Callable[[str], Path]) -> None:
    with Sendmail(chroot("sendmail")) as server:
        # sendmail 8.17 starts a queue run and says so, whether or not anything waits.
        nothing = asked(salmon, server, "example.org")
        assert nothing.outcome is Outcome.REQUESTED, (nothing, server.log())
        server.submit("a@example.net", ["b@example.org"], b"Subject: hi\r\n\r\nhello\r\n")
        waiting = asked(salmon, server, "example.org")
        assert waiting.outcome is Outcome.REQUESTED, (waiting, server.log())
        assert waiting.answers == ["example.org: 250 2.0.0 Queuing for node example.org started"]
