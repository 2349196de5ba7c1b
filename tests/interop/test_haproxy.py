"""HAProxy, with the file of the documentation, before two hosts of a provider: its PROXY headers, a
host that dies, and what a sender hears then."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import smtplib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.configuration import agent_keys, configuration
from support.postgres import Cluster
from support.processes import LONG
from support.provider_process import ProviderProcess
from support.salmon import Salmon
from support.servers import Exim, HAProxy
from support.tls import CERTIFICATE, PRIVATE_KEY

from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.hold.postgres import PostgresStore
from salmon_revsmtp.provider.hold.store import Held
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon

pytestmark = pytest.mark.interop

Roots = Callable[[str], Path]
TLS = {"tls_cert": str(CERTIFICATE), "tls_key": str(PRIVATE_KEY)}
MESSAGE = b"Subject: x\r\n\r\nx\r\n"
# A sender's own address, which is neither HAProxy's nor what others on this machine have.
SENDER = "127.0.0.77"


class Behind:
    """Two hosts before one database, and HAProxy before them.

    ``store``  looks at what they hold.
    """

    def __init__(self, nodes: list[ProviderProcess], balancer: HAProxy, store: PostgresStore):
        self.nodes, self.balancer, self.store = nodes, balancer, store
        self._numbers = itertools.count()

    def send(self, number: int = 1) -> None:
        for _ in range(number):
            data = b"Subject: m%d\r\n\r\nx\r\n" % next(self._numbers)
            with smtplib.SMTP(
                "127.0.0.1", self.balancer.port, timeout=LONG, source_address=(SENDER, 0)
            ) as client:
                client.sendmail("a@example.net", ["b@example.org"], data)

    def held(self) -> list[Held]:
        return list(self.store.listing(messages=10_000))

    def until_held(self, number: int) -> list[Held]:
        give_up = time.monotonic() + LONG
        while len(held := self.held()) < number:
            assert time.monotonic() < give_up, held
            time.sleep(0.05)
        return held


@contextlib.contextmanager
def behind(
    salmon: Salmon,
    database: Cluster,
    chroot: Roots,
    header: str = "send-proxy-v2",
    running: int = 2,
    keys: dict[str, str] | None = None,
) -> Iterator[Behind]:
    root = chroot("haproxy")
    url = database.url(database.schema())
    both = {"proxy_from": [HAProxy.ADDRESS], **(keys or {})}
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(ProviderProcess(salmon.folder / name, url, 2.0, both))
            for name in "ab"
        ]
        for one in nodes[:running]:
            one.start()
        store = PostgresStore(url, salmon.folder / "observer")
        stack.callback(store.close)
        (mx, other_mx), (odmr, other_odmr) = zip(*((n.mx, n.odmr) for n in nodes), strict=True)
        balancer = HAProxy(root, (mx, other_mx), (odmr, other_odmr), header)
        yield Behind(nodes, stack.enter_context(balancer), store)


@pytest.mark.parametrize("header", ["send-proxy", "send-proxy-v2"])
def test_mail_comes_from_its_sender_and_not_from_the_balancer(
    salmon: Salmon, database: Cluster, chroot: Roots, header: str
) -> None:
    with behind(salmon, database, chroot, header) as here:
        here.send(4)
        for held in here.until_held(4):
            assert held.envelope.client is not None
            assert held.envelope.client.address == SENDER
        assert " is DOWN" not in here.balancer.log(), "both answer its checks"


def test_what_postfix_sends_in_many_connections_is_held(
    salmon: Salmon, database: Cluster, chroot: Roots
) -> None:
    """With smtp-source, which is Postfix's: each message in a connection of its own."""
    postfix = chroot("postfix")
    with behind(salmon, database, chroot) as here:
        done = subprocess.run(
            [
                *("chroot", str(postfix), "smtp-source", "-d", "-s", "10", "-m", "200"),
                *("-l", "4000", "-f", "a@example.net", "-t", "b@example.org"),
                f"127.0.0.1:{here.balancer.port}",
            ],
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert len(here.until_held(200)) == 200
        addresses = {one.envelope.client and one.envelope.client.address for one in here.held()}
        assert addresses == {"127.0.0.1"}, "smtp-source's, which is not HAProxy's"


@pytest.mark.parametrize("header", ["send-proxy", "send-proxy-v2"])
def test_a_session_that_stays_open_through_the_balancer(
    salmon: Salmon, database: Cluster, chroot: Roots, header: str
) -> None:
    """With TLS and a login, at one of the hosts; what comes at either goes down it."""
    salmon.handle(".*")

    async def main(here: Behind) -> None:
        plugins = Plugins.load()
        agent = agent_keys(
            here.balancer.customers, tls="starttls", ca_file=str(CERTIFICATE), every=0.005
        )
        valid = configuration(agent, plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            daemon = Daemon(collector, plugins)
            running = asyncio.create_task(daemon.run())
            await asyncio.to_thread(here.send, 6)
            give_up = time.monotonic() + LONG
            while len(salmon.handled) < 6:
                assert time.monotonic() < give_up, here.balancer.log()
                await asyncio.sleep(0.05)
            daemon.stop()
            await asyncio.wait_for(running, LONG)

    with behind(salmon, database, chroot, header, keys=TLS) as here:
        asyncio.run(main(here))
    assert {one.Peer[0] for one in salmon.handled} == {SENDER}


def test_a_host_that_dies_costs_its_own_connections_only(
    salmon: Salmon, database: Cluster, chroot: Roots
) -> None:
    with behind(salmon, database, chroot) as here:
        here.send(2)
        for node in here.nodes:
            node.kill()
            here.send(4)  # at once, too: who is refused by one host gets the other
            node.start()
            here.send(2)
        assert len(here.until_held(14)) == 14


class EximWithTls(Exim):
    """One that does TLS where its next server has that."""

    def configure(self) -> None:
        super().configure()
        file = self.folder / "exim.conf"
        text = file.read_text().replace("hosts_avoid_tls = *", "tls_verify_certificates =")
        file.write_text(text)


@pytest.mark.parametrize("tls", [False, True])
def test_exim_keeps_a_message_in_which_a_host_dies(
    salmon: Salmon, database: Cluster, chroot: Roots, tls: bool
) -> None:
    """HAProxy makes a clean end of our reset, and Exim takes one for success; but in the clear it
    hears 421 first, and under TLS it sees that the end is none of TLS."""
    root = chroot("exim")
    keys = TLS if tls else {}
    with behind(salmon, database, chroot, running=0, keys=keys) as here:
        one, other = here.nodes
        one.start(die_at=1, after="provider/intake.py:deliver")
        kind = EximWithTls if tls else Exim
        with kind(root, next_hop=here.balancer.port) as exim:
            exim.submit("a@example.net", ["b@example.org"], MESSAGE)
            word, status = one._hear()
            assert (word, status) == ("ended", "-9")
            one._pid = 0
            give_up = time.monotonic() + LONG
            while "defer" not in exim.log() and "==" not in exim.log():
                assert time.monotonic() < give_up, exim.log()
                assert "Completed" not in exim.log(), exim.log()
                time.sleep(0.05)
            assert here.held() == []
            other.start()
            while exim.waiting():
                exim.inside("exim4", "-C", f"{exim.place}/exim.conf", "-qf")
                assert time.monotonic() < give_up, exim.log()
                time.sleep(0.1)
            assert ("X=TLS" in exim.log()) is tls, exim.log()
            [held] = here.until_held(1)
            assert held.envelope.recipients == ("b@example.org",)
