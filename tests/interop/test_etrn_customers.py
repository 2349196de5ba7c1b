"""A stranger asks the provider by ETRN, and held mail goes to a customer's real server: Postfix in
the clear, Exim by STARTTLS.  Behind it is Salmon, where all of it arrives octet for octet."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from support.configuration import PASSWORD
from support.customers import DOMAINS, EtrnFetchmail
from support.listener import listener
from support.salmon import Salmon
from support.servers import DEFERRED, REFUSED, Exim, Postfix, Server, free_port, until
from support.strangers import arrived, expected, mail
from support.tls import CERTIFICATE, PRIVATE_KEY
from support.world import World, world

pytestmark = pytest.mark.interop

Roots = Callable[[str], Path]


def exim(root: Path, next_hop: int) -> Server:
    return Exim(root, CERTIFICATE, PRIVATE_KEY, next_hop=next_hop)


#: A customer's server, how it is started, and whether it has STARTTLS.
CUSTOMERS = [("postfix", Postfix, False), ("exim", exim, True)]


@contextlib.asynccontextmanager
async def customer(
    salmon: Salmon, start: Callable[[Path, int], Server], root: Path
) -> AsyncIterator[tuple[Server, World]]:
    """A customer's server in front of Salmon, and the provider that calls it on ETRN."""
    port = free_port()
    with start(root, port) as server:
        address = f"127.0.0.1:{server.port}"
        acme = {"name": "acme", "password": PASSWORD, "domains": list(DOMAINS), "etrn": address}
        async with (
            listener(salmon, domains=list(DOMAINS), listen=f"127.0.0.1:{port}"),
            world(salmon, accounts=[acme]) as here,
        ):
            yield server, here


@pytest.mark.parametrize(("program", "start", "tls"), CUSTOMERS)
def test_fetchmail_asks_and_all_of_it_comes_octet_for_octet(
    salmon: Salmon,
    chroot: Roots,
    program: str,
    start: Callable[[Path, int], Server],
    tls: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    roots = chroot(program), chroot("fetchmail")
    salmon.handle(".*")
    caplog.set_level(logging.INFO, "salmon_revsmtp.provider.etrn")
    given = mail()

    async def main() -> None:
        async with customer(salmon, start, roots[0]) as (server, here):
            for envelope, data in given:
                here.put(envelope, data)
            with EtrnFetchmail(roots[1], here.mx, 0) as client:
                status = await asyncio.to_thread(client.collect)
                assert status == 0, client.log()
                await until(lambda: not here.held(), server)
                await until(lambda: server.waiting() == 0, server)
                found = arrived(salmon)
                assert [to for to, _ in found] == [to for to, _ in expected(given)], server.log()
                assert found == expected(given)
                # And when there is nothing, it hears that.
                await asyncio.to_thread(client.collect)
                assert "no messages waiting" in client.log().lower()
        assert salmon.relayed == []

    asyncio.run(main())
    [line] = [one for one in caplog.messages if "answered in a delivery that ETRN" in one]
    assert f" tls={tls} messages=" in line


@pytest.mark.parametrize(("program", "start", "tls"), CUSTOMERS)
def test_each_recipient_is_settled_as_the_customers_server_says(
    salmon: Salmon,
    chroot: Roots,
    program: str,
    start: Callable[[Path, int], Server],
    tls: bool,
) -> None:
    """What it refuses is told to the sender through the relay; what it defers is still held."""
    root = chroot(program)
    salmon.handle(".*")

    async def main() -> None:
        async with customer(salmon, start, root) as (server, here):
            here.hold("ada@example.org", REFUSED, DEFERRED, "alan@example.com")
            here.hold(REFUSED)
            here.hold(DEFERRED)
            here.hold("ada@example.org", data=b"Subject: the last\r\n\r\nhello\r\n")
            [answer, _] = await here.ask("example.org", "example.com")
            assert answer.startswith("253 ")
            await until(lambda: len(salmon.handled) == 3 and len(salmon.relayed) == 2, server)
            await until(lambda: len(here.held()) == 2, server)
            for held in here.held():
                assert held.envelope.recipients == (DEFERRED,)
                assert "451 4.2.1" in held.reason and "not now" in held.reason
                assert held.strikes == 0

    asyncio.run(main())
    assert sorted(one.To for one in salmon.handled) == [
        "ada@example.org",
        "ada@example.org",
        "alan@example.com",
    ]
    for _, to, report in salmon.relayed:
        assert to == "a@example.net"
        assert f"Final-Recipient: rfc822; {REFUSED}" in report
        assert "Status: 5.1.1" in report and "no such user" in " ".join(report.split())
        assert DEFERRED not in report
