"""The handlers that come with the package: mail in Maildirs, and what their settings are."""

from __future__ import annotations

import asyncio
import errno
import json
import mailbox
import stat
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from salmon import queue
from salmon.mail import MailRequest
from salmon.routing import Router
from salmon.server import SMTPError
from support.dialogue import no_more_mail
from support.disk import small_disk
from support.listener import listener
from support.messages import MESSAGE
from support.nexthop import Call, deliver, load, next_host
from support.project import Project, isp, one_message, provider
from support.salmon import Salmon
from support.servers import free_port

from salmon_revsmtp.delivery import maildir
from salmon_revsmtp.delivery.routes import is_routed
from salmon_revsmtp.files import sync_folder
from salmon_revsmtp.handlers.names import Mailbox
from salmon_revsmtp.settings import SettingsError

HELLO = b"Subject: x\n\nhello"


def stored(folder: str = "run/mail") -> dict[str, list[bytes]]:
    """What is in the Maildirs, as Python's own reader has it."""
    found = {}
    for place in sorted(Path(folder).iterdir()):
        box = mailbox.Maildir(str(place), create=False)
        found[place.name] = [box.get_bytes(key) for key in box.keys()]
    return found


def names(folder: str = "run/mail") -> list[str]:
    return [place.name for place in sorted(Path(folder).iterdir())]


# -- what is stored --------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"\n",
            b"no header at all",
            b" folded\n\nx",
            b"\xff\x00\xfe: \x80\n\n\r\rx\r\ny\r",
            b"a: b",
        ),
        b"Return-Path: <eve@example.com>\nDelivered-To: eve@example.org\n\nx",
        b"From nobody Thu Jan  1 00:00:00 1970\nFrom: x\n\nFrom here\n.\n..\n\n\n",
    ],
)
def test_no_octet_changes(salmon: Salmon, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    load(monkeypatch, "maildir")
    assert deliver(content, trace=b"Received: x\n").code == 250
    [[whole]] = stored().values()
    first, second, rest = whole.split(b"\n", 2)
    assert (first, second) == (b"Return-Path: <ann@example.net>", b"Delivered-To: bob@example.org")
    assert rest == b"Received: x\n" + content + b"\n"


def test_only_their_owner_reads_them(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, "maildir")
    deliver()
    paths = [Path("run/mail"), *Path("run/mail").rglob("*")]
    assert len(paths) == 6
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_what_a_handler_before_it_adds_is_stored_too(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def marks(message: MailRequest) -> None:
        message["X-Spam-Score"] = "5"

    salmon.handle(".*", marks)
    load(monkeypatch, "maildir")
    deliver()
    assert stored()["bob@example.org"][0].split(b"\n")[2:] == [
        *(b"X-Spam-Score: 5", b"Subject: x", b"", b"hello", b""),
    ]


def test_a_handler_before_it_may_refuse(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(message: MailRequest) -> None:
        raise SMTPError(550, "5.7.1 not you")

    salmon.handle(".*", refuses)
    load(monkeypatch, "maildir")
    assert deliver().code == 550
    assert not Path("run/mail").exists()


def test_mail_of_salmons_own_receiver_is_stored_as_well(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, "maildir")
    Router.deliver(MailRequest("peer", "Ann@example.net", "Bob@Example.org", HELLO.decode()))
    assert stored()["bob@example.org"] == [
        b"Return-Path: <ann@example.net>\nDelivered-To: bob@example.org\nSubject: x\n\nhello\n"
    ]


def test_a_first_line_that_is_no_header_does_not_become_a_part_of_the_envelope(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, "maildir")
    Router.deliver(MailRequest("peer", "ann@example.net", "bob@example.org", " eve@example.com\n"))
    assert stored()["bob@example.org"] == [
        b"Return-Path: <ann@example.net>\nDelivered-To: bob@example.org\n\n eve@example.com\n"
    ]


def test_a_handler_that_sends_a_message_elsewhere_makes_no_mailbox(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def readdresses(message: MailRequest) -> None:
        message.To = "eve@example.org"

    salmon.handle(".*", readdresses)
    load(monkeypatch, "maildir", mailboxes=["bob@example.org"])
    assert str(deliver()) == "550 5.1.1 no such mailbox here"


def test_a_handler_that_is_imported_again_goes_on(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, "maildir")
    monkeypatch.setattr(Router, "RELOAD", True)
    monkeypatch.setattr(Router, "HANDLERS", {"salmon_revsmtp.handlers.maildir": lambda *a: "key"})
    assert [deliver().code for _ in range(3)] == [250, 250, 250]
    assert len(stored()["bob@example.org"]) == 3


def test_the_maildirs_stay_where_they_are_when_a_handler_changes_the_folder(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load(monkeypatch, "maildir", maildirs="post")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    deliver()
    assert names(str(tmp_path / "post")) == ["bob@example.org"]


# -- what cannot be stored -------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "code"), [(errno.ENOSPC, "452 4.3.1"), (errno.EIO, "451 4.3.0")])
def test_what_cannot_be_synced_is_not_there(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, fault: int, code: str
) -> None:
    """Or it would be there twice when it is redelivered."""
    load(monkeypatch, "maildir")
    deliver()

    def fails(folder: Path) -> None:
        raise OSError(fault, "no")

    with monkeypatch.context() as broken:
        broken.setattr(maildir, "sync_folder", fails)
        reply = deliver()
    assert str(reply).startswith(code)
    assert len(stored()["bob@example.org"]) == 1
    assert len(queue.Queue("run/undeliverable")) == 0
    assert deliver().code == 250
    assert len(stored()["bob@example.org"]) == 2


def test_a_new_maildir_has_its_name_before_the_message(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder that was made is synced, or is synced the next time."""
    load(monkeypatch, "maildir", maildirs="deep/down/mail")
    synced: list[str] = []

    def fails(folder: Path) -> None:
        raise OSError(errno.EIO, "no")

    real = sync_folder

    def records(folder: Path) -> None:
        synced.append(str(folder.relative_to(salmon.folder)))
        real(folder)

    monkeypatch.setattr("salmon_revsmtp.handlers.mailboxes.sync_folder", fails)
    assert deliver().code == 451
    monkeypatch.setattr("salmon_revsmtp.handlers.mailboxes.sync_folder", records)
    assert [deliver().code, deliver().code] == [250, 250]
    assert synced == ["deep/down/mail/bob@example.org", "deep/down/mail"]
    deliver(recipient="ann@example.org")
    assert synced[2:] == ["deep/down/mail/ann@example.org", "deep/down/mail"]


def test_a_full_disk_is_said_and_leaves_no_litter(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = salmon.folder / "disk"
    place.mkdir()
    load(monkeypatch, "maildir", maildirs="disk/mail")
    with small_disk(place) as disk:
        assert deliver().code == 250
        disk.fill(4096)
        reply = deliver(HELLO + b"x" * 100_000)
        assert str(reply).startswith("452 4.3.1 ")
        assert list(place.glob("mail/*/tmp/*")) == []
        disk.empty()
        assert deliver().code == 250
        assert len(stored(str(place / "mail"))["bob@example.org"]) == 2


def test_a_file_in_the_way_defers(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(monkeypatch, "maildir")
    Path("run/mail").mkdir()
    Path("run/mail/bob@example.org").write_text("a file")
    assert str(deliver()).startswith("451 4.3.0 ")
    assert "bob@example.org recipient=<bob@example.org> not stored: " in caplog.text
    assert salmon.undeliverable() == []


# -- which addresses exist -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "code"),
    [
        *(("bob@example.org", 250), ("BOB@Example.ORG", 250), ('"bob"@example.org', 250)),
        *(("jos\u00e9@example.org", 250), ("jose\u0301@example.org", 250)),
        *(("sue@xn--bcher-kva.example", 250), ("sue@b\u00fccher.example", 250)),
        *(("postmaster", 250), ('"a b"@example.org', 250), ("x@[192.0.2.1]", 250)),
        # IDNA2008 only: Python knows no other spelling of it.
        *(("ed@xn--fa-hia.example", 250), ("ed@XN--fa-hia.example", 250)),
        ("ed@fass.example", 550),
        ("odd.(host)|.*@example.org", 250),
        *(
            ("bobb@example.org", 550),
            ("bob@example.com", 550),
            ("bob", 550),
            ("x@example.org", 550),
        ),
        # To Python's patterns these are letters of the same name in another case.
        *(("\u017fue@xn--bcher-kva.example", 550), ("bob@example.org.", 550)),
    ],
)
def test_only_these_mailboxes_exist(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, address: str, code: int
) -> None:
    Router.defaults(host="example")
    existing = ["Bob@example.org", "jos\u00e9@EXAMPLE.org", "sue@b\u00fccher.example", "postmaster"]
    existing += ['"a b"@example.org', '"odd.(host)|.*"@example.org', "x@[192.0.2.1]"]
    existing += ["ed@xn--fa-hia.example"]
    load(monkeypatch, "maildir", mailboxes=existing)
    Router.DEFAULT_CAPTURES.clear()
    quoted = '"odd.(host)|.*"@example.org' if address.startswith("odd") else address
    assert is_routed(quoted, wait=True) is (code == 250)
    assert deliver(recipient=quoted).code == 250, "or it is kept as undeliverable"
    assert len(salmon.undeliverable()) == (code != 250)


def test_an_unknown_mailbox_is_refused_before_any_data(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, "maildir", mailboxes=["bob@example.org"])

    async def main() -> None:
        async with (
            listener(salmon, unknown_recipients="refuse", domains=["example.org"]) as one,
            aiosmtplib.SMTP(hostname="127.0.0.1", port=one.port, start_tls=False) as client,
        ):
            await client.mail("ann@example.net")
            with pytest.raises(aiosmtplib.SMTPRecipientRefused) as refused:
                await client.rcpt("eve@example.org")
            assert refused.value.code == 550
            await client.rcpt("Bob@example.org")
            await client.data(b"Subject: x\r\n\r\nhello\r\n")

    asyncio.run(main())
    assert names() == ["bob@example.org"]


# -- what a Maildir is called ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "folder"),
    [
        ("bob@example.org", "bob@example.org"),
        ("Bob@EXAMPLE.org.", "bob@example.org"),
        ('"bob"@example.org', "bob@example.org"),
        ('"b\\ob"@example.org', "bob@example.org"),
        ("bob+list-x_y=z@example.org", "bob+list-x_y=z@example.org"),
        ("a/b@example.org", "a%2Fb@example.org"),
        ("../../etc@example.org", "%2E.%2F..%2Fetc@example.org"),
        (".hidden@example.org", "%2Ehidden@example.org"),
        ("-rf@example.org", "%2Drf@example.org"),
        ('"a b"@example.org', "a%20b@example.org"),
        ('"a@b"@example.org', "a%40b@example.org"),
        ('"a\\"b"@example.org', "a%22b@example.org"),
        ("50%25@example.org", "50%2525@example.org"),
        ("~root@example.org", "%7Eroot@example.org"),
        ("a\0b@example.org", "a%00b@example.org"),
        (
            "\u03b4\u03bf\u03ba\u03b9\u03bc\u03ae@example.org",
            "\u03b4\u03bf\u03ba\u03b9\u03bc\u03ae@example.org",
        ),
        ("JOSE\u0301@example.org", "jos\u00e9@example.org"),
        ("a\u202eb@example.org", "a%E2%80%AEb@example.org"),
        ("a\u2028b@example.org", "a%E2%80%A8b@example.org"),
        ("a\udcffb@example.org", "a%ED%B3%BFb@example.org"),
        ("bob@b\u00fccher.example", "bob@xn--bcher-kva.example"),
        ("bob@B\u00dcCHER.example", "bob@xn--bcher-kva.example"),
        ("bob@xn--BCHER-kva.example", "bob@xn--bcher-kva.example"),
        ("bob@[192.0.2.1]", "bob@%5B192.0.2.1%5D"),
        ("postmaster", "postmaster"),
        *(("new", "%6Eew"), ("cur", "%63ur"), ("tmp", "%74mp"), ("..", "%2E."), (".", "%2E")),
        ("new@example.org", "new@example.org"),
        ("", "%"),
    ],
)
def test_a_maildir_is_called_as_its_address(address: str, folder: str) -> None:
    assert Mailbox.of(address).folder == folder


def test_a_long_address_is_cut_and_has_a_digest() -> None:
    one, other = (Mailbox.of(f"{'x' * 299}{last}@example.org").folder for last in "ab")
    assert one != other
    assert one.startswith("x" * 170 + "~") and len(one) == 235
    slashes = Mailbox.of("/" * 300 + "@example.org").folder
    assert len(slashes.encode()) <= 240 and "%~" not in slashes and "%2~" not in slashes
    greek = Mailbox.of("\u03b4" * 300 + "@example.org").folder
    assert len(greek.encode()) <= 240


LOCAL = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=80)


@given(LOCAL, LOCAL)
@example("a", "a@")
@example("a%2F", "a/")
@example("A", "a")
@example("K", "\u212a")
def test_two_addresses_share_a_folder_only_if_they_are_one_mailbox(one: str, other: str) -> None:
    """And each name is one that a folder can have."""
    first, second = Mailbox.of(f"{one}@example.org"), Mailbox.of(f"{other}@example.org")
    assert (first.folder == second.folder) == (first == second)
    for name in (first.folder, second.folder):
        assert 0 < len(name.encode()) <= 255
        assert "/" not in name and "\0" not in name and name[0] not in ".-"
        assert name.isprintable()


@given(LOCAL)
def test_any_name_is_one_that_the_file_system_takes(
    tmp_path_factory: pytest.TempPathFactory, local: str
) -> None:
    place = tmp_path_factory.mktemp("mail") / Mailbox.of(f"{local}@example.org").folder
    place.mkdir()
    assert [one.name for one in place.parent.iterdir()] == [place.name]


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "settings", "words"),
    [
        ("maildir", {"maildirs": 17}, "maildirs: found 17, allowed: a folder"),
        ("maildir", {"maildirs": ""}, "maildirs: found '', allowed: a folder"),
        ("maildir", {"maildirs": "~no.one/x"}, "maildirs: found '~no.one/x' (Could not determine"),
        (
            "maildir",
            {"mailboxes": "bob@example.org"},
            "mailboxes: found a text, allowed",
        ),
        ("maildir", {"mailboxes": []}, "mailboxes: found a list (it is empty"),
        (
            "maildir",
            {"mailboxes": ["a:pw@b.org"]},
            "mailboxes: found '***@b.org' (that is no address",
        ),
        ("maildir", {"mailboxes": ["bob"]}, "mailboxes: found 'bob' (it has no domain)"),
        ("maildir", {"mailboxes": [17]}, "mailboxes: found 17 (that is no text)"),
        ("maildir", {"mailboxes": ["a b@example.org"]}, "mailboxes: found 'a b@example.org' ("),
        ("maildir", {"mailboxes": ["a@b..c"]}, "mailboxes: found 'a@b..c' ('b..c' is no domain"),
        (
            "lmtp",
            {},
            "lmtp_server: missing, allowed: 'host:port' such as '127.0.0.1:24', or 'unix:",
        ),
        (
            "lmtp",
            {"lmtp_server": "127.0.0.1"},
            "lmtp_server: found '127.0.0.1' (that is not a host",
        ),
        ("lmtp", {"lmtp_server": "unix:"}, "lmtp_server: found 'unix:' (that is no path)"),
        ("lmtp", {"lmtp_server": ":24"}, "lmtp_server: found ':24' (it has no host)"),
        ("lmtp", {"lmtp_server": 24}, "lmtp_server: found 24 (that is no text)"),
        ("smtp", {}, "smtp_server: missing, allowed: 'host:port' such as '127.0.0.1:25'"),
        ("smtp", {"smtp_server": "unix:/x"}, "smtp_server: found 'unix:/x' (that is not a host"),
        (
            "smtp",
            {"smtp_server": "mail..lan:25"},
            "smtp_server: found 'mail..lan:25' ('mail..lan' is no domain name",
        ),
        ("smtp", {"smtp_server": "mail.lan..:25"}, "smtp_server: found 'mail.lan..:25' ('mail.lan"),
        ("lmtp", {"lmtp_server": "[1:2]:24"}, "lmtp_server: found '[1:2]:24' ('1:2' is no domain"),
        ("smtp", {"smtp_server": "127.0.0.1:0"}, "smtp_server: found '127.0.0.1:0' (0 is no port"),
        (
            "smtp",
            {"smtp_server": "localhost:25", "smtp_services": {"mx": {"listen": ["0.0.0.0:25"]}}},
            "smtp_server: found 'localhost:25' (a service of this project listens there",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence_when_the_handler_is_imported(
    salmon: Salmon,
    monkeypatch: pytest.MonkeyPatch,
    handler: str,
    settings: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(SettingsError) as raised:
        load(monkeypatch, handler, **settings)
    [problem] = raised.value.problems
    assert problem.startswith(words)


# -- in a project ----------------------------------------------------------------------------------


def with_handlers(project: Project, port: int, handlers: str, **settings: object) -> None:
    """A project of ``salmon gen`` with another line for its handlers."""
    project.configure(isp(port))
    module = project.folder / "config/settings.py"
    text, before = module.read_text(), "handlers = ['app.handlers.sample']"
    assert before in text
    lines = [f"handlers = {handlers}", *(f"{key} = {value!r}" for key, value in settings.items())]
    lines.append(f"receiver_config = {{'host': '127.0.0.1', 'port': {free_port()}}}")
    module.write_text("\n".join([text.replace(before, ""), *lines, ""]))


def test_one_line_in_the_settings_has_a_project_keep_its_mail(project: Project) -> None:
    with provider(one_message, no_more_mail) as port:
        with_handlers(project, port, '["salmon_revsmtp.handlers.maildir"]')
        done = project.run("collect", "isp")
    assert done.returncode == 0, done.stderr
    assert "1 message" in done.stdout
    mail = stored(str(project.folder / "run/mail"))
    assert list(mail) == ["b@example.org"]
    [message] = mail["b@example.org"]
    assert message.startswith(b"Return-Path: <a@example.net>\nDelivered-To: b@example.org\n")
    assert message.endswith(MESSAGE.partition(b"\r\n\r\n")[2].replace(b"\r\n", b"\n"))


def test_another_line_hands_it_on_and_says_goodbye_at_the_end(project: Project) -> None:
    got = []

    def store(call: Call) -> None:
        call.greet()
        got.append(call.message())
        call.hear("QUIT")

    with provider(one_message, no_more_mail) as port, next_host(store) as server:
        with_handlers(project, port, '["salmon_revsmtp.handlers.lmtp"]', lmtp_server=server)
        done = project.run("collect", "isp")
    assert done.returncode == 0, done.stderr
    assert got[0].startswith(b"Received: from ")
    assert got[0].endswith(MESSAGE.partition(b"\r\n\r\n")[2].replace(b".", b"..", 1))


def test_check_says_what_is_wrong_with_a_handlers_setting(project: Project) -> None:
    with_handlers(project, 366, '["salmon_revsmtp.handlers.maildir"]', mailboxes=["bob"])
    done = project.run("check")
    assert done.returncode != 0
    assert "mailboxes: found 'bob' (it has no domain), allowed: a list of addresses" in done.stdout


def checked(project: Project, *options: str) -> dict[str, tuple[str, str]]:
    """What ``check`` says of each handler that it asks."""
    done = project.run("check", "--json", *options)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    found = {
        row["subject"]: (row["result"], row["text"]) for row in rows if row["check"] == "handler"
    }
    assert done.returncode == 1 or "failed" not in [result for result, _ in found.values()]
    return found


@pytest.mark.parametrize("kind", ["lmtp", "smtp"])
def test_check_calls_the_next_server(project: Project, kind: str) -> None:
    def answers(call: Call) -> None:
        call.greet(hello="LHLO" if kind == "lmtp" else "EHLO")
        call.hear("QUIT")

    def turns_away(call: Call) -> None:
        call.say("554 5.7.1 not for you")
        call.silence()

    module = f"salmon_revsmtp.handlers.{kind}"
    with next_host(answers, turns_away) as server:
        with_handlers(project, 1, f'["{module}"]', **{f"{kind}_server": server})
        assert checked(project, "--offline") == {
            module: ("skipped", "not tried, as --offline says")
        }
        assert checked(project) == {module: ("ok", f"{kind}_server={server} answers")}
        result, text = checked(project)[module]
        assert result == "failed" and "554 5.7.1 not for you" in text
    assert checked(project)[module] == (
        "failed",
        f"{kind}_server={server} Connection refused; until that is mended, it takes no mail",
    )


def test_check_tries_the_folder_of_the_maildirs(project: Project) -> None:
    module = "salmon_revsmtp.handlers.maildir"
    with_handlers(project, 1, f'["{module}"]', maildirs="mail/boxes")
    folder = project.folder / "mail/boxes"
    well = f"{folder}: not there yet, it is made when it is needed"
    assert checked(project, "--offline") == {module: ("ok", well)}
    folder.parent.write_text("in the way")
    result, text = checked(project, "--offline")[module]
    assert result == "failed"
    assert text.startswith(f"{folder.parent} cannot be written: Not a directory; it is no folder;")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 'the database answers'", ("ok", "the database answers")),
        ("return None", ("skipped", "it has tried nothing")),
        (
            "raise RuntimeError('no database')",
            ("failed", "no database; until that is mended, it takes no mail"),
        ),
        ("raise KeyError", ("failed", "KeyError; until that is mended, it takes no mail")),
    ],
)
def test_check_asks_any_handler_that_has_a_check(
    project: Project, body: str, expected: tuple[str, str]
) -> None:
    (project.folder / "app/handlers/orders.py").write_text(
        f"def check_handler(network):\n    assert network\n    {body}\n"
    )
    handlers = '["app.handlers.sample", "app.handlers.orders", "app.handlers.not_there"]'
    with_handlers(project, 1, handlers)
    assert checked(project) == {"app.handlers.orders": expected}
