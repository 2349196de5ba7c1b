"""Collections from a real Exim as the provider."""

from __future__ import annotations

import asyncio
import logging
import smtplib
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.collecting import collect
from support.configuration import DEFAULT, agent_keys
from support.salmon import Salmon, fails
from support.servers import ACCOUNTS, Exim, EximOfThePage
from support.tls import CERTIFICATE, PRIVATE_KEY

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.delivery.trace import unpack_undeliverable
from salmon_revsmtp.demo.samples import Sample, samples
from salmon_revsmtp.net.outcome import Outcome

pytestmark = pytest.mark.interop

DOMAINS = ["example.org", "example.com"]


@pytest.fixture
def root(chroot: Callable[[str], Path]) -> Path:
    return chroot("exim")


@pytest.fixture
def exim(root: Path) -> Iterator[Exim]:
    with Exim(root) as running:
        yield running


@pytest.fixture
def exim_with_tls(root: Path) -> Iterator[Exim]:
    with Exim(root, CERTIFICATE, PRIVATE_KEY, as_we_advise=True) as running:
        yield running


@pytest.fixture
def of_the_page(root: Path) -> Iterator[EximOfThePage]:
    with EximOfThePage(root, CERTIFICATE, PRIVATE_KEY) as running:
        yield running


def collected(salmon: Salmon, exim: Exim, **keys: object) -> Report:
    tls = {"tls": "none", "domains": DOMAINS, "password": ACCOUNTS["acme"], "timeout": 30}
    [report] = asyncio.run(
        collect(salmon, agent_keys(exim.port, **{"server": "127.0.0.1", **tls, **keys}))
    )
    return report


def collected_by_the_page(
    salmon: Salmon, exim: EximOfThePage, delivery: object = "router", **keys: object
) -> Report:
    given = {
        "server": "localhost",
        "tls": "starttls",
        "ca_file": str(CERTIFICATE),
        "domains": DOMAINS,
        "password": ACCOUNTS["acme"],
        **keys,
    }
    service = {**DEFAULT, "delivery": delivery}
    [report] = asyncio.run(collect(salmon, agent_keys(exim.odmr, **given), default=service))
    return report


def submit(exim: Exim | EximOfThePage, held: list[Sample]) -> None:
    for sample in held:
        options = [
            f"{key}={value}" if value else key
            for key, value in sample.envelope.mail_options.items()
        ]
        exim.submit(sample.envelope.reverse_path, sample.envelope.recipients, sample.data, options)
    assert exim.waiting() == len(held)


def arrived(salmon: Salmon) -> list[tuple[str, bytes]]:
    """Recipient and message without our Received, of everything that came."""
    found = [(one.To, one.Data.split(b"\n", 4)[4]) for one in salmon.handled]
    for one in salmon.undeliverable():
        envelope, _, message = unpack_undeliverable(one)
        found.append((envelope.recipients[0], message.split(b"\n", 4)[4]))
    return sorted(found)


def expected(held: list[Sample]) -> list[tuple[str, bytes]]:
    return sorted(
        (recipient, sample.data.replace(b"\r\n", b"\n").removesuffix(b"\n"))
        for sample in held
        for recipient in sample.envelope.recipients
    )


def downconverted(one: tuple[str, bytes]) -> tuple[str, bytes]:
    """In the clear Exim 4.100.1 uses none of our extensions on a reversed connection, so it
    rewrites a UTF-8 mailbox to what an old server would take."""
    recipient, message = one
    return recipient.replace("δοκιμή@", "xn--jxalpdlp@"), message


def test_every_sample_once_and_octet_for_octet_with_cram_md5(salmon: Salmon, exim: Exim) -> None:
    salmon.handle(".*")
    held = samples()
    submit(exim, held)
    report = collected(salmon, exim)
    assert report.outcome is Outcome.COLLECTED, (report, exim.log())
    assert (report.auth, report.tls, report.messages) == ("CRAM-MD5", None, len(held))
    assert arrived(salmon) == sorted(map(downconverted, expected(held)))
    assert exim.waiting() == 0
    assert collected(salmon, exim).outcome is Outcome.NO_MAIL


def test_every_sample_once_and_octet_for_octet_under_starttls_with_plain(
    salmon: Salmon, exim_with_tls: Exim
) -> None:
    exim = exim_with_tls
    salmon.handle(".*")
    held = samples()
    submit(exim, held)
    report = collected(salmon, exim, tls="starttls", ca_file=str(CERTIFICATE))
    assert report.outcome is Outcome.COLLECTED, (report, exim.log())
    assert (report.auth, report.messages) == ("PLAIN", len(held))
    assert report.tls is not None
    assert arrived(salmon) == expected(held)
    assert exim.waiting() == 0


def test_as_we_advise_each_session_has_a_message_and_ends_with_quit(
    salmon: Salmon, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is sent twice, and no session breaks off."""
    salmon.handle(".*")
    with (
        Exim(root, CERTIFICATE, PRIVATE_KEY, as_we_advise=True) as exim,
        caplog.at_level(logging.INFO, "salmon_revsmtp.customer"),
        caplog.at_level(logging.DEBUG, "salmon_revsmtp.dialogue"),
    ):
        for number in range(8):
            exim.submit("a@example.net", ["b@example.org"], b"Subject: m%d\r\n\r\nx\r\n" % number)
        report = collected(salmon, exim, tls="starttls", ca_file=str(CERTIFICATE))
        assert report.outcome is Outcome.COLLECTED, (report, exim.log())
        # One more where Exim's last session was not quite over, and had its next message locked.
        again = sum("calling again" in record.getMessage() for record in caplog.records)
        assert (report.messages, report.sessions) == (8, 9 + again)
        assert exim.waiting() == 0
    said = [one.getMessage() for one in caplog.records]
    assert sum("provider: MAIL FROM" in line for line in said) == 8
    assert sum("221 2.0.0 mail.example.org closing" in line for line in said) == 8


def test_an_empty_queue(salmon: Salmon, exim: Exim) -> None:
    report = collected(salmon, exim)
    assert (report.outcome, report.sessions, report.error) == (Outcome.NO_MAIL, 1, None)


def test_a_wrong_password(salmon: Salmon, exim: Exim) -> None:
    report = collected(salmon, exim, password="wrong")
    assert (report.outcome, report.sessions) == (Outcome.REFUSED, 0)
    assert report.error is not None and "535" in report.error


def test_a_domain_of_somebody_else(salmon: Salmon, exim: Exim) -> None:
    report = collected(salmon, exim, domains=["example.net"])
    assert report.outcome in (Outcome.REFUSED, Outcome.DEFERRED)


def test_one_of_several_domains(salmon: Salmon, exim: Exim) -> None:
    salmon.handle(".*")
    exim.submit("a@example.net", ["b@example.org"], b"Subject: org\r\n\r\nx\r\n")
    exim.submit("a@example.net", ["b@example.com"], b"Subject: com\r\n\r\nx\r\n")
    report = collected(salmon, exim, domains=["example.com"])
    assert (report.outcome, report.messages) == (Outcome.COLLECTED, 1), exim.log()
    assert [message.To for message in salmon.handled] == ["b@example.com"]
    assert exim.waiting() == 1


def test_an_untrusted_certificate(salmon: Salmon, exim_with_tls: Exim) -> None:
    report = collected(salmon, exim_with_tls, tls="starttls")
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "ca_file" in report.error


def test_the_configuration_of_the_page_holds_mail_until_its_customer_asks(
    salmon: Salmon, of_the_page: EximOfThePage
) -> None:
    exim = of_the_page
    salmon.handle(".*")
    held = samples()
    submit(exim, held)
    exim.run_queue()
    assert exim.waiting() == len(held)
    report = collected_by_the_page(salmon, exim)
    assert report.outcome is Outcome.COLLECTED, (report, exim.log())
    assert (report.auth, report.messages) == ("PLAIN", len(held))
    assert report.tls is not None
    assert arrived(salmon) == expected(held)
    assert exim.waiting() == 0
    assert collected_by_the_page(salmon, exim).outcome is Outcome.NO_MAIL


def test_the_configuration_of_the_page_gives_mail_to_its_customer_only(
    salmon: Salmon, of_the_page: EximOfThePage
) -> None:
    exim = of_the_page
    exim.submit("a@example.net", ["b@example.org"], b"Subject: org\r\n\r\nx\r\n")
    wrong: list[dict[str, object]] = [
        {"password": "wrong"},
        {"account": "no-one"},
        {"domains": ["example.org", "example.net"]},
    ]
    for keys in wrong:
        report = collected_by_the_page(salmon, exim, **keys)
        assert report.outcome in (Outcome.REFUSED, Outcome.DEFERRED), (keys, report)
    for name, password in (("idle", ""), ("no-one", ""), ("", "")):  # idle has no password
        with smtplib.SMTP("localhost", exim.odmr) as client:
            client.starttls(context=ssl.create_default_context(cafile=str(CERTIFICATE)))
            with pytest.raises(smtplib.SMTPAuthenticationError):
                client.login(name, password)
    for port in (exim.port, exim.odmr):
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.ehlo("stranger.example.net")
            assert not client.has_extn("auth")
            assert client.has_extn("atrn") is (port == exim.odmr)
            assert client.docmd("ATRN example.org")[0] >= 500
            client.mail("a@example.net")
            assert client.rcpt("b@example.net")[0] == 550
            assert client.rcpt("b@example.org")[0] == (250 if port == exim.port else 550)
    assert (exim.waiting(), salmon.handled) == (1, [])


def test_a_message_that_we_defer_keeps_back_those_after_it(
    salmon: Salmon, of_the_page: EximOfThePage
) -> None:
    """A session has one message, and Exim begins each with the oldest one, due or not."""
    exim = of_the_page
    salmon.handle("later@.*", fails(451, "4.2.1 later"))
    salmon.handle("yes@.*")
    for name in ("later", "yes"):
        exim.submit("a@example.net", [f"{name}@example.org"], b"Subject: x\r\n\r\nx\r\n")
    for _ in range(2):
        report = collected_by_the_page(salmon, exim)
        assert (report.outcome, report.messages) == (Outcome.FAILED, 0), exim.log()
        exim.wait_until_idle()
    assert exim.waiting() == 2
    # In queue mode what handlers say is between the queue and them.
    report = collected_by_the_page(salmon, exim, delivery="queue")
    assert (report.outcome, report.messages) == (Outcome.COLLECTED, 2), exim.log()
    assert exim.waiting() == 0
