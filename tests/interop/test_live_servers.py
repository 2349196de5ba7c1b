"""Real mail servers send to a provider whose customer is there: what they send is handled at home,
octet for octet, before they hear 250, and what home refuses is refused to them, in its words."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from salmon.mail import MailRequest
from salmon.server import SMTPError
from support.customers import DOMAINS
from support.ends import ends
from support.salmon import Salmon
from support.servers import Exim, Postfix, Sendmail, Server, free_port, until
from support.strangers import arrived, expected, mail

from salmon_revsmtp import Reply, hookimpl
from salmon_revsmtp.demo.samples import Sample
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.smtp.envelope import Envelope

pytestmark = pytest.mark.interop

# sendmail does not send to a host that is called as it is itself.
MX = {"hostname": "hold.example.net"}


class Refuses:
    """A plugin at home that has no mailbox for "never"."""

    @hookimpl
    def recipient_requested(self, agent: Any, envelope: Any, recipient: str) -> Reply | None:
        unknown = recipient.startswith("never@")
        return Reply(550, "no such mailbox at home", "5.1.1") if unknown else None


def refuse_spam(message: MailRequest) -> None:
    if str(message["Subject"]) == "spam":
        raise SMTPError(554, "5.7.1 home does not like it")


def plain(recipient: str, subject: str) -> tuple[Envelope, bytes]:
    data = f"From: a@example.net\r\nTo: {recipient}\r\nSubject: {subject}\r\n\r\nhello\r\n"
    return Envelope("a@example.net", (recipient,)), data.encode()


def takes(kind: type[Server], envelope: Envelope, data: bytes) -> bool:
    """Whether a server passes a message on unchanged: Debian's sendmail has no SMTPUTF8, adds a
    Date, and gives a From that is no address a domain."""
    if kind is not Sendmail:
        return True
    head = data.partition(b"\r\n\r\n")[0]
    has_all = b"Date: " in head and b"Message-ID: " in head and b"From: " in head
    return has_all and not envelope.smtputf8 and b"From: =?x?b?/w?=" not in data


@pytest.mark.parametrize("kind", [Postfix, Exim, Sendmail])
def test_what_a_server_sends_is_handled_at_home_before_it_hears_250(
    salmon: Salmon, chroot: Callable[[str], Path], kind: type[Server]
) -> None:
    root = chroot(kind.program)
    salmon.handle(".*", refuse_spam)
    plugins = Plugins.load()
    plugins.register(Refuses())
    given = [one for one in mail() if takes(kind, *one)]
    refused = [plain("never@example.org", "x"), plain("ada@example.org", "spam")]

    async def main() -> None:
        port = free_port()
        mx = {**MX, "listen": f"127.0.0.1:{port}"}
        account = {"domains": list(DOMAINS)}
        async with ends(salmon, account=account, agent=account, mx=mx, plugins=plugins) as both:
            session = await both.open()
            with kind(root, next_hop=port) as server:
                for envelope, data in [*given, *refused]:
                    sample = Sample("", envelope, data)
                    await asyncio.to_thread(submit, server, sample)
                # Exim keeps its notifications of the two, which have nowhere to go.
                most = len(refused) if kind is Exim else 0
                live = session.live
                assert live is not None
                await until(
                    lambda: live.passed_on == len(given) + 1 and server.waiting() <= most, server
                )
                log = server.log()
            assert both.held == 0
            assert found(salmon) == expected(given)
            assert live.fell_back == 0
            for words in ("no such mailbox at home", "home does not like it"):
                assert words in log or kind is Sendmail, log  # it logs nothing here

    asyncio.run(main())
    assert salmon.relayed == [], "no notification of ours"


def found(salmon: Salmon) -> list[tuple[str, bytes]]:
    """What was handled, but for the one that is refused then."""
    return [one for one in arrived(salmon) if b"Subject: spam" not in one[1]]


def submit(server: Server, sample: Sample) -> None:
    options = [
        f"{key}={value}" if value else key for key, value in sample.envelope.mail_options.items()
    ]
    server.submit(sample.envelope.reverse_path, sample.envelope.recipients, sample.data, options)


@pytest.mark.parametrize(
    "options",
    [("-d", "-s", "1"), ("-s", "20"), ("-d", "-s", "20")],
    ids=["one connection", "many at once", "many that stay"],
)
def test_the_same_octets_many_times_are_so_many_messages(
    salmon: Salmon, chroot: Callable[[str], Path], options: tuple[str, ...]
) -> None:
    """smtp-source sends one file again and again, and hears each answer."""
    root = chroot("postfix")
    salmon.handle(".*")
    messages, recipients = 100, 3
    data = b"Subject: the same\n\nhello\n"

    async def main() -> None:
        async with ends(salmon) as both:
            await both.open()
            command = [
                *("chroot", str(root), "smtp-source", *options, "-m", str(messages)),
                *("-r", str(recipients), "-f", "a@example.net", "-t", "ada@example.org"),
                *("-F", f"/srv/{Path(file.name).name}", f"127.0.0.1:{both.provider.mx}"),
            ]
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            assert len(salmon.handled) == messages * recipients and both.held == 0

    (root / "srv").mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix="revsmtp-", dir=root / "srv") as file:
        file.write(data)
        file.flush()
        asyncio.run(main())
