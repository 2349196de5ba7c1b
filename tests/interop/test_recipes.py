"""Files of the recipes of the documentation, with the servers that they are for."""

from __future__ import annotations

import asyncio
import imaplib
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from salmon.routing import Router
from support.customers import Fetchmail
from support.listener import listener
from support.nexthop import deliver, load
from support.salmon import Salmon, fails
from support.servers import DOVECOT, Dovecot

pytestmark = pytest.mark.interop

RECIPES = Path(__file__).parents[2] / "docs/recipes"
ADA = "ada@example.org"


class ReaderOfMaildirs(Dovecot):
    """Dovecot with the file of the recipe, below what a test needs: ports and folders."""

    #: Debian's user "mail", as whom the server of the recipe runs.
    OWNER = 8

    def configure(self) -> None:
        super().configure()
        ours = DOVECOT.format(place=self.place, port=self.port, imap=self.imap)
        ours = re.sub(r"(?ms)^(passdb|userdb|plugin) \{.*?^\}\n", "", ours)
        ours = re.sub(r"(?m)^(mail_location|mail_plugins|quota_full_tempfail) .*\n", "", ours)
        page = (RECIPES / "dovecot/maildir-2.3.conf").read_text()
        for theirs, here in (("/srv/mail/run/mail", "mail"), ("/etc/dovecot/users", "users")):
            assert page.count(theirs) == 1
            page = page.replace(theirs, f"{self.place}/{here}")
        (self.folder / "dovecot.conf").write_text(ours + page)
        password = self.inside("doveadm", "pw", "-s", "BLF-CRYPT", "-p", "secret").strip()
        (self.folder / "users").write_text(f"{ADA}:{password}\n")


def test_dovecot_with_the_file_of_the_recipe_serves_the_maildir_of_an_address(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, chroot: Callable[[str], Path]
) -> None:
    with ReaderOfMaildirs(chroot("dovecot")) as dovecot:
        load(monkeypatch, "maildir", maildirs=str(dovecot.mail), mailboxes=[ADA])
        assert deliver(b"Subject: to Ada\n\nhello", "Ada@Example.org").code == 250
        assert (dovecot.mail / ADA / "new").stat().st_uid == 8
        with imaplib.IMAP4("127.0.0.1", dovecot.imap) as client:
            with pytest.raises(imaplib.IMAP4.error, match=r"(?i)authentication failed"):
                client.login(ADA, "wrong")
            client.login(ADA, "secret")
            assert client.select()[1] == [b"1"], dovecot.log()
            [part, _] = client.fetch("1", "(BODY.PEEK[])")[1]
            assert isinstance(part, tuple)
            assert part[1].startswith(b"Return-Path: <ann@example.net>\r\nDelivered-To: ")
            assert b"Subject: to Ada\r\n\r\nhello" in part[1]


# With `keep`, as the recipe begins.
MAILBOX = """
set no bouncemail
set no spambounce
poll 127.0.0.1 service {port} protocol imap timeout 60
    user "ada" password "secret" is "ada" here
    smtphost "127.0.0.1/{behind}" smtpname "ada@example.org"
    sslproto ""
    keep
"""


class MailboxFetchmail(Fetchmail):
    """fetchmail with the lines of the recipe: from a mailbox to a service of ours.

    ``port``  the mailbox's, by IMAP.
    """

    def configure(self) -> None:
        super().configure()
        text = MAILBOX.format(port=self.port, behind=self.behind)
        (self.folder / "fetchmailrc").write_text(text)

    def delete_what_is_taken(self) -> None:
        file = self.folder / "fetchmailrc"
        file.write_text(file.read_text().replace("    keep\n", "    nokeep\n"))


def test_fetchmail_moves_a_mailbox_to_our_service_and_deletes_what_we_take(
    salmon: Salmon, chroot: Callable[[str], Path]
) -> None:
    roots = chroot("fetchmail"), chroot("dovecot")

    async def main() -> None:
        with Dovecot(roots[1], "ada") as mailbox:
            async with listener(salmon, domains=["example.org"]) as home:
                with MailboxFetchmail(roots[0], mailbox.imap, home.port) as fetchmail:

                    async def poll() -> int:
                        status = await asyncio.to_thread(fetchmail.collect)
                        assert status in (0, 1), fetchmail.log()
                        return len(salmon.handled)

                    put(mailbox, "first", "second")
                    assert await poll() == 2
                    assert {one.To for one in salmon.handled} == {ADA}
                    assert await poll() == 2, "what it keeps it does not fetch again"
                    fetchmail.delete_what_is_taken()
                    put(mailbox, "third")
                    Router.clear_routes()
                    salmon.handle(".*", fails(451, "later"))
                    await poll()
                    assert left(mailbox) == 3, "what we defer stays"
                    Router.clear_routes()
                    salmon.handle(".*")
                    await poll()
                    assert str(salmon.handled[-1]["Subject"]) == "third"
                    assert left(mailbox) == 2, "what we take is deleted"
                    put(mailbox, "fourth")
                    Router.clear_routes()
                    salmon.handle(".*", fails(550, "no"))
                    await poll()
                    assert left(mailbox) == 3, "what we refuse stays"

    salmon.handle(".*")
    asyncio.run(main())


def put(mailbox: Dovecot, *subjects: str) -> None:
    """Have messages in the mailbox of ada."""
    folder = mailbox.mail / "ada"
    for name in ("", "new", "cur", "tmp"):
        (folder / name).mkdir(exist_ok=True)
        os.chown(folder / name, Dovecot.OWNER, Dovecot.OWNER)
    for subject in subjects:
        file = folder / "new" / subject
        file.write_text(f"From: a@example.net\nSubject: {subject}\n\nhello\n")
        os.chown(file, Dovecot.OWNER, Dovecot.OWNER)


def left(mailbox: Dovecot) -> int:
    return sum(len(list((mailbox.mail / "ada" / name).iterdir())) for name in ("new", "cur"))
