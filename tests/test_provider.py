"""The built-in provider: what a customer hears, and what becomes of the mail that it holds."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ssl
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest
from salmon.mail import MailRequest
from salmon.server import SMTPError
from support.collecting import collect
from support.configuration import PASSWORD, agent_keys
from support.dialogue import Dialogue
from support.holding import Holding, account
from support.messages import MESSAGE
from support.salmon import Salmon
from support.tls import CERTIFICATE

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.demo.samples import samples
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.provider import connection, logins
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.provider.settings import AccountSettings
from salmon_revsmtp.smtp import sasl
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply, ReplyParser
from salmon_revsmtp.smtp.turn import AtrnRequest, LoggedIn, LoginFailed, Quit, StartTls, Turn
from salmon_revsmtp.smtp.verifier import Verifier

ACME = account(domains=["example.org", "example.com"])
OTHER = account("other", "another one", ["example.net"])
OK = Reply(250, "ok")


def mail(*recipients: str) -> Envelope:
    return Envelope("a@example.net", recipients)


# -- before the reversal -----------------------------------------------------------------------


class Customer:
    """Speaks to a session that has no connection."""

    def __init__(self, **options: bool) -> None:
        self.session = Turn("odmr", Accounts([ACME, OTHER]), **options)
        self.events: list[object] = []
        self.replies = self._heard()
        assert [reply.code for reply in self.replies] == [220]

    def _heard(self) -> list[Reply]:
        parser = ReplyParser()
        parser.receive_bytes(self.session.data_to_send())
        heard = []
        while reply := parser.next_reply():
            heard.append(reply)
        return heard

    def say(self, *lines: str) -> list[int]:
        data = "".join(f"{line}\r\n" for line in lines).encode()
        events = self.session.receive_bytes(data)
        while events:
            self.events += events
            if isinstance(events[-1], LoginFailed):
                self.session.refuse_login()
            events = self.session.advance()
        self.replies = self._heard()
        return [reply.code for reply in self.replies]

    def log_in(self, account: AccountSettings = ACME) -> None:
        assert self.say("EHLO x") == [250]
        assert self.say("AUTH CRAM-MD5") == [334]
        challenge = base64.b64decode(self.replies[0].text)
        digest = hmac.new(
            account.password.get_secret_value().encode(), challenge, hashlib.md5
        ).hexdigest()
        assert self.say(base64.b64encode(f"{account.name} {digest}".encode()).decode()) == [235]


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_passwords_are_made_ready_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a provider is started again all its customers call at once."""
    made: list[bool] = []
    ready = threading.Event()
    derive = sasl._verifier

    def noted(*arguments: Any) -> Verifier:
        made.append(threading.current_thread() is threading.main_thread())
        found = derive(*arguments)
        if len(made) == 2:
            ready.set()
        return found

    monkeypatch.setattr(sasl, "_verifier", noted)
    holding = Holding(tmp_path / "hold", ACME, OTHER)

    async def main() -> None:
        async with holding.provider():
            assert await asyncio.to_thread(ready.wait, 60)

    asyncio.run(main())
    holding.close()
    session = Turn("odmr", holding.accounts)
    first = encoded("n,,n=acme,r=abcdefgh")
    session.receive_bytes(f"EHLO x\r\nAUTH SCRAM-SHA-256 {first}\r\n".encode())
    assert b"334 " in session.data_to_send()
    assert made == [False, False]


def test_ehlo_offers_passwords_under_tls_only() -> None:
    for tls in (False, True):
        customer = Customer(tls=tls, starttls=True)
        customer.say("EHLO x")
        words = customer.replies[0].text
        assert "ATRN" in words
        assert "AUTH SCRAM-SHA-256 SCRAM-SHA-1 CRAM-MD5" in words
        assert (("PLAIN" in words), ("STARTTLS" in words)) == (tls, not tls)
    assert Customer().say("EHLO x", "AUTH PLAIN " + encoded("\0acme\0x")) == [250, 504]


@pytest.mark.parametrize(
    ("lines", "codes"),
    [
        (["AUTH PLAIN " + encoded(f"\0acme\0{PASSWORD}")], [235]),
        (["AUTH PLAIN", encoded(f"\0acme\0{PASSWORD}")], [334, 235]),
        (["AUTH PLAIN", encoded("\0acme\0wrong")], [334, 535]),
        (["AUTH PLAIN =", "QUIT"], [535, 221]),
        (["AUTH LOGIN", encoded("acme"), encoded(PASSWORD)], [334, 334, 235]),
        (["AUTH LOGIN " + encoded("nobody"), encoded(PASSWORD)], [334, 535]),
        (["AUTH CRAM-MD5", "*"], [334, 501]),
        (["AUTH CRAM-MD5", "no base64!"], [334, 501]),
        (["AUTH CRAM-MD5 " + encoded("acme 00")], [501]),  # RFC 4954 4: the server is first
        (["AUTH CRAM-MD5 ="], [501]),
        (["AUTH PLAIN " + encoded(f"acme\0acme\0{PASSWORD}")], [235]),
        (["AUTH PLAIN " + encoded(f"other\0acme\0{PASSWORD}")], [535]),
        (["AUTH PLAIN " + encoded(f"\0acme\0{PASSWORD}") + " "], [235]),
        (["AUTH PLAIN " + encoded(f"\0acme\0{PASSWORD}") + "\n"], [500]),
        (["AUTH PLAIN", "x" * 20000], [334, 500]),
        (["AUTH"], [501]),
        (["AUTH CRAM-MD5", encoded("acme 00")], [334, 535]),
        (["AUTH SCRAM-SHA-256 " + encoded("nonsense")], [535]),
        (["AUTH GSSAPI"], [504]),
        (["AUTH PLAIN !"], [501]),
    ],
)
def test_logins(lines: list[str], codes: list[int]) -> None:
    customer = Customer(tls=True)
    customer.say("EHLO x")
    assert customer.say(*lines) == codes


def test_three_wrong_passwords_are_enough() -> None:
    customer = Customer(tls=True)
    customer.say("EHLO x")
    wrong = "AUTH PLAIN " + encoded("\0acme\0wrong")
    assert customer.say(wrong, wrong, wrong, "NOOP") == [535, 535, 421]
    assert customer.events == [LoginFailed("acme", "PLAIN")] * 3 + [
        Quit(Reply(421, "too many failed logins, closing", "4.7.0"))
    ]


def test_atrn_needs_a_login_and_ones_own_domains() -> None:
    customer = Customer()
    assert customer.say("EHLO x", "ATRN example.org") == [250, 530]
    customer = Customer()
    customer.log_in()
    assert customer.say("ATRN example.net", "ATRN example.org,example.net", "ATRN a..b") == [
        450,
        450,
        501,
    ]
    assert customer.say("ATRN Example.ORG") == []
    assert customer.events == [
        LoggedIn("acme", "CRAM-MD5"),
        AtrnRequest("acme", ("example.org",)),
    ]
    customer.session.answer(Reply(453, "no mail"))
    assert customer.say("ATRN") == [453]
    assert customer.events[-1] == AtrnRequest("acme", ACME.domains)


def test_everything_else_is_not_done_here() -> None:
    customer = Customer()
    assert customer.say("MAIL FROM:<>", "FOO", "NOOP", "RSET", "QUIT") == [502, 500, 250, 250, 221]


def test_commands_with_too_much_or_too_little() -> None:
    customer = Customer(starttls=True)
    assert customer.say("HELO", "EHLO", "EHLO x", "STARTTLS now") == [501, 501, 250, 501]
    customer.log_in()
    assert customer.say("ATRN \nexample.org", "ATRN example.org\x1f") == [500, 500]
    assert customer.events == [LoggedIn("acme", "CRAM-MD5")]


def test_bytes_behind_starttls_are_never_read() -> None:
    customer = Customer(starttls=True)
    assert customer.say("EHLO x", "STARTTLS", "EHLO evil") == [250, 421]
    customer = Customer(starttls=True)
    assert customer.say("EHLO x", "STARTTLS") == [250, 220]
    assert customer.events == [StartTls()]
    assert customer.say("EHLO evil") == []
    assert customer.session.pending


def test_a_login_before_tls_is_forgotten() -> None:
    customer = Customer(starttls=True)
    customer.log_in()
    assert customer.say("STARTTLS") == [220]
    customer.session.tls_started()
    assert customer.say("EHLO x", "ATRN") == [250, 530]


def test_nothing_is_kept_of_what_comes_after_the_end() -> None:
    customer = Customer()
    assert customer.say("QUIT", "NOOP") == [221]
    assert customer.say("x" * 1000) == []
    assert not customer.session.pending


def test_an_endless_line_is_not_kept() -> None:
    customer = Customer()
    for _ in range(10):
        assert customer.session.receive_bytes(b"x" * 100_000) == []
    assert customer.say("", "QUIT") == [500, 221]


def test_what_brings_nothing_ends() -> None:
    customer = Customer()
    codes = customer.say(*["NOOP"] * 1000)
    assert codes == [250] * (len(codes) - 1) + [421] and len(codes) < 200


# -- with a customer ---------------------------------------------------------------------------


Work = Callable[[Holding, Provider], Awaitable[Any]]


def with_provider(tmp_path: Path, work: Work, keepalive: float = 60, **options: Any) -> Holding:
    held = Holding(tmp_path / "provider", ACME, OTHER, keepalive=keepalive)

    async def main() -> None:
        async with held.provider(**options) as provider:
            await work(held, provider)

    asyncio.run(main())
    return held


@pytest.mark.parametrize("tls", ["none", "starttls", "implicit"])
def test_every_sample_arrives_once_as_it_was(salmon: Salmon, tmp_path: Path, tls: str) -> None:
    salmon.handle(".*")
    sent = samples()
    reports: list[Report] = []

    async def work(held: Holding, provider: Provider) -> None:
        for sample in sent:
            held.put(sample.envelope, sample.data)
        keys = agent_keys(provider.port, tls=tls, server="127.0.0.1")
        keys.update(domains=["example.org", "example.com"])
        if tls != "none":
            keys.update(ca_file=str(CERTIFICATE))
        reports.extend(await collect(salmon, keys))
        reports.extend(await collect(salmon, keys))

    queue = with_provider(tmp_path, work, tls=tls)
    first, second = reports
    assert (first.outcome, second.outcome) == (Outcome.COLLECTED, Outcome.NO_MAIL)
    assert first.messages == len(sent)
    assert (first.tls is None, first.auth) == (tls == "none", "SCRAM-SHA-256")
    assert len(queue) == 0
    # One of them never gets past Salmon's parser.
    arrived = [message.Data.split(b"\n", 4)[4] for message in salmon.handled]
    arrived += [one.split(b"\n", 7)[7] for one in salmon.undeliverable()]
    expected = [
        sample.data.replace(b"\r\n", b"\n").removesuffix(b"\n")
        for sample in sent
        for _ in sample.envelope.recipients
    ]
    assert sorted(arrived) == sorted(expected)


def test_what_is_deferred_stays_and_of_what_is_refused_the_sender_is_told(
    salmon: Salmon, tmp_path: Path
) -> None:
    def later(message: MailRequest) -> None:
        raise SMTPError(451, "later")

    def never(message: MailRequest) -> None:
        raise SMTPError(550, "never")

    salmon.handle("good@.*")
    salmon.handle("later@.*", later)
    salmon.handle("never@.*", never)
    reports: list[Report] = []

    async def work(held: Holding, provider: Provider) -> None:
        everyone = [f"{name}@example.org" for name in ("good", "later", "never")]
        held.put(mail(*everyone), MESSAGE)
        reports.extend(await collect(salmon, agent_keys(provider.port)))
        reports.extend(await collect(salmon, agent_keys(provider.port)))

    held = with_provider(tmp_path, work)
    [left] = held.waiting()
    assert left.envelope.recipients == ("later@example.org",)
    assert held.data(left.key) == MESSAGE
    assert left.reason == "the customer says 451 4.0.0 later"
    [(sender, refused)] = held.told
    assert (sender, list(refused)) == ("a@example.net", ["never@example.org"])
    assert str(refused["never@example.org"]) == "550 5.0.0 never"
    assert [message.To for message in salmon.handled].count("good@example.org") == 1
    assert [report.outcome for report in reports] == [Outcome.COLLECTED, Outcome.FAILED]
    assert reports[1].error is not None and "451 later" in reports[1].error


def test_a_wrong_password_and_other_peoples_domains(salmon: Salmon, tmp_path: Path) -> None:
    reports: list[Report] = []

    async def work(held: Holding, provider: Provider) -> None:
        held.put(mail("x@example.net"), MESSAGE)
        wrong = agent_keys(provider.port, password="wrong")
        foreign = agent_keys(provider.port, domains=["example.net"])
        reports.extend(await collect(salmon, wrong))
        reports.extend(await collect(salmon, foreign))

    queue = with_provider(tmp_path, work)
    assert [report.outcome for report in reports] == [Outcome.REFUSED, Outcome.DEFERRED]
    assert len(queue) == 1


def test_a_customer_that_breaks_off_leaves_the_mail(tmp_path: Path) -> None:
    async def work(held: Holding, provider: Provider) -> None:
        held.put(mail("a@example.org"), MESSAGE)
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=provider.port, start_tls=False)
        await client.connect()
        await client.login("acme", PASSWORD)
        # aiosmtplib is a stranger to ATRN, and to what comes after it.
        answer = await client.execute_command(b"ATRN")
        assert answer.code == 250
        client.close()

    assert len(with_provider(tmp_path, work)) == 1


def test_the_newest_session_gets_the_mail_that_an_older_one_has_and_does_not_take(
    salmon: Salmon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is dead and does not know it must not keep the mail from its owner."""
    salmon.handle(".*")
    monkeypatch.setattr(connection, "REPLACED_GRACE", 0.1)
    reports: list[Report] = []

    async def work(held: Holding, provider: Provider) -> None:
        held.put(mail("a@example.org"), MESSAGE)
        dead = aiosmtplib.SMTP(hostname="127.0.0.1", port=provider.port, start_tls=False)
        await dead.connect()
        await dead.login("acme", PASSWORD)
        assert (await dead.execute_command(b"ATRN")).code == 250
        reports.extend(await collect(salmon, agent_keys(provider.port)))
        dead.close()

    held = with_provider(tmp_path, work)
    assert (reports[0].outcome, reports[0].messages) == (Outcome.COLLECTED, 1)
    assert len(held) == 0


def test_what_a_customer_says_while_it_waits_for_an_answer_fills_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logins, "FIRST_DELAY", 3600.0)
    monkeypatch.setattr(logins, "LONGEST_DELAY", 3600.0)

    async def work(held: Holding, provider: Provider) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
        writer.write(b"EHLO x\r\nAUTH CRAM-MD5\r\n")
        challenge = b""
        while not challenge.startswith(b"334 "):
            challenge = await reader.readline()
        writer.write(encoded("acme 00").encode() + b"\r\n")
        with pytest.raises((asyncio.TimeoutError, TimeoutError)):
            for _ in range(64):  # MiB; that is more than the system keeps on the way
                writer.write(b"x" * 2**20)
                await asyncio.wait_for(writer.drain(), 1)
        writer.transport.abort()

    with_provider(tmp_path, work)


async def reversed_roles(
    provider: Provider,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A customer's connection after the reversal, on which the provider may send."""
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    customer = Dialogue(reader, writer)
    await customer.replied(220)
    customer.say("EHLO x", "AUTH CRAM-MD5")
    await customer.replied(250)
    challenge = base64.b64decode((await customer.hear("334 "))[4:])
    digest = hmac.new(PASSWORD.encode(), challenge, hashlib.md5).hexdigest()
    customer.say(encoded(f"acme {digest}"), "ATRN")
    await customer.replied(235)
    await customer.replied(250)
    customer.say("220 customer")
    await customer.asks("EHLO", "250-customer", "250-PIPELINING", "250 CHUNKING")
    return reader, writer


@pytest.mark.parametrize("answered", [0, 1, 7, 20])
@pytest.mark.parametrize("last", ["", "421 4.3.2 closing\r\n"])
def test_of_messages_under_way_exactly_the_answered_are_gone(
    tmp_path: Path, answered: int, last: str
) -> None:
    async def work(held: Holding, provider: Provider) -> None:
        keys = [held.put(mail(f"{number}@example.org"), b"x") for number in range(20)]
        reader, writer = await reversed_roles(provider)
        heard = b""
        while heard.count(b" LAST\r\nx\r\n") < len(keys):  # all of them, unanswered
            heard += await asyncio.wait_for(reader.read(65536), 60)
        # MAIL, RCPT, BDAT, and RSET before the next.
        said = "250 ok\r\n" * (4 * answered + 1) + last
        writer.write(said.encode())
        writer.write_eof()
        while await asyncio.wait_for(reader.read(65536), 60):
            pass
        writer.close()
        left.extend(keys[answered:])

    left: list[int] = []
    assert [one.key for one in with_provider(tmp_path, work).waiting()] == left


def test_a_silent_customer_is_left(tmp_path: Path) -> None:
    async def work(held: Holding, provider: Provider) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
        writer.write(b"NOOP\r\n")
        assert await asyncio.wait_for(reader.read(), 60) != b"", "it closed before its greeting"
        writer.close()

    with_provider(tmp_path, work, timeout=0.2)


def test_a_tls_handshake_that_fails_takes_no_place(
    tmp_path: Path,
) -> None:

    async def work(held: Holding, provider: Provider) -> None:
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
            writer.write(b"EHLO plain\r\n" * 10)
            await asyncio.wait_for(reader.read(), 60)
            writer.close()
        context = ssl.create_default_context(cafile=str(CERTIFICATE))
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", provider.port, ssl=context, server_hostname="localhost"
        )
        assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"220 ")
        writer.close()

    with_provider(tmp_path, work, tls="implicit", max_sessions=1)


def test_the_dialogue_shows_no_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "salmon_revsmtp.dialogue")
    secret = encoded(f"\0acme\0{PASSWORD}")

    async def work(held: Holding, provider: Provider) -> None:
        context = ssl.create_default_context(cafile=str(CERTIFICATE))
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", provider.port, ssl=context, server_hostname="localhost"
        )
        customer = Dialogue(reader, writer)
        await customer.replied(220)
        customer.say("EHLO x", f"AUTH PLAIN {secret}")
        await customer.replied(250)
        await customer.replied(235)
        customer.say(f"AUTH PLAIN {secret}")  # out of order, and no less secret
        await customer.replied(503)
        writer.close()

    with_provider(tmp_path, work, tls="implicit", max_sessions=1)
    assert "235 2.7.0 welcome" in caplog.text
    assert secret not in caplog.text and PASSWORD not in caplog.text
