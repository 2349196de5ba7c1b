"""The provider's rules: who may log in, what is given up and when, and what senders are told."""

from __future__ import annotations

import asyncio
import email
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.collecting import collect
from support.configuration import PASSWORD, agent_keys
from support.holding import Holding, NoHooks, account
from support.messages import MESSAGE
from support.salmon import Salmon

from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.rates import RateLimit
from salmon_revsmtp.delivery.reporter import Reporter
from salmon_revsmtp.journal.connection import JournalConnection
from salmon_revsmtp.journal.counts import CountJournal
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.provider import logins, server, settling
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.expiry import Expiry
from salmon_revsmtp.provider.logins import LoginGuard
from salmon_revsmtp.provider.notices import Notices
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sasl import Secret
from salmon_revsmtp.smtp.verifier import SHA_256, Verifier

VERIFIER = str(Secret("acme", PASSWORD).verifier(SHA_256))


# -- logins ----------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_wrong_password_takes_longer_and_then_the_network_is_shut_out() -> None:
    clock = Clock()
    guard = LoginGuard(clock)
    delays = [guard.failed("192.0.2.1", "acme", "PLAIN") for _ in range(logins.MOST - 1)]
    assert delays == sorted(delays) and delays[0] < 1 and delays[-1] == logins.LONGEST_DELAY
    assert guard.refusal("192.0.2.1") is None
    guard.failed("192.0.2.1", "acme", "PLAIN")
    refusal = guard.refusal("192.0.2.1")
    assert refusal is not None and refusal.code == 421
    assert guard.refusal("192.0.2.2") is None
    clock.now += logins.WINDOW + 1
    assert guard.refusal("192.0.2.1") is None
    assert guard.failed("192.0.2.1", "acme", "PLAIN") == logins.FIRST_DELAY


def test_of_ipv6_a_network_is_shut_out_and_mapped_addresses_are_ipv4() -> None:
    guard = LoginGuard(Clock())
    for number in range(logins.MOST):
        guard.failed(f"2001:db8::{number:x}", "acme", "PLAIN")
        guard.failed("::ffff:192.0.2.1", "acme", "PLAIN")
    assert guard.refusal("2001:db8::ffff") is not None
    assert guard.refusal("2001:db8:0:1::1") is None
    assert guard.refusal("192.0.2.1") is not None


def test_what_is_remembered_of_failures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins, "NETWORKS", 100)
    guard = LoginGuard(Clock())
    for number in range(1000):
        guard.failed(f"192.0.{number // 256}.{number % 256}", "acme", "PLAIN")
    assert len(guard._failures) == 100


def test_who_is_shut_out_hears_421_and_others_log_in(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logins, "MOST", 2)
    monkeypatch.setattr(logins, "FIRST_DELAY", 0.01)

    async def main() -> list[Outcome]:
        held = Holding(salmon.folder / "provider")
        async with held.provider() as provider:
            keys = agent_keys(provider.port, server="127.0.0.1")
            wrong = {**keys, "password": "wrong", "auth": ["CRAM-MD5"]}
            return [(await collect(salmon, one))[0].outcome for one in (keys, wrong, wrong, keys)]

    assert asyncio.run(main()) == [
        Outcome.NO_MAIL,
        Outcome.REFUSED,
        Outcome.DEFERRED,
        Outcome.DEFERRED,
    ]


@pytest.mark.parametrize("auth", ["SCRAM-SHA-256", "PLAIN", "LOGIN"])
def test_a_verifier_lets_in_who_has_the_password(salmon: Salmon, auth: str) -> None:
    from support.tls import CERTIFICATE

    async def main() -> None:
        held = Holding(salmon.folder / "provider", account(password=VERIFIER))
        async with held.provider(tls="starttls", needs_tls=True) as provider:
            keys = agent_keys(provider.port, tls="starttls", ca_file=str(CERTIFICATE), auth=[auth])
            [report] = await collect(salmon, keys)
            assert (report.outcome, report.auth) == (Outcome.NO_MAIL, auth)
            [report] = await collect(salmon, {**keys, "password": "wrong"})
            assert report.outcome is Outcome.REFUSED

    asyncio.run(main())


def test_a_verifier_cannot_do_what_needs_the_password() -> None:
    both = Accounts([account(password=VERIFIER), account("other", domains=["example.com"])])
    assert "CRAM-MD5" in both.mechanisms(tls=False)
    assert Accounts([account(password=VERIFIER)]).mechanisms(tls=False) == ("SCRAM-SHA-256",)


def test_a_verifier_is_what_it_is_written_as() -> None:
    parsed = Verifier.parse(VERIFIER)
    assert parsed is not None and str(parsed) == VERIFIER
    assert Verifier.parse("hunter2") is None
    for broken in ("SCRAM-SHA-256$", "SCRAM-SHA-256$1:AA==$AA==:AA==", f"{VERIFIER}x"):
        with pytest.raises(ValueError, match=r"\w"):
            Verifier.parse(broken)


def test_a_name_that_there_is_not_looks_like_one_that_there_is() -> None:
    accounts = Accounts([account(), account("off", domains=["example.com"], enabled=False)])
    for name in ("nobody", "off"):
        secret = accounts.secret(name)
        first, again = secret.verifier(SHA_256), accounts.secret(name).verifier(SHA_256)
        assert first.salt == again.salt and first.iterations == 4096
        assert not secret.is_password(PASSWORD.encode())
    assert accounts.secret("acme").is_password(PASSWORD.encode())


def test_auth_and_atrn_need_tls_where_there_is_a_certificate(salmon: Salmon) -> None:
    async def main() -> list[str]:
        held = Holding(salmon.folder / "provider")
        async with held.provider(tls="starttls", needs_tls=True) as provider:
            reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
            writer.write(b"EHLO x\r\nAUTH CRAM-MD5\r\nATRN\r\nQUIT\r\n")
            heard = (await asyncio.wait_for(reader.read(), 60)).decode()
            writer.close()
            return heard.splitlines()

    heard = asyncio.run(main())
    assert not any("AUTH" in line for line in heard if line.startswith("250"))
    assert [line[:3] for line in heard[-3:]] == ["530", "530", "221"]


# -- what is given up ------------------------------------------------------------------------------


class Owner:
    """An account's mail, a clock, and the notifications that wait for the relay."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.held = Holding(folder / "hold", account(**keys))
        self.now = self.held.store.now()
        self.held.store.now = lambda: self.now  # type: ignore[method-assign]
        self.told: list[tuple[str, Message]] = []
        rates = RateLimit(CountJournal(JournalConnection(folder / "journal")))
        outbox: Any = SimpleNamespace(put=self._put, send_soon=lambda: None)
        self.notices = Notices(Reporter(lambda: "mx.example.net", rates), outbox)
        self.expiry = self.new_expiry()
        self.full = False

    def new_expiry(self) -> Expiry:
        return Expiry(self.held.accounts, self.held.store, self.notices, NoHooks())

    def _put(self, to: str, message: bytes) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.told.append((to, email.message_from_bytes(message)))

    def put(self, sender: str = "ann@example.net", data: bytes = MESSAGE) -> int:
        return self.held.put(Envelope(sender, ("b@example.org",)), data)

    def after(self, hours: float) -> None:
        self.now += hours * 3600
        self.expiry.check()


def status(message: Message) -> str:
    [part] = [one for one in message.walk() if one.get_content_type() == "message/delivery-status"]
    return part.as_string()


def test_what_no_one_collects_goes_back_to_its_sender(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    owner = Owner(tmp_path, hold_days=2)
    owner.put()
    owner.after(47)
    assert (len(owner.held), owner.told) == (1, [])
    owner.after(2)
    assert len(owner.held) == 0
    [(to, message)] = owner.told
    assert to == "ann@example.net"
    assert "Action: failed" in status(message) and "Status: 5.4.7" in status(message)
    assert "held for 2 days, given up" in caplog.text


@pytest.mark.parametrize(
    ("sender", "data"),
    [("", MESSAGE), ("ann@example.net", b"Auto-Submitted: auto-replied\r\n" + MESSAGE)],
)
def test_no_one_is_told_of_a_bounce_or_of_what_a_machine_has_sent(
    tmp_path: Path, sender: str, data: bytes
) -> None:
    owner = Owner(tmp_path, hold_days=2, warn_hours=1)
    owner.put(sender, data)
    owner.after(2)
    owner.after(48)
    assert (len(owner.held), owner.told) == (0, [])


def test_what_waits_for_long_is_told_of_once(tmp_path: Path) -> None:
    owner = Owner(tmp_path, warn_hours=4)
    owner.put()
    owner.after(3)
    assert owner.told == []
    owner.after(2)
    owner.after(5)
    owner.expiry = owner.new_expiry()  # as after a restart
    owner.after(5)
    [(_, message)] = owner.told
    assert "Action: delayed" in status(message) and "Will-Retry-Until:" in status(message)
    assert len(owner.held) == 1


def test_what_cannot_be_told_on_a_full_disk_is_not_given_up(tmp_path: Path) -> None:
    owner = Owner(tmp_path, hold_days=1)
    owner.put()
    owner.full = True
    owner.after(25)
    assert len(owner.held) == 1
    owner.full = False
    owner.after(0)
    assert (len(owner.held), len(owner.told)) == (0, 1)


def test_a_message_in_a_file_goes_back_as_its_header(tmp_path: Path) -> None:
    owner = Owner(tmp_path, hold_days=1)
    owner.put(data=b"Subject: large\r\n\r\n" + b"x" * 70 + b"\r\n" * 200_000)
    owner.after(25)
    [(_, message)] = owner.told
    assert "Subject: large" in message.as_string()
    assert len(message.as_string()) < 5000


def test_the_owner_hears_who_has_not_called_for_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        held = Holding(tmp_path / "hold")
        held.put(Envelope("", ("b@example.org",)), MESSAGE)
        async with held.provider() as provider:
            provider.name_the_unseen()
            assert "has not called" not in caplog.text
            monkeypatch.setattr(server, "UNSEEN", 0.0)
            provider.name_the_unseen()
            assert "account=acme messages=1" in caplog.text
            assert caplog.text.count("has not called") == 1

    asyncio.run(main())


def test_a_refusal_is_told_with_what_the_customer_said(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    envelope = Envelope("ann@example.net", ("b@example.org",))
    reply = Reply(550, "5.1.1 no such user")
    assert owner.notices.refused(envelope, {"b@example.org": reply}, MESSAGE) is None
    [(_, message)] = owner.told
    assert "Status: 5.1.1" in status(message) and "no such user" in status(message)
    owner.full = True
    failure = owner.notices.refused(envelope, {"b@example.org": reply}, MESSAGE)
    assert failure is not None and failure.code == 452


def test_outbox_is_where_they_wait(salmon: Salmon) -> None:
    """The real one, and the relay."""
    outbox = Outbox(lambda: salmon.relay, salmon.folder / "unsent")
    rates = RateLimit(CountJournal(JournalConnection(salmon.folder / "journal")))
    notices = Notices(Reporter(lambda: "mx.example.net", rates), outbox)
    refused: dict[str, Reply] = {"b@example.org": Reply(550, "no")}
    told: Callable[..., Reply | None] = notices.refused
    assert told(Envelope("ann@example.net", ("b@example.org",)), refused, MESSAGE) is None
    outbox.wait(60)
    [(sender, to, text)] = salmon.relayed
    assert (sender, to) == ("<>", "ann@example.net")
    assert "Action: failed" in text


def test_a_message_whose_file_is_lost_is_told_of_and_keeps_no_other_back(tmp_path: Path) -> None:
    owner = Owner(tmp_path, hold_days=1)
    owner.put("ann@example.net", b"Subject: large\r\n\r\n" + b"x" * 70 + b"\r\n" * 200_000)
    owner.put("bob@example.net")
    for file in (tmp_path / "hold/bodies").iterdir():
        file.unlink()
    owner.after(25)
    assert sorted(to for to, _ in owner.told) == ["ann@example.net", "bob@example.net"]
    assert len(owner.held) == 0


def test_an_answer_is_settled_although_there_was_no_thread_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "RETRY", 0.01)
    held = Holding(tmp_path / "hold")
    held.put(Envelope("", ("b@example.org",)), MESSAGE)
    [one] = held.waiting()
    tries = 0
    in_a_thread = asyncio.to_thread

    async def none_to_spare(*work: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise RuntimeError("can't start new thread")
        return await in_a_thread(*work)

    monkeypatch.setattr(asyncio, "to_thread", none_to_spare)

    async def main() -> None:
        settler = settling.Settler(held.store, held.notify, NoHooks())
        settler.settle(settling.Answered(one, [Reply(250, "ok")]))
        await settler.finish(20)

    asyncio.run(main())
    assert (tries, len(held)) == (2, 0)
