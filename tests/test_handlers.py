"""The handlers that come with the package."""

from __future__ import annotations

import mailbox
import stat
from pathlib import Path

import pytest
from support.nexthop import Call, deliver, load, next_host
from support.salmon import Salmon


def stored(folder: str = "run/mail") -> dict[str, list[bytes]]:
    """What is in the Maildirs, as Python's own reader has it."""
    found = {}
    for place in sorted(Path(folder).iterdir()):
        box = mailbox.Maildir(str(place), create=False)
        found[place.name] = [box.get_bytes(key) for key in box.keys()]
    return found


def test_each_address_has_a_maildir(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, "maildir")
    assert deliver().code == 250
    assert deliver(b"Subject: 2\n\n.\n", "Ann@example.org", sender="").code == 250
    assert stored() == {
        "ann@example.org": [b"Return-Path: <>\nDelivered-To: Ann@example.org\nSubject: 2\n\n.\n\n"],
        "bob@example.org": [
            b"Return-Path: <ann@example.net>\nDelivered-To: bob@example.org\nSubject: x\n\nhello\n"
        ],
    }


def test_only_their_owner_reads_them(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, "maildir")
    deliver()
    paths = [Path("run/mail"), *Path("run/mail").rglob("*")]
    assert len(paths) == 6
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("kind", ["lmtp", "smtp"])
def test_a_message_is_handed_on(salmon: Salmon, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    got = []

    def script(call: Call) -> None:
        call.greet("SIZE", hello={"lmtp": "LHLO", "smtp": "EHLO"}[kind])
        got.append(call.message())
        got.append(call.message("550 5.1.1 <bob@example.org> unknown"))
        call.asks("RSET", "250 ok")

    with next_host(script) as server:
        load(monkeypatch, kind, **{f"{kind}_server": server})
        assert deliver(b"Subject: x\n\n.\n..\nhello").code == 250
        reply = deliver()
    assert str(reply) == "550 5.1.1 <bob@example.org> unknown"
    assert got == [b"Subject: x\r\n\r\n..\r\n...\r\nhello\r\n", b"Subject: x\r\n\r\nhello\r\n"]


def test_a_server_that_is_down(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with next_host() as server:
        pass
    load(monkeypatch, "lmtp", lmtp_server=server)
    assert [deliver().code for _ in range(3)] == [451, 451, 451]
    [line] = [one.getMessage() for one in caplog.records if "lmtp_server=" in one.getMessage()]
    assert line.startswith(f"lmtp_server={server} Connection refused; mail for it is answered")
