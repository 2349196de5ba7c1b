"""Other people's customers collect from the provider: fetchmail 6.4, and Exim by ``-atrn``.  They
call, and they are held (``push: "always"``).  And ours, with ``push``, calls Exim."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support.configuration import agent_keys, configuration
from support.customers import DOMAINS, Customer, EximCustomer, Fetchmail
from support.holding import Holding, account
from support.listener import listener
from support.salmon import Salmon
from support.servers import ACCOUNTS, Exim, Postfix, free_port
from support.strangers import arrived, expected, mail

from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.smtp.envelope import Envelope

pytestmark = pytest.mark.interop

Roots = Callable[[str], Path]

# What is waited for here takes moments; this is for a machine that does much else.
PATIENCE = 60

STRANGERS = [Fetchmail, EximCustomer]


@contextlib.asynccontextmanager
async def providing(
    salmon: Salmon, keepalive: float = 60, **keys: Any
) -> AsyncIterator[tuple[Holding, Provider]]:
    acme = account(domains=DOMAINS, **keys)
    held = Holding(salmon.folder / "provider", acme, keepalive=keepalive)
    async with held.provider() as provider:
        yield held, provider
    held.close()


async def until(so: Callable[[], object], customer: Customer) -> None:
    """Wait for what the customer does."""

    async def wait() -> None:
        while not so():
            await asyncio.sleep(0.02)

    try:
        await asyncio.wait_for(wait(), PATIENCE)
    except asyncio.TimeoutError:
        raise AssertionError(customer.log()) from None


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_strangers_customer_collects_all_of_it_octet_for_octet(
    salmon: Salmon, chroot: Roots, kind: type[Customer]
) -> None:
    root = chroot(kind.program)
    salmon.handle(".*")
    given = mail()

    async def main() -> None:
        async with (
            providing(salmon) as (held, provider),
            listener(salmon, domains=list(DOMAINS)) as behind,
        ):
            for envelope, data in given:
                held.put(envelope, data)
            with kind(root, provider.port, behind.port) as customer:
                await asyncio.to_thread(customer.collect)
                assert len(held) == 0, customer.log()
                await asyncio.to_thread(customer.deliver)
                found = arrived(salmon)
                assert [to for to, _ in found] == [to for to, _ in expected(given)], customer.log()
                assert found == expected(given)
                # And when there is nothing, it hears that.
                await asyncio.to_thread(customer.collect)
                assert kind is EximCustomer or "You have no mail" in customer.log()
            assert held.told == []

    asyncio.run(main())


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_strangers_customer_is_pushed_to(
    salmon: Salmon, chroot: Roots, kind: type[Customer]
) -> None:
    """The session stays open through silences, with a NOOP now and then, and takes what comes."""
    root = chroot(kind.program)
    salmon.handle(".*")
    given = mail()
    last = Envelope("a@example.net", ("ada@example.org",)), b"Subject: the last\r\n\r\nhello\r\n"

    async def main() -> None:
        async with (
            providing(salmon, keepalive=1, push="always") as (held, provider),
            listener(salmon, domains=list(DOMAINS)) as behind,
        ):
            with kind(root, provider.port, behind.port) as customer:
                customer.begin()
                await until(lambda: provider.sessions, customer)
                [session] = provider.sessions
                for envelope, data in given:
                    held.put(envelope, data)
                    await until(lambda: not len(held), customer)
                spoken = session.machine.steps
                await until(lambda: session.machine.steps >= spoken + 3, customer)  # NOOPs
                held.put(*last)
                await until(lambda: not len(held), customer)
                assert provider.sessions == [session] and customer.collecting, customer.log()
                await asyncio.to_thread(customer.deliver)
                assert arrived(salmon) == expected([*given, last])

    asyncio.run(main())


def test_fetchmail_in_front_of_postfix(salmon: Salmon, chroot: Roots) -> None:
    roots = chroot("fetchmail"), chroot("postfix")
    salmon.handle(".*")
    given = mail()

    async def main() -> None:
        port = free_port()
        home = listener(salmon, domains=list(DOMAINS), listen=f"127.0.0.1:{port}")
        async with providing(salmon) as (held, provider), home:
            for envelope, data in given:
                held.put(envelope, data)
            with (
                Postfix(roots[1], next_hop=port) as postfix,
                Fetchmail(roots[0], provider.port, postfix.port) as customer,
            ):
                await asyncio.to_thread(customer.collect)
                assert len(held) == 0, customer.log()
                await until(lambda: postfix.waiting() == 0, customer)
            assert arrived(salmon) == expected(given)

    asyncio.run(main())


def test_a_provider_without_push_hears_not_a_word_of_it(
    salmon: Salmon, chroot: Roots, caplog: pytest.LogCaptureFixture
) -> None:
    """Exim is the provider.  Our server, with ``push`` on, asks only for what Exim offers."""
    root = chroot("exim")
    salmon.handle(".*")
    caplog.set_level(logging.DEBUG, "salmon_revsmtp.dialogue")

    async def main() -> None:
        with Exim(root) as exim:
            exim.submit("a@example.net", ["b@example.org"], b"Subject: hi\r\n\r\nhello\r\n")
            keys = agent_keys(exim.port, server="127.0.0.1", password=ACCOUNTS["acme"], push=True)
            plugins = Plugins.load()
            valid = configuration({**keys, "every": 0.02}, plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                daemon = Daemon(collector, plugins)
                running = asyncio.create_task(daemon.run())
                await handled(1)
                exim.submit("a@example.net", ["b@example.org"], b"Subject: ho\r\n\r\nhello\r\n")
                await handled(2)
                daemon.stop()
                await asyncio.wait_for(running, PATIENCE)
            assert exim.waiting() == 0
            assert "syntax" not in exim.log() and "unrecognized" not in exim.log()

    async def handled(messages: int) -> None:
        async def wait() -> None:
            while len(salmon.handled) < messages:
                await asyncio.sleep(0.02)

        await asyncio.wait_for(wait(), PATIENCE)

    asyncio.run(main())
    said = [one.getMessage() for one in caplog.records if one.name == "salmon_revsmtp.dialogue"]
    assert any("ATRN" in one for one in said)
    assert not any("XHOLD" in one for one in said), said
