"""Mail that goes through servers and customers of other makes, and comes to Salmon in the end."""

from __future__ import annotations

from salmon_revsmtp.delivery.trace import unpack_undeliverable
from salmon_revsmtp.demo.samples import samples
from salmon_revsmtp.smtp.envelope import Envelope
from support.salmon import Salmon

__all__ = ["arrived", "expected", "mail"]

LARGE = Envelope("a@example.net", ("ada@example.org",), {"BODY": "8BITMIME"})
LINE = "..Grüße, und noch eine Zeile, die mit Punkten beginnt\r\n.\r\n".encode()


def large() -> bytes:
    """10 MB in 8-bit lines that begin with dots."""
    return b"From: a@example.net\r\nSubject: large\r\n\r\n" + LINE * (10_000_000 // len(LINE))


def mail() -> list[tuple[Envelope, bytes]]:
    return [*((one.envelope, one.data) for one in samples()), (LARGE, large())]


def expected(given: list[tuple[Envelope, bytes]]) -> list[tuple[str, bytes]]:
    """Recipient and message of all that came, as Salmon has it."""
    return sorted(
        (recipient, data.replace(b"\r\n", b"\n").removesuffix(b"\n"))
        for envelope, data in given
        for recipient in envelope.recipients
    )


def arrived(salmon: Salmon) -> list[tuple[str, bytes]]:
    """The same without the Received lines on top, of which the samples have none."""
    found = [(one.To, one.Data) for one in salmon.handled]
    for one in salmon.undeliverable():
        envelope, _, message = unpack_undeliverable(one)
        found.append((envelope.recipients[0], message))
    # Exim writes a UTF-8 mailbox as an old server would understand it.
    return sorted((to.replace("xn--jxalpdlp@", "δοκιμή@"), _beneath(data)) for to, data in found)


def _beneath(data: bytes) -> bytes:
    lines = data.split(b"\n")
    while lines[0].startswith((b"Received: ", b" ", b"\t")):
        del lines[0]
    return b"\n".join(lines)
