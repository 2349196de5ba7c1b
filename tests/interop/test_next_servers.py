"""The handlers with the servers that they are for: Dovecot by LMTP, Postfix by SMTP, and Dovecot as
the reader of Maildirs that we have written."""

from __future__ import annotations

import imaplib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.nexthop import deliver, load
from support.salmon import Salmon
from support.servers import DEFERRED, FULL, REFUSED, Dovecot, Postfix, free_port

from salmon_revsmtp.handlers import nexthop
from salmon_revsmtp.smtp.envelope import Client

pytestmark = pytest.mark.interop

Roots = Callable[[str], Path]

BOB = "bob@example.org"

CONTENT = b"Subject: dots\n\n.\n..\nFrom here\n\xc3\xa9 \xff\n\n"


@pytest.fixture(autouse=True)
def new_connections(salmon: Salmon) -> Iterator[None]:
    nexthop.next_hop.cache_clear()
    yield
    nexthop.next_hop.cache_clear()


def mailbox(dovecot: Dovecot, user: str) -> list[bytes]:
    """The messages in a user's inbox, as an IMAP client has them."""
    with imaplib.IMAP4("127.0.0.1", dovecot.imap) as client:
        client.login(f'"{user}"', "secret")
        client.select()
        numbers = client.search(None, "ALL")[1][0].split()
        found = []
        for number in numbers:
            [part, _] = client.fetch(number.decode(), "(BODY.PEEK[])")[1]
            assert isinstance(part, tuple)
            found.append(part[1])
        return found


# -- by LMTP to Dovecot ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["TCP", "Unix socket"])
def test_dovecot_stores_what_it_is_handed(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, chroot: Roots, way: str
) -> None:
    with Dovecot(chroot("dovecot"), BOB) as dovecot:
        server = f"127.0.0.1:{dovecot.port}" if way == "TCP" else f"unix:{dovecot.socket}"
        load(monkeypatch, "lmtp", lmtp_server=server)
        assert deliver(CONTENT, sender="").code == 250
        assert deliver(b"Subject: 2\n\nx").code == 250
        first, second = mailbox(dovecot, BOB)
        assert first.startswith(b"Return-Path: <>\r\nDelivered-To: bob@example.org\r\n")
        assert first.endswith(b"\r\n" + CONTENT.replace(b"\n", b"\r\n") + b"\r\n")
        assert second.startswith(b"Return-Path: <ann@example.net>\r\n")
        # One is that of the test which waited for it to listen.
        assert dovecot.log().count("Connect from") == 2, "both went over one connection"


def test_what_dovecot_refuses_and_defers_is_refused_and_deferred(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, chroot: Roots
) -> None:
    with Dovecot(chroot("dovecot"), BOB, FULL) as dovecot:
        load(monkeypatch, "lmtp", lmtp_server=f"127.0.0.1:{dovecot.port}")
        unknown = deliver(recipient="eve@example.org")
        full = deliver(recipient=FULL)
        assert str(unknown).startswith("550 5.1.1 <eve@example.org> User doesn't exist"), unknown
        assert str(full).startswith("452 4.2.2 <full@example.org> Quota exceeded"), full
        assert deliver().code == 250
        assert len(mailbox(dovecot, BOB)) == 1
    assert str(deliver()).startswith("451 4.4.1 ")
    assert salmon.undeliverable() == []


# -- Maildirs that Dovecot reads -------------------------------------------------------------------


def test_dovecot_reads_the_maildirs_that_we_write(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, chroot: Roots
) -> None:
    users = {BOB: BOB, "odd%20one+x@example.org": '"odd one+x"@example.org'}
    with Dovecot(chroot("dovecot"), *users) as dovecot:
        load(monkeypatch, "maildir", maildirs=str(dovecot.mail))
        for address in users.values():
            assert deliver(CONTENT, address).code == 250
            assert deliver(b"Subject: 2\n\nx", address, sender="").code == 250
        for folder, address in users.items():
            owner = (dovecot.mail / folder / "new").stat()
            assert (owner.st_uid, owner.st_gid) == (Dovecot.OWNER, Dovecot.OWNER)
            first, second = mailbox(dovecot, folder)
            envelope = f"Return-Path: <ann@example.net>\r\nDelivered-To: {address}\r\n".encode()
            assert first == envelope + CONTENT.replace(b"\n", b"\r\n") + b"\r\n"
            assert second.startswith(b"Return-Path: <>\r\n")
            status = dovecot.doveadm("mailbox", "status", "-u", folder, "messages", "INBOX")
            assert status.strip() == "INBOX messages=2"
        # What the reader has moved to cur/ and added beside it does not disturb us.
        assert deliver().code == 250
        assert len(mailbox(dovecot, BOB)) == 3
        assert (dovecot.mail / BOB / "dovecot.index.log").exists()


# -- by SMTP to Postfix ----------------------------------------------------------------------------


def test_postfix_takes_refuses_and_defers(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, chroot: Roots
) -> None:
    nowhere = free_port()
    with Postfix(chroot("postfix"), next_hop=nowhere) as postfix:
        load(monkeypatch, "smtp", smtp_server=f"127.0.0.1:{postfix.port}")
        replies = [str(deliver(CONTENT, one)) for one in (BOB, REFUSED, DEFERRED, BOB)]
        assert [one[:9] for one in replies] == ["250 2.0.0", "550 5.1.1", "451 4.2.1", "250 2.0.0"]
        assert "no such user" in replies[1] and "not now" in replies[2]
        assert str(deliver(recipient="bob@example.com", sender="")).startswith("250")
        assert postfix.waiting() == 3
    assert str(deliver()).startswith("451 4.4.1 ")
    assert salmon.undeliverable() == []


class Believing(Postfix):
    """It believes what we tell of where mail came from."""

    def configure(self) -> None:
        super().configure()
        main = self.folder / "conf/main.cf"
        main.write_text(main.read_text() + "smtpd_authorized_xforward_hosts = 127.0.0.0/8\n")


def test_postfix_hears_where_mail_came_from(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, chroot: Roots
) -> None:
    with Believing(chroot("postfix"), next_hop=free_port()) as postfix:
        load(monkeypatch, "smtp", smtp_server=f"127.0.0.1:{postfix.port}")
        client = Client("203.0.113.9", 41234, "mail.example.com", "ESMTP", "helo.example.com")
        assert deliver(client=client).code == 250
        assert deliver(client=client, recipient=REFUSED).code == 550
        log = postfix.log()
        assert "orig_client=mail.example.com[203.0.113.9]" in log or (
            "client=mail.example.com[203.0.113.9]" in log
        )
