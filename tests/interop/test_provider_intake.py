"""Real mail servers send to the provider: what is held is what they were given, octet for octet,
beneath our Received line and theirs."""

from __future__ import annotations

import asyncio
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.salmon import Salmon
from support.servers import Exim, Postfix, Sendmail, Server, free_port, until
from support.world import ACME, OTHER, World, world

from salmon_revsmtp.demo.samples import Sample, samples
from salmon_revsmtp.smtp.envelope import Envelope

pytestmark = pytest.mark.interop

#: What is kept of a message: recipient, sender, and its octets.
Kept = tuple[str, str, bytes]

# No other server has this name: sendmail does not send to one that is called as it is itself.
KEYS: dict[str, Any] = {"accounts": [ACME, OTHER], "hostname": "hold.example.net"}

# The first field of a header, with its folded lines.
FIELD = re.compile(rb"Received: [^\r]*\r\n(?:[ \t][^\r]*\r\n)*")


def large(octets: int = 10_000_000) -> Sample:
    """8-bit lines, many of which begin with a dot."""
    line = "..Grüße, und noch eine Zeile, die mit Punkten beginnt\r\n.\r\n".encode()
    head = (
        b"From: a@example.net\r\nTo: ada@example.org\r\nSubject: large\r\n"
        b"Date: Mon, 02 Nov 2026 09:30:00 +0100\r\nMessage-ID: <large@example.net>\r\n"
        b"MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Content-Transfer-Encoding: 8bit\r\n\r\n"
    )
    envelope = Envelope(
        "a@example.net", ("ada@example.org", "alan@example.com"), {"BODY": "8BITMIME"}
    )
    return Sample("10 MB of 8-bit dots", envelope, head + line * (octets // len(line)))


def submit(server: Server, sample: Sample) -> None:
    options = [
        f"{key}={value}" if value else key for key, value in sample.envelope.mail_options.items()
    ]
    server.submit(sample.envelope.reverse_path, sample.envelope.recipients, sample.data, options)


def kept(here: World, fields: int) -> list[Kept]:
    """All that is held, without so many Received lines at its beginning, the first of them ours."""
    found = []
    for held in here.store.listing(messages=1000):
        data = here.data(held)
        assert b"by hold.example.net (salmon-revsmtp service mx)" in data[:300], data[:500]
        for _ in range(fields):
            field = FIELD.match(data)
            assert field, data[:500]
            data = data[field.end() :]
        found += [(one, held.envelope.reverse_path, data) for one in held.envelope.recipients]
    return sorted(found)


def sent(sample: Sample) -> list[Kept]:
    envelope = sample.envelope
    return [(one, envelope.reverse_path, sample.data) for one in envelope.recipients]


def takes(sample: Sample) -> bool:
    """Whether sendmail passes a message on unchanged: Debian's has no SMTPUTF8, and a From that is
    no address gets a domain."""
    return not sample.envelope.smtputf8 and b"From: =?x?b?/w?=\r\n" not in sample.data


def spelled(one: Kept) -> Kept:
    """Exim may write a UTF-8 mailbox as an old server would understand it."""
    recipient, sender, data = one
    return (
        recipient.replace("xn--jxalpdlp@", "δοκιμή@"),
        sender.replace("xn--80a1acny@", "почта@"),
        data,
    )


# Each server, and whether it puts a Received line of its own on top.
@pytest.mark.parametrize(("kind", "fields"), [(Postfix, 2), (Exim, 1), (Sendmail, 2)])
def test_what_a_server_sends_is_held_octet_for_octet(
    salmon: Salmon, chroot: Callable[[str], Path], kind: type[Server], fields: int
) -> None:
    root = chroot(kind.program)
    mail = [one for one in (*samples(), large()) if kind is not Sendmail or takes(one)]
    expected = sorted(one for sample in mail for one in sent(sample))

    async def main() -> None:
        port = free_port()
        async with world(salmon, **KEYS, listen=f"127.0.0.1:{port}") as here:
            with kind(root, next_hop=port) as server:
                for sample in mail:
                    await asyncio.to_thread(submit, server, sample)
                await until(lambda: server.waiting() == 0, server)
                found = sorted(map(spelled, kept(here, fields)))
                assert [one[:2] for one in found] == [one[:2] for one in expected], server.log()
                assert found == expected

    asyncio.run(main())


@pytest.mark.parametrize(
    "options",
    [("-d", "-s", "1"), ("-s", "20"), ("-d", "-s", "20")],
    ids=["one connection", "many at once", "many that stay"],
)
def test_what_smtp_source_sends_is_held_octet_for_octet(
    salmon: Salmon, chroot: Callable[[str], Path], options: tuple[str, ...]
) -> None:
    root = chroot("postfix")
    messages, recipients = 100, 3
    data = large(20_000).data

    async def main() -> None:
        async with world(salmon, **KEYS) as here:
            command = [
                *("chroot", str(root), "smtp-source", *options, "-m", str(messages)),
                *("-r", str(recipients), "-f", "a@example.net", "-t", "ada@example.org"),
                *("-F", f"/srv/{Path(file.name).name}", f"127.0.0.1:{here.mx}"),
            ]
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            found = kept(here, 1)
            assert len(found) == messages * recipients
            # The last line is its own.
            assert {one[1:] for one in found} == {("a@example.net", data + b"\r\n")}

    (root / "srv").mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix="revsmtp-", dir=root / "srv") as file:
        file.write(data.replace(b"\r\n", b"\n"))
        file.flush()
        asyncio.run(main())
