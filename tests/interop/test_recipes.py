"""Files of the recipes of the documentation, with the servers that they are for."""

from __future__ import annotations

import imaplib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.nexthop import deliver, load
from support.salmon import Salmon
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
