"""An agent that knows its provider by the fingerprint of its certificate."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.collecting import collect
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue, Script, scripted
from support.project import Project, isp, provider
from support.salmon import Salmon
from support.tls import CERTIFICATE, server_tls

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.net.certificate import fingerprint
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.net.pinned import described
from salmon_revsmtp.settings import SettingsError

NOW = datetime.datetime.now(datetime.timezone.utc)
YEAR = datetime.timedelta(days=365)

OTHER = "sha256:" + 32 * "ab"


def der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(
        pem.decode().partition("-----END")[0] + "-----END CERTIFICATE-----"
    )


def its_own() -> str:
    """The fingerprint of the certificate that the scripted provider shows."""
    return fingerprint(der(CERTIFICATE.read_bytes()))


def server(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def under_starttls(context: ssl.SSLContext, *then: str) -> Script:
    """STARTTLS, and then each of these replies to one command of the client's."""

    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr.example.net")
        await provider.asks("EHLO", "250-odmr.example.net", "250 STARTTLS")
        await provider.asks("STARTTLS", "220 go ahead")
        await provider.starttls(context)
        await provider.asks("EHLO", "250-odmr.example.net", "250-AUTH PLAIN", "250 ATRN")
        await provider.asks("AUTH PLAIN", "235 welcome")
        await provider.asks("EHLO", "250-odmr.example.net", "250 ATRN")
        for reply in then:
            await provider.asks("", reply)

    return script


def hears_nothing(context: ssl.SSLContext) -> Script:
    """STARTTLS, after which not a word may come."""

    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr.example.net")
        await provider.asks("EHLO", "250-odmr.example.net", "250 STARTTLS")
        await provider.asks("STARTTLS", "220 go ahead")
        try:
            await provider.starttls(context)
            assert await provider.reader.read() == b""
        except (ConnectionError, ssl.SSLError):
            pass

    return script


@pytest.fixture(autouse=True)
def quiet_asyncio() -> Iterator[None]:
    log = logging.getLogger("asyncio")
    level, log.level = log.level, logging.CRITICAL
    yield
    log.level = level


def collected(
    salmon: Salmon, *scripts: Script, implicit: ssl.SSLContext | None = None, **keys: Any
) -> Report:
    async def main() -> Report:
        async with scripted(*scripts, tls=implicit) as port:
            [report] = await collect(salmon, agent_keys(port, **keys))
        return report

    return asyncio.run(main())


@pytest.mark.parametrize("spell", [str, str.upper, "colons"])
def test_the_one_certificate_is_trusted_with_the_password(salmon: Salmon, spell: Any) -> None:
    """Self-signed, without any CA; PLAIN is for those who are verified only."""
    named = its_own()
    if spell == "colons":
        digits = named.removeprefix("sha256:").upper()
        named = "sha256:" + ":".join(digits[at : at + 2] for at in range(0, 64, 2))
    else:
        named = spell(named)
    script = under_starttls(server_tls(), "453 no mail", "221 bye")
    report = collected(salmon, script, tls="starttls", fingerprint=named)
    assert (report.outcome, report.auth, report.error) == (Outcome.NO_MAIL, "PLAIN", None)


@pytest.mark.parametrize("fault", ["expired", "not yet", "another name", "no name"])
def test_neither_names_nor_dates_matter(salmon: Salmon, fault: str) -> None:
    ca = trustme.CA()
    certificate = {
        "expired": ca.issue_cert("localhost", not_before=NOW - 2 * YEAR, not_after=NOW - YEAR),
        "not yet": ca.issue_cert("localhost", not_before=NOW + YEAR, not_after=NOW + 2 * YEAR),
        "another name": ca.issue_cert("odmr.example.com"),
        "no name": ca.issue_cert(common_name="nothing that is a name"),
    }[fault]
    named = fingerprint(der(certificate.cert_chain_pems[0].bytes()))
    script = under_starttls(server(certificate), "453 no mail", "221 bye")
    report = collected(salmon, script, tls="starttls", fingerprint=named)
    assert (report.outcome, report.error) == (Outcome.NO_MAIL, None)


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_another_certificate_hears_not_a_word(salmon: Salmon, tls: str) -> None:
    """Not one of the same name, and not one that the machine would trust."""
    certificate = trustme.CA().issue_cert("localhost", common_name="mx.example.net")
    context = server(certificate)
    scripts = [hears_nothing(context)] if tls == "starttls" else []
    implicit = context if tls == "implicit" else None
    report = collected(salmon, *scripts, implicit=implicit, tls=tls, fingerprint=OTHER)
    assert (report.outcome, report.sessions, report.auth) == (Outcome.FAILED, 0, None)
    has = fingerprint(der(certificate.cert_chain_pems[0].bytes()))
    assert report.error is not None
    for words in (
        f"it has {has} (for mx.example.net, its end date is ",
        f"and {OTHER} is expected; if the provider has renewed its certificate, ask it",
    ):
        assert words in report.error


def test_a_fingerprint_is_not_enough_where_tls_was_stripped(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr.example.net")
        await provider.asks("EHLO", "250-odmr.example.net", "250 AUTH PLAIN")
        await provider.left()

    report = collected(salmon, script, tls="starttls", fingerprint=its_own())
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "offers no STARTTLS" in report.error


def test_the_same_by_etrn(salmon: Salmon) -> None:
    keys: dict[str, Any] = {"protocol": "etrn", "tls": "starttls", "fingerprint": OTHER}
    report = collected(salmon, hears_nothing(server_tls()), **keys)
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and f"it has {its_own()}" in report.error


# -- check -----------------------------------------------------------------------------------------


def test_check_shows_the_fingerprint_that_the_server_has(project: Project) -> None:
    script = under_starttls(server_tls(), "221 bye")
    with provider(script, script) as port:
        project.configure(isp(port, tls="'starttls'", fingerprint=repr(its_own())))
        done = project.run("check", "isp")
        row = json.loads(project.run("check", "isp", "--json").stdout)
    assert done.returncode == 0
    assert f"its certificate has the fingerprint {its_own()}\n" in done.stdout
    assert (row["outcome"], row["fingerprint"], row["problems"]) == (None, its_own(), [])


def test_check_says_which_certificate_is_there_instead(project: Project) -> None:
    script = hears_nothing(server_tls())
    with provider(script, script) as port:
        project.configure(isp(port, tls="'starttls'", fingerprint=repr(OTHER)))
        done = project.run("check", "isp")
        row = json.loads(project.run("check", "isp", "--json").stdout)
    assert (done.returncode, row["outcome"], row["fingerprint"]) == (1, "failed", its_own())
    for words in (its_own(), OTHER, "its end date is ", "ask it for the new fingerprint"):
        assert words in done.stdout and words in row["error"]


def test_check_shows_the_fingerprint_of_a_certificate_that_no_ca_vouches_for(
    project: Project,
) -> None:
    scripts = 2 * [hears_nothing(server_tls()), hears_nothing(server_tls())]
    with provider(*scripts) as port:
        project.configure(isp(port, tls="'starttls'"))
        done = project.run("check", "isp")
        row = json.loads(project.run("check", "isp", "--json").stdout)
    assert (done.returncode, row["outcome"], row["fingerprint"]) == (1, "failed", its_own())
    assert f"the certificate has the fingerprint {its_own()} (" in done.stdout
    assert "if the provider says that this is its own, you may set fingerprint" in done.stdout


# -- settings --------------------------------------------------------------------------------------


def problem(**keys: Any) -> str:
    with pytest.raises(SettingsError) as raised:
        configuration(agent_keys(366, **keys))
    [sentence] = raised.value.problems
    return sentence


@pytest.mark.parametrize(
    "value",
    [
        *(
            "",
            "sha256:",
            "ab" * 32,
            "sha1:" + "ab" * 20,
            OTHER + "ab",
            OTHER[:-1],
            OTHER[:-1] + "g",
        ),
        *("sha256:ab:" + "ab" * 31, "sha256:" + ":".join("ab" * 32), OTHER + "\n" + OTHER, 17),
    ],
)
def test_what_is_no_fingerprint(value: object) -> None:
    sentence = problem(tls="starttls", fingerprint=value)
    assert sentence.startswith('agent "isp": fingerprint: found ')
    assert "allowed: 'sha256:' and 64 hexadecimal digits" in sentence


@pytest.mark.parametrize("tls", ["opportunistic", "none"])
def test_a_fingerprint_that_would_not_be_looked_at(tls: str) -> None:
    assert f"tls {tls!r} verifies no certificate" in problem(tls=tls, fingerprint=OTHER)


def test_either_a_fingerprint_or_a_ca() -> None:
    sentence = problem(tls="starttls", fingerprint=OTHER, ca_file=str(CERTIFICATE))
    assert "ca_file is set, too" in sentence


# -- what is in a certificate ----------------------------------------------------------------------


def test_what_a_certificate_says_of_itself_is_harmless(tmp_path: Path) -> None:
    made = trustme.CA().issue_cert(
        common_name="a\x1b[2J\nb" + 50 * "x", not_after=NOW.replace(year=2050, month=7, day=9)
    )
    text = described(der(made.cert_chain_pems[0].bytes()))
    assert text.startswith("for a?[2J?b") and text.endswith("its end date is 2050-07-09")


def test_what_is_no_certificate_is_described_by_nothing() -> None:
    whole = der(CERTIFICATE.read_bytes())
    assert described(whole)
    for broken in (b"", b"\x30", b"\x30\x80", whole[:-1], b"\x30\x00", whole[4:], 50 * b"\xff"):
        assert described(broken) == ""
