"""Collections by ODMR, as dialogues with a provider that follows a script (RFC 2645)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.collecting import collect, collect_from
from support.configuration import PASSWORD, agent_keys, configuration
from support.dialogue import Dialogue, Script, no_more_mail, scripted
from support.messages import MESSAGE
from support.salmon import Salmon, waits_for
from support.tls import CERTIFICATE, server_tls

from salmon_revsmtp import hookimpl
from salmon_revsmtp.customer.collection import Collection
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector


def test_a_collection_from_greeting_to_453(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def first(provider: Dialogue) -> None:
        provider.say("220 odmr.example.net ready")
        await provider.asks("EHLO mail.example.org", "250-odmr", "250-AUTH CRAM-MD5", "250 ATRN")
        await provider.asks("AUTH CRAM-MD5", "334 " + base64.b64encode(b"<17@odmr>").decode())
        answer = base64.b64decode(await provider.hear()).decode()
        digest = hmac.new(PASSWORD.encode(), b"<17@odmr>", hashlib.md5).hexdigest()
        assert answer == f"acme {digest}"
        provider.say("235 welcome")
        await provider.asks("EHLO mail.example.org", "250-odmr", "250-AUTH CRAM-MD5", "250 ATRN")
        assert await provider.hear() == "ATRN example.org,example.com"
        provider.say("250 OK now reversing the connection")
        assert (await provider.replied(220)).startswith("220 mail.example.org ")
        provider.say("EHLO odmr.example.net")
        await provider.replied(250)
        assert (await provider.send(MESSAGE)).startswith("250 2.")
        await provider.quit()

    report = collect_from(salmon, first, no_more_mail, domains=["example.org", "Example.COM."])
    assert report.outcome is Outcome.COLLECTED
    assert (report.messages, report.recipients, report.bytes) == (1, 1, len(MESSAGE))
    assert (report.sessions, report.refused, report.tls, report.auth) == (2, 0, None, "CRAM-MD5")
    assert report.error is None
    [message] = salmon.handled
    assert message.Peer[0] == "127.0.0.1"
    assert (message.From, message.To) == ("a@example.net", "b@example.org")
    trace, _, rest = message.Data.partition(b"\nFrom: ")
    assert rest == b"Ann <ann@example.net>\nTo: list@example.net\nSubject: hi\n\n.hello"
    trace = b" ".join(trace.split())
    assert trace.startswith(b"Received: from odmr.example.net ([127.0.0.1]) by mail.example.org")
    assert b"agent isp) with ESMTPA id " in trace


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("450 ATRN request refused", Outcome.DEFERRED),
        ("451 unable to process ATRN now", Outcome.DEFERRED),
        ("453 you have no mail", Outcome.NO_MAIL),
        ("500 what?", Outcome.REFUSED),
        ("502 not implemented", Outcome.REFUSED),
        ("530 authentication required", Outcome.REFUSED),
        ("550 not your domain", Outcome.REFUSED),
        ("421 closing", Outcome.DEFERRED),
        ("354 go on", Outcome.FAILED),
        ("welcome", Outcome.FAILED),
    ],
)
def test_each_answer_to_atrn_has_its_outcome(salmon: Salmon, answer: str, outcome: Outcome) -> None:
    async def script(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        await provider.asks("ATRN example.org", answer)

    report = collect_from(salmon, script)
    assert report.outcome is outcome
    if outcome is not Outcome.NO_MAIL:
        assert report.error is not None and answer.split()[-1] in report.error
    assert salmon.handled == []


def test_a_provider_that_does_not_list_atrn_is_tried(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH CRAM-MD5")
        await provider.asks("AUTH", "334 PDFAeD4=")
        await provider.asks("", "235 welcome")
        await provider.asks("EHLO", "250 odmr")
        await provider.asks("ATRN", "502 not here")

    report = collect_from(salmon, script)
    assert report.outcome is Outcome.REFUSED
    assert report.error is not None and "502 not here" in report.error


def test_no_domains_ask_for_the_providers_default(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def script(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        assert await provider.hear() == "ATRN"
        provider.say("453 no mail")

    async def main() -> Report:
        async with scripted(script) as port:
            keys = agent_keys(port, domains=[])
            [report] = await collect(salmon, keys, default={"domains": ["example.org"]})
        return report

    assert asyncio.run(main()).outcome is Outcome.NO_MAIL


def test_domains_go_out_in_idna_and_parameters_as_they_are(salmon: Salmon) -> None:
    async def idna(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        assert await provider.hear() == "ATRN xn--mller-kva.example,xn--jxalpdlp.example"
        provider.say("453 no mail")

    async def verbatim(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        assert await provider.hear() == "ATRN #queue  7"
        provider.say("453 no mail")

    report = collect_from(salmon, idna, domains=["Müller.example", "δοκιμή.example"])
    assert report.outcome is Outcome.NO_MAIL
    report = collect_from(salmon, verbatim, parameters="#queue  7")
    assert report.outcome is Outcome.NO_MAIL


@pytest.mark.parametrize(("code", "outcome"), [(535, Outcome.REFUSED), (454, Outcome.DEFERRED)])
def test_a_login_that_fails(salmon: Salmon, code: int, outcome: Outcome) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH SCRAM-SHA-1")
        await provider.asks("AUTH SCRAM-SHA-1", f"{code} no")

    report = collect_from(salmon, script)
    assert report.outcome is outcome
    assert report.error is not None and "acme" in report.error and f"{code} no" in report.error
    assert report.sessions == 0


def test_a_mechanism_that_the_provider_does_not_do_after_all(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH PLAIN CRAM-MD5 SCRAM-SHA-256")
        await provider.asks("AUTH SCRAM-SHA-256", "504 not really")
        await provider.asks("AUTH CRAM-MD5", "334 PDFAeD4=")
        await provider.asks("", "235 welcome")
        await provider.asks("EHLO", "250 odmr")
        await provider.asks("ATRN", "453 no mail")

    report = collect_from(salmon, script)
    assert (report.outcome, report.auth) == (Outcome.NO_MAIL, "CRAM-MD5")


@pytest.mark.parametrize(
    "lines",
    [
        ["AUTH CRAM-MD5 PLAIN", "AUTH=LOGIN"],
        ["AUTH=LOGIN", "AUTH CRAM-MD5"],
        ["AUTH PLAIN", "AUTH CRAM-MD5", "AUTH LOGIN"],
        ["AUTH CRAM-MD5", "AUTH"],
        ["AUTH=CRAM-MD5", "AUTH=PLAIN"],
        ["AUTH\tCRAM-MD5"],
        ["auth\tplain\tcram-md5"],
        ["AUTH = CRAM-MD5"],
        ["Auth=PLAIN\tCRAM-MD5 "],
        ["AUTH  LOGIN \t CRAM-MD5"],
    ],
)
def test_every_mechanism_that_a_server_names_counts(salmon: Salmon, lines: list[str]) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", *(f"250-{line}" for line in lines), "250 HELP")
        await provider.asks("AUTH CRAM-MD5", "334 PDFAeD4=")
        await provider.asks("", "235 welcome")
        await provider.asks("EHLO", "250 odmr")
        await provider.asks("ATRN", "453 no mail")

    report = collect_from(salmon, script)
    assert (report.outcome, report.auth) == (Outcome.NO_MAIL, "CRAM-MD5")


def refuses(*mechanisms: str, offers: str, takes: str = "") -> Script:
    """A provider that answers 535 to these mechanisms, which come in this order."""

    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", f"250 AUTH {offers}")
        for mechanism in (*mechanisms, *([takes] if takes else [])):
            heard = await provider.hear(f"AUTH {mechanism}")
            if mechanism == "CRAM-MD5":
                provider.say("334 PDFAeD4=")
                await provider.hear()
            assert PASSWORD not in heard
            provider.say("235 welcome" if mechanism == takes else "535 5.7.8 no")
        if takes:
            await provider.asks("EHLO", "250 odmr")
            await provider.asks("ATRN", "453 no mail")
        await provider.left()

    return script


@pytest.mark.parametrize(
    ("refused", "takes", "offers"),
    [
        ("CRAM-MD5", "PLAIN", "CRAM-MD5 PLAIN"),
        ("CRAM-MD5", "LOGIN", "LOGIN CRAM-MD5"),
        ("SCRAM-SHA-256", "PLAIN", "SCRAM-SHA-256 CRAM-MD5 PLAIN LOGIN"),
        ("SCRAM-SHA-256", "CRAM-MD5", "SCRAM-SHA-256 CRAM-MD5"),
        ("PLAIN", "LOGIN", "PLAIN LOGIN"),
    ],
)
def test_one_other_mechanism_is_tried_after_a_refusal(
    salmon: Salmon, refused: str, takes: str, offers: str, caplog: pytest.LogCaptureFixture
) -> None:
    script = refuses(refused, offers=offers, takes=takes)
    report = collect_from(salmon, script, tls="implicit", ca_file=str(CERTIFICATE))
    assert (report.outcome, report.auth) == (Outcome.NO_MAIL, takes)
    assert f"set auth to ['{takes}']" in caplog.text


def test_a_collection_makes_no_more_than_two_wrong_tries(salmon: Salmon) -> None:
    script = refuses("SCRAM-SHA-256", "PLAIN", offers="SCRAM-SHA-256 SCRAM-SHA-1 PLAIN LOGIN")
    report = collect_from(salmon, script, tls="implicit", ca_file=str(CERTIFICATE))
    assert report.outcome is Outcome.REFUSED
    assert report.error is not None and "with PLAIN it said 535" in report.error
    assert "check account and password" in report.error


def test_a_provider_that_breaks_off_after_a_wrong_try_has_refused(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH CRAM-MD5 SCRAM-SHA-1")
        await provider.asks("AUTH SCRAM-SHA-1", "535 no")

    report = collect_from(salmon, script)
    assert report.outcome is Outcome.REFUSED
    assert report.error is not None and "535 no" in report.error


def test_the_mechanism_that_worked_is_the_first_in_the_next_session(salmon: Salmon) -> None:
    """Else every session of a collection would make a wrong try."""
    salmon.handle(".*")

    async def first(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH SCRAM-SHA-1 CRAM-MD5")
        await provider.asks("AUTH SCRAM-SHA-1", "535 no")
        await provider.asks("AUTH CRAM-MD5", "334 PDFAeD4=")
        await provider.asks("", "235 welcome")
        await provider.asks("EHLO", "250 odmr")
        await provider.asks("ATRN", "250 reversing")
        await provider.replied(220)
        provider.say("EHLO odmr")
        await provider.replied(250)
        assert (await provider.send(MESSAGE)).startswith("250")
        await provider.quit()

    second = refuses(offers="SCRAM-SHA-1 CRAM-MD5", takes="CRAM-MD5")
    assert collect_from(salmon, first, second).outcome is Outcome.COLLECTED


@pytest.mark.parametrize(
    ("auth", "used"), [(["PLAIN", "CRAM-MD5"], "PLAIN"), (["cram-md5"], "CRAM-MD5")]
)
def test_auth_names_the_mechanisms_in_their_order(
    salmon: Salmon, auth: list[str], used: str
) -> None:
    script = refuses(offers="SCRAM-SHA-256 CRAM-MD5 PLAIN", takes=used)
    report = collect_from(salmon, script, tls="implicit", ca_file=str(CERTIFICATE), auth=auth)
    assert (report.outcome, report.auth) == (Outcome.NO_MAIL, used)


def test_auth_that_the_provider_does_not_offer(salmon: Salmon) -> None:
    report = collect_from(salmon, refuses(offers="CRAM-MD5"), auth=["SCRAM-SHA-256"])
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "auth allows SCRAM-SHA-256 only" in report.error


@pytest.mark.parametrize("answer", ["504 need fully-qualified hostname", "501 syntax", "550 who?"])
def test_a_name_that_the_provider_does_not_take_names_the_key(salmon: Salmon, answer: str) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", answer)
        await provider.left()

    report = collect_from(salmon, script)
    assert report.outcome is Outcome.REFUSED
    assert report.error is not None and answer in report.error
    assert "name 'mail.example.org', set hostname of the service" in report.error


@pytest.mark.parametrize("server", ["localhost.", "[127.0.0.1]", "LOCALHOST"])
def test_a_certificate_is_for_the_server_however_it_is_written(salmon: Salmon, server: str) -> None:
    keys: dict[str, Any] = {"server": server, "tls": "implicit", "ca_file": str(CERTIFICATE)}
    assert collect_from(salmon, no_more_mail, **keys).outcome is Outcome.NO_MAIL


def test_domains_that_one_command_cannot_hold_are_asked_for_in_several_sessions(
    salmon: Salmon,
) -> None:
    salmon.handle(".*")
    domains = [f"a-rather-long-name-number-{number}.example.org" for number in range(40)]
    asked: list[str] = []

    async def empty(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        line = await provider.hear("ATRN ")
        assert len(line) <= 510
        asked.extend(line.removeprefix("ATRN ").split(","))
        provider.say("453 no mail")
        await provider.left()

    async def mail(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE, f"b@{domains[39]}")).startswith("250")
        await provider.quit()

    report = collect_from(salmon, empty, empty, empty, mail, empty, domains=domains)
    assert (report.outcome, report.messages, report.sessions) == (Outcome.COLLECTED, 1, 5)
    assert asked == domains


@pytest.mark.parametrize("password", ["\N{KEY} and door", "\u0627x", "\N{SOFT HYPHEN}"])
@pytest.mark.parametrize("offers", ["SCRAM-SHA-256 CRAM-MD5", "SCRAM-SHA-256 PLAIN"])
def test_a_password_that_scram_cannot_be_done_with_goes_another_way(
    salmon: Salmon, password: str, offers: str
) -> None:
    script = refuses(offers=offers, takes=offers.split()[1])
    keys: dict[str, Any] = {"tls": "implicit", "ca_file": str(CERTIFICATE), "password": password}
    assert collect_from(salmon, script, **keys).outcome is Outcome.NO_MAIL


def test_a_password_that_scram_cannot_be_done_with_names_the_key(salmon: Salmon) -> None:
    report = collect_from(salmon, refuses(offers="SCRAM-SHA-256"), password="\N{KEY} and door")
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "change password" in report.error
    assert "RFC 4013" in report.error and "door" not in report.error


@pytest.mark.parametrize(
    ("tls", "greeting", "words"),
    [
        ("starttls", b"", ["no greeting in 0.4 seconds", "set tls to 'implicit'", "check port"]),
        ("implicit", b"", ["no greeting in 0.4 seconds", "set tls to 'starttls'", "check port"]),
        ("starttls", b"\x15\x03\x01\x00\x02\x02\n", ["speaks TLS", "set tls to 'implicit'"]),
        ("starttls", b"HTTP/1.1 400 Bad Request\r\n\r\n", ["a web server: check port"]),
    ],
)
def test_a_port_of_another_service_names_the_key(
    salmon: Salmon, tls: str, greeting: bytes, words: list[str]
) -> None:
    async def script(provider: Dialogue) -> None:
        provider.writer.write(greeting)
        await provider.ignore()

    trust = str(CERTIFICATE)
    report = collect_from(salmon, script, tls=tls, timeout=0.4, ca_file=trust)
    assert report.outcome is Outcome.FAILED and report.error is not None
    for word in words:
        assert word in report.error


WORDS = "acme-7;Hunter2 example.org,x9"


@pytest.mark.parametrize("protocol", ["odmr", "etrn"])
@pytest.mark.parametrize(
    "answer",
    [
        f"550 no {WORDS}",
        "550 hunter2 HUNTER2? and x9.",
        "450 [Hunter2] aHunter2b",
        f"550 {base64.b64encode(b'Hunter2').decode()}",
        "Hunter2 is no reply",
        "354 Hunter2",
        "250 Hunter2\r\n220 Hunter2",
        "",
    ],
)
def test_words_of_parameters_are_hidden_unless_they_are_domains(
    salmon: Salmon, protocol: str, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(provider: Dialogue) -> None:
        ehlo = ("250-odmr Hunter2", "250-AUTH CRAM-MD5", "250-ETRN", "250-X-HUNTER2", "250 X x9")
        provider.say("220 odmr Hunter2")
        await provider.asks("EHLO", *ehlo)
        await provider.asks("AUTH CRAM-MD5", "334 PDFAeD4=")
        await provider.asks("", "235 welcome Hunter2")
        await provider.asks("EHLO", *ehlo)
        assert (await provider.hear()).endswith(f"TRN {WORDS}")
        if answer:
            provider.say(answer)

    caplog.set_level(logging.DEBUG)
    report = collect_from(salmon, script, protocol=protocol, parameters=WORDS)
    said = f"{report} {report.summary()} {json.dumps(report.as_dict())}"
    for text in (said, caplog.text):
        for secret in ("hunter2", "x9", "acme-7", "SHVudGVyMg"):
            assert secret.lower() not in text.lower()
    if answer.startswith("550 no"):
        assert "***;*** example.org,***" in said and "***;*** example.org,***" in caplog.text


@pytest.mark.parametrize("protocol", ["odmr", "etrn"])
def test_a_word_of_parameters_that_is_a_keyword_of_smtp_breaks_nothing(
    salmon: Salmon, protocol: str
) -> None:
    async def script(provider: Dialogue) -> None:
        await logged_in(provider)
        await provider.asks("EHLO", "250-odmr", "250 ETRN")
        await provider.asks("ATRN" if protocol == "odmr" else "ETRN", "453 no")
        await provider.left()

    words = "CRAM-MD5 AUTH ETRN 250"
    report = collect_from(salmon, script, protocol=protocol, parameters=words)
    assert (report.sessions, report.auth) == (1, "CRAM-MD5")


STEPS = {
    "greeting": ["220 odmr"],
    "EHLO": ["250-odmr", "250-AUTH CRAM-MD5", "250 STARTTLS"],
    "STARTTLS": ["220 go ahead"],
}


@pytest.mark.parametrize(
    ("tls", "step", "answer"),
    [
        ("none", "greeting", "554 no"),
        ("none", "greeting", "450 later"),
        ("none", "EHLO", "554 no"),
        ("none", "EHLO", "450 later"),
        ("starttls", "STARTTLS", "454 TLS not available"),
        ("starttls", "STARTTLS", "502 no"),
        ("none", "AUTH CRAM-MD5", "535 no"),
        ("none", "AUTH CRAM-MD5", "454 later"),
        ("none", "AUTH CRAM-MD5", "504 no"),
    ],
)
@pytest.mark.parametrize("answers_quit", [True, False])
def test_a_provider_that_says_no_is_left_with_quit(
    salmon: Salmon,
    monkeypatch: pytest.MonkeyPatch,
    tls: str,
    step: str,
    answer: str,
    answers_quit: bool,
) -> None:
    monkeypatch.setattr("salmon_revsmtp.net.client.GOODBYE", 60.0)

    async def script(provider: Dialogue) -> None:
        for one in ("greeting", "EHLO", "STARTTLS", "AUTH CRAM-MD5"):
            if one == "STARTTLS" and tls == "none":
                continue
            if one != "greeting":
                await provider.hear(one)
            if one == step:
                provider.say(answer)
                break
            provider.say(*STEPS[one])
        await provider.hear("QUIT")
        if answers_quit:
            provider.say("221 bye")
            await provider.silence()

    report = collect_from(salmon, script, tls=tls)
    assert report.outcome is (Outcome.DEFERRED if answer[0] == "4" else Outcome.REFUSED)
    assert report.error is not None and answer in report.error
    assert report.seconds < 30


@pytest.mark.parametrize("offers", ["250 STARTTLS", "250 AUTH PLAIN", "250 SIZE"])
def test_a_provider_that_is_of_no_use_is_left_with_quit(salmon: Salmon, offers: str) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", offers)
        await provider.asks("QUIT", "221 bye")
        await provider.silence()

    assert collect_from(salmon, script).outcome is Outcome.FAILED


def test_a_provider_that_does_not_answer_quit_is_not_waited_for_long(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salmon_revsmtp.net.client.GOODBYE", 0.2)

    async def script(provider: Dialogue) -> None:
        provider.say("554 no")
        await provider.hear("QUIT")
        await provider.ignore()

    report = collect_from(salmon, script)
    assert report.outcome is Outcome.REFUSED
    assert report.seconds < 30


def test_a_server_that_closes_without_a_greeting_names_the_keys(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        provider.end()

    report = collect_from(salmon, script)
    assert report.outcome is Outcome.FAILED and report.error is not None
    assert "without a greeting" in report.error and "check port" in report.error


async def logged_in(provider: Dialogue) -> None:
    provider.say("220 odmr")
    await provider.asks("EHLO", "250-odmr", "250-AUTH CRAM-MD5", "250 ETRN")
    await provider.asks("AUTH CRAM-MD5", "334 PDFAeD4=")
    await provider.asks("", "235 welcome")


@pytest.mark.parametrize("protocol", ["odmr", "etrn"])
@pytest.mark.parametrize("answer", ["503 again?", "530 no", "500 what?", "502 no", "451 later"])
def test_the_ehlo_after_the_login_is_optional(salmon: Salmon, protocol: str, answer: str) -> None:
    async def script(provider: Dialogue) -> None:
        await logged_in(provider)
        await provider.asks("EHLO", answer)
        await provider.asks("ATRN" if protocol == "odmr" else "ETRN", "250 ok")
        provider.abort()

    report = collect_from(salmon, script, protocol=protocol)
    assert (report.sessions, report.auth) == (1, "CRAM-MD5")
    if protocol == "etrn":
        assert report.outcome is Outcome.REQUESTED


@pytest.mark.parametrize("answer", ["421 closing", ""])
def test_an_end_at_the_ehlo_after_the_login_says_where_it_was(salmon: Salmon, answer: str) -> None:
    async def script(provider: Dialogue) -> None:
        await logged_in(provider)
        await provider.hear("EHLO")
        if answer:
            provider.say(answer)

    report = collect_from(salmon, script)
    assert report.outcome is (Outcome.DEFERRED if answer else Outcome.FAILED)
    assert report.error is not None and "again after logging in" in report.error


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_under_tls_the_password_may_be_sent(salmon: Salmon, mechanism: str) -> None:
    def encoded(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", f"250 AUTH {mechanism}")
        if mechanism == "PLAIN":
            await provider.asks(f"AUTH PLAIN {encoded(f'{chr(0)}acme{chr(0)}{PASSWORD}')}")
        else:
            await provider.asks(f"AUTH LOGIN {encoded('acme')}", "334 UGFzc3dvcmQ6")
            await provider.asks(encoded(PASSWORD))
        provider.say("235 welcome")
        await provider.asks("EHLO", "250-odmr", "250 ATRN")
        await provider.asks("ATRN", "453 no mail")

    report = collect_from(salmon, script, tls="implicit", ca_file=str(CERTIFICATE))
    assert (report.outcome, report.auth) == (Outcome.NO_MAIL, mechanism)


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("name", "password"),
    [
        (b64("Username:"), b64("Password:")),
        (b64("User Name\0"), b64("Password\0")),
        (b64("USERNAME:"), b64("PASSWORD:")),
        (b64("login:"), b64("password:")),
        ("Username:", "Password:"),
        ("", b64("Password:")),
    ],
)
def test_auth_login_answers_what_it_is_asked_for(salmon: Salmon, name: str, password: str) -> None:
    """Some servers do not read the name that comes with the command."""

    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH LOGIN")
        await provider.hear(f"AUTH LOGIN {b64('acme')}")
        if name:
            provider.say(f"334 {name}")
            assert await provider.hear() == b64("acme")
        provider.say(f"334 {password}")
        assert await provider.hear() == b64(PASSWORD)
        provider.say("235 welcome")
        await provider.asks("EHLO", "250-odmr", "250 ATRN")
        await provider.asks("ATRN", "453 no mail")

    report = collect_from(salmon, script, tls="implicit", ca_file=str(CERTIFICATE))
    assert (report.outcome, report.auth) == (Outcome.NO_MAIL, "LOGIN")


@pytest.mark.parametrize(
    "challenges", [["Username:", "Username:"], ["One-time code:"], [""], ["Password:", "Password:"]]
)
def test_auth_login_gives_no_password_to_another_question(
    salmon: Salmon, challenges: list[str]
) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH LOGIN")
        await provider.hear("AUTH LOGIN ")
        sent = []
        for challenge in challenges:
            provider.say(f"334 {b64(challenge)}")
            sent.append(await provider.hear())
        assert sent[-1] == "*"
        assert sent.count(b64(PASSWORD)) == challenges[:-1].count("Password:")
        provider.say("501 cancelled")
        await provider.left()

    report = collect_from(salmon, script, tls="implicit", ca_file=str(CERTIFICATE))
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "asks for something else" in report.error


@pytest.mark.parametrize("offered", ["AUTH PLAIN LOGIN", "AUTH XOAUTH2", "SIZE", "STARTTLS"])
def test_without_tls_the_password_is_never_sent(salmon: Salmon, offered: str) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", f"250 {offered}")
        await provider.left()

    report = collect_from(salmon, script)
    assert report.outcome is Outcome.FAILED
    assert report.error is not None
    if "PLAIN" in offered or "STARTTLS" in offered:
        assert "set tls to" in report.error


@pytest.mark.parametrize("protocol", ["odmr", "etrn"])
@pytest.mark.parametrize("offered", ["PLAIN", "LOGIN", "PLAIN LOGIN"])
def test_a_server_that_was_not_verified_never_gets_the_password(
    salmon: Salmon, protocol: str, offered: str
) -> None:
    """Anyone may be at the other end of TLS whose certificate no one has looked at."""

    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 STARTTLS")
        await provider.asks("STARTTLS", "220 go ahead")
        await provider.starttls(server_tls())
        await provider.asks("EHLO", "250-odmr", f"250 AUTH {offered}")
        await provider.left()

    report = collect_from(salmon, script, protocol=protocol, tls="opportunistic")
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "set tls to 'starttls'" in report.error
    assert PASSWORD not in report.error


def test_a_scram_server_that_does_not_prove_itself(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH SCRAM-SHA-256")
        first = (await provider.hear("AUTH SCRAM-SHA-256 ")).split()[2]
        nonce = base64.b64decode(first).decode().split("r=")[1]
        challenge = f"r={nonce}evil,s={base64.b64encode(b'salt' * 4).decode()},i=4096"
        provider.say("334 " + base64.b64encode(challenge.encode()).decode())
        await provider.hear()
        provider.say("334 " + base64.b64encode(b"v=AAAA").decode())
        await provider.silence()

    report = collect_from(salmon, script)
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "prove" in report.error


def test_starttls_that_is_not_offered_is_a_failure_by_default(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH CRAM-MD5")
        await provider.left()

    report = collect_from(salmon, script, tls="starttls")
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "offers no STARTTLS" in report.error


def test_opportunistic_goes_on_without_tls(salmon: Salmon) -> None:
    report = collect_from(salmon, no_more_mail, tls="opportunistic")
    assert (report.outcome, report.tls) == (Outcome.NO_MAIL, None)


def fails_at_tls(how: str) -> Script:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250-AUTH CRAM-MD5 PLAIN", "250 STARTTLS")
        await provider.hear("STARTTLS")
        if how[0] in "45":
            provider.say(how)
            await provider.left()
        elif how != "drop":
            provider.say("220 go ahead")
            if how == "garbage":
                await provider.reader.read(5)
                provider.say("500 what?")
            elif how == "silence":
                await provider.ignore()

    return script


@pytest.mark.parametrize("protocol", ["odmr", "etrn"])
@pytest.mark.parametrize(
    "how", ["454 no TLS now", "501 what?", "502 no", "drop", "drop after 220", "garbage", "silence"]
)
def test_opportunistic_tls_that_fails_is_followed_by_a_connection_in_the_clear(
    salmon: Salmon, protocol: str, how: str
) -> None:
    async def again(provider: Dialogue) -> None:
        provider.say("220 odmr")
        capabilities = ("250-odmr", "250-AUTH CRAM-MD5 PLAIN", "250-ETRN", "250 STARTTLS")
        await provider.asks("EHLO", *capabilities)
        await provider.asks("AUTH CRAM-MD5", "334 PDFAeD4=")
        await provider.asks("", "235 welcome")
        await provider.asks("EHLO", *capabilities)
        await provider.asks("ATRN" if protocol == "odmr" else "ETRN", "453 no mail")
        await provider.left()

    timeout = 0.5 if how == "silence" else 20
    keys: dict[str, Any] = {"protocol": protocol, "tls": "opportunistic", "timeout": timeout}
    report = collect_from(salmon, fails_at_tls(how), again, **keys)
    assert (report.sessions, report.tls, report.auth) == (1, None, "CRAM-MD5")


def test_a_connection_in_the_clear_after_opportunistic_tls_gets_no_password(
    salmon: Salmon,
) -> None:
    async def again(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH PLAIN LOGIN")
        await provider.left()

    report = collect_from(salmon, fails_at_tls("454 no"), again, tls="opportunistic")
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "set tls to 'starttls'" in report.error


@pytest.mark.parametrize("how", ["454 no TLS now", "502 no", "drop after 220", "garbage"])
def test_required_tls_that_fails_is_followed_by_nothing(salmon: Salmon, how: str) -> None:
    report = collect_from(salmon, fails_at_tls(how), tls="starttls")
    assert not report.outcome.good and report.sessions == 0


@pytest.mark.parametrize("together", [True, False])
def test_bytes_glued_to_the_answer_of_starttls(salmon: Salmon, together: bool) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 STARTTLS")
        await provider.hear("STARTTLS")
        if together:
            provider.say("220 go ahead\r\n235 injected")
        else:
            provider.say("220 go ahead")
            provider.say("235 injected")

    report = collect_from(salmon, script, tls="starttls")
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "STARTTLS" in report.error
    if together:
        assert "more bytes came with the answer" in report.error


def test_bytes_glued_to_the_answer_of_atrn_are_no_commands(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def script(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        await provider.hear("ATRN")
        provider.say("250 reversing\r\nEHLO evil\r\nMAIL FROM:<x@example.net>")
        await provider.silence()

    report = collect_from(salmon, script)
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "more bytes came with the answer" in report.error
    assert salmon.handled == []


def test_a_certificate_that_is_not_trusted(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        raise AssertionError("no one may speak on an untrusted connection")

    async def main() -> Report:
        async with scripted(tls=server_tls()) as port:
            [report] = await collect(salmon, agent_keys(port, tls="implicit"))
        return report

    report = asyncio.run(main())
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "ca_file" in report.error


def test_a_file_of_authorities_that_has_changed_is_read_again(
    salmon: Salmon, tmp_path: Path
) -> None:
    """Although what was read of it is kept for the collections in between."""
    trusted = tmp_path / "ca.pem"

    def collects(*scripts: Script) -> Outcome:
        keys: dict[str, Any] = {"tls": "implicit", "ca_file": str(trusted)}
        return collect_from(salmon, *scripts, **keys).outcome

    trusted.write_bytes(CERTIFICATE.read_bytes())
    assert [collects(no_more_mail), collects(no_more_mail)] == [Outcome.NO_MAIL] * 2
    trusted.write_bytes(trustme.CA().cert_pem.bytes())
    assert collects() is Outcome.FAILED
    trusted.write_bytes(CERTIFICATE.read_bytes())
    assert collects(no_more_mail) is Outcome.NO_MAIL


def gives(number: int) -> Script:
    """A provider that gives this message, and breaks off."""

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE + b"%d\r\n" % number)).startswith("250")
        provider.abort()

    return script


def test_a_provider_under_tls_that_breaks_off_after_each_message_is_emptied(
    salmon: Salmon,
) -> None:
    salmon.handle(".*")

    scripts = [gives(number) for number in range(5)]
    report = collect_from(salmon, *scripts, no_more_mail, tls="implicit", ca_file=str(CERTIFICATE))
    assert report.outcome is Outcome.COLLECTED
    assert (report.messages, report.sessions) == (5, 6)
    assert report.tls is not None and report.tls.startswith("TLSv1.")
    assert len(salmon.handled) == 5
    assert b"with ESMTPSA id" in salmon.handled[0].Data


def test_a_message_that_was_encrypted_twice_is_left_with_the_provider(salmon: Salmon) -> None:
    """Exim 4.100.1 does that to every message of a session but the first."""
    salmon.handle(".*")
    record = b"\x17\x03\x03\x00\x80" + bytes(range(128))

    async def first(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("250")
        provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>")
        await provider.replied(250)
        await provider.replied(250)
        provider.say(b"BDAT %d LAST" % len(MESSAGE), record)
        with pytest.raises(ConnectionResetError):
            await provider.silence()

    async def second(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE + b"second\r\n")).startswith("250")
        await provider.quit()

    report = collect_from(
        salmon, first, second, no_more_mail, tls="implicit", ca_file=str(CERTIFICATE)
    )
    assert (report.outcome, report.messages, report.refused) == (Outcome.COLLECTED, 2, 0)
    assert len(salmon.handled) == 2


@pytest.mark.parametrize(
    ("step", "answer"),
    [
        ("greeting", "421 too many connections"),
        ("greeting", "554 too many connections"),
        ("EHLO", "450 later"),
        ("AUTH", "454 later"),
        ("AUTH", "535 one login a minute"),
        ("ATRN", "450 refused"),
        ("ATRN", "451 busy"),
        ("ATRN", "550 no more"),
    ],
)
def test_what_follows_mail_is_never_worse_than_the_mail(
    salmon: Salmon, step: str, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    salmon.handle(".*")

    async def first(provider: Dialogue) -> None:
        await provider.reverse()
        for number in range(3):
            assert (await provider.send(MESSAGE + b"%d\r\n" % number)).startswith("250")
        await provider.quit()

    async def second(provider: Dialogue) -> None:
        if step == "ATRN":
            await provider.up_to_atrn()
            await provider.asks("ATRN", answer)
        elif step == "greeting":
            provider.say(answer)
        else:
            provider.say("220 odmr")
            if step == "AUTH":
                await provider.asks("EHLO", "250-odmr", "250 AUTH SCRAM-SHA-1")
            await provider.asks(step, answer)
        await provider.left()

    report = collect_from(salmon, first, second)
    assert (report.outcome, report.messages, report.error) == (Outcome.COLLECTED, 3, None)
    assert answer in caplog.text


def test_a_provider_that_breaks_off_without_giving_anything(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        provider.abort()

    report = collect_from(salmon, script)
    assert (report.outcome, report.sessions) == (Outcome.FAILED, 1)
    assert report.error is not None and "broke the connection off" in report.error


def test_a_session_after_mail_that_breaks_off_at_once_is_tried_again(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exim's process of the session before may still have the next message locked."""
    monkeypatch.setattr("salmon_revsmtp.customer.odmr.AFTER_MAIL", 0.01)
    salmon.handle(".*")

    async def nothing(provider: Dialogue) -> None:
        await provider.reverse()
        provider.abort()

    scripts = [gives(1), nothing, nothing, nothing, gives(2), nothing, nothing]
    report = collect_from(salmon, *scripts, no_more_mail)
    assert (report.outcome, report.messages, report.sessions) == (Outcome.COLLECTED, 2, 8)

    report = collect_from(salmon, gives(3), *[nothing] * 4)
    assert (report.outcome, report.messages, report.sessions) == (Outcome.FAILED, 1, 5)
    assert report.error is not None and "broke the connection off" in report.error


def test_a_session_after_mail_that_we_end_is_the_last(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def first(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("250")
        await provider.quit()

    async def says_nonsense(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say(*["what?"] * 30)
        await provider.hear("500")
        provider.end()

    report = collect_from(salmon, first, says_nonsense)
    assert (report.outcome, report.messages, report.sessions) == (Outcome.FAILED, 1, 2)
    assert report.error is not None and "421" in report.error


def test_a_provider_that_gives_the_same_message_for_ever(salmon: Salmon) -> None:
    """It may have missed the first 250; the second it has heard."""
    salmon.handle(".*")

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("250")
        provider.abort()

    report = collect_from(salmon, script, script, script)
    assert report.outcome is Outcome.FAILED
    assert report.messages == 1
    assert len(salmon.handled) == 1


def test_a_session_that_brings_nothing_is_the_last(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        await provider.quit()

    report = collect_from(salmon, script)
    assert (report.outcome, report.sessions) == (Outcome.NO_MAIL, 1)


def test_a_message_that_is_cut_off_is_not_delivered(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>", "DATA")
        await provider.replied(250)
        await provider.replied(250)
        await provider.replied(354)
        provider.say("Subject: half", "", "half of it")
        provider.abort()

    report = collect_from(salmon, script)
    assert (report.outcome, report.messages) == (Outcome.FAILED, 0)
    assert salmon.handled == []


def test_recipients_outside_the_domains_are_refused_and_counted(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<a@example.net>")
        await provider.replied(250)
        provider.say("RCPT TO:<b@elsewhere.example>")
        assert (await provider.replied(550)).startswith("550 5.7.1 ")
        provider.say("RCPT TO:<b@EXAMPLE.org>", "BDAT 2 LAST", "")
        await provider.replied(250)
        await provider.replied(250)
        await provider.quit()

    report = collect_from(salmon, script, no_more_mail)
    assert (report.outcome, report.messages, report.refused) == (Outcome.COLLECTED, 1, 1)


def test_what_was_delivered_but_deferred_is_no_empty_mailbox(salmon: Salmon) -> None:
    """The provider keeps it, so the collection has failed; it is handled once all the same."""

    class Leaves:
        @hookimpl
        def message_delivered(self) -> None:
            raise SystemExit(3)

    async def first(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("451 4.3.0 ")
        await provider.quit()

    async def again(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("250 2.")
        await provider.quit()

    salmon.handle(".*")
    plugins = Plugins.load()
    plugins.register(Leaves())
    report = collect_from(salmon, first, plugins=plugins)
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "deferred, the last with 451 4.3.0" in report.error
    assert collect_from(salmon, again, no_more_mail).outcome is Outcome.COLLECTED
    assert len(salmon.handled) == 1


def test_a_provider_that_the_service_shuts_out(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        await provider.up_to_atrn()

    async def main() -> Report:
        async with scripted(script) as port:
            [report] = await collect(salmon, agent_keys(port), default={"deny": ["127.0.0.0/8"]})
        return report

    report = asyncio.run(main())
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "deny 127.0.0.0/8" in report.error


def test_nobody_listens(salmon: Salmon) -> None:
    async def main() -> Report:
        async with scripted() as port:
            pass
        [report] = await collect(salmon, agent_keys(port))
        return report

    report = asyncio.run(main())
    assert (report.outcome, report.sessions) == (Outcome.FAILED, 0)
    assert report.error is not None and "connecting to localhost" in report.error


@pytest.mark.parametrize(
    ("greeting", "outcome"), [("554 no", Outcome.REFUSED), ("421 busy", Outcome.DEFERRED)]
)
def test_a_provider_that_greets_with_no(salmon: Salmon, greeting: str, outcome: Outcome) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say(greeting)

    assert collect_from(salmon, script).outcome is outcome


@pytest.mark.parametrize("step", ["connect", "reversed"])
def test_a_silent_provider_is_left_after_the_timeout(salmon: Salmon, step: str) -> None:
    async def script(provider: Dialogue) -> None:
        if step == "reversed":
            await provider.reverse()
        await provider.silence()

    report = collect_from(salmon, script, timeout=0.3)
    assert report.outcome is Outcome.FAILED


def test_a_provider_that_is_silent_behind_its_mail_is_left_after_the_timeout(
    salmon: Salmon,
) -> None:
    """The clock that stands still while a message is delivered goes on when it is answered."""
    salmon.handle(".*")

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("250")
        await provider.silence()

    report = collect_from(salmon, script, no_more_mail, timeout=1.5)
    assert (report.outcome, report.messages) == (Outcome.COLLECTED, 1)


def test_a_tls_handshake_without_an_answer(salmon: Salmon) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 STARTTLS")
        await provider.asks("STARTTLS", "220 go ahead")
        await provider.ignore()

    report = collect_from(salmon, script, tls="starttls", timeout=0.3)
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "no TLS handshake in 0.3 seconds" in report.error


def test_a_disabled_agent_does_not_call(salmon: Salmon) -> None:
    assert collect_from(salmon, enabled=False).outcome is Outcome.DISABLED


def test_two_collections_of_one_agent_never_run_at_once(salmon: Salmon) -> None:
    held = asyncio.Event()

    async def main() -> None:
        async def script(provider: Dialogue) -> None:
            await provider.up_to_atrn()
            held.set()
            await provider.hear("ATRN")
            await second_done.wait()
            provider.say("453 no mail")

        second_done = asyncio.Event()
        async with scripted(script) as port:
            first = asyncio.create_task(collect(salmon, agent_keys(port)))
            await held.wait()
            [second] = await collect(salmon, agent_keys(port))
            assert second.outcome is Outcome.BUSY
            second_done.set()
            [report] = await first
            assert report.outcome is Outcome.NO_MAIL

    asyncio.run(main())


def test_a_slow_handler_delays_no_other_agents_network(salmon: Salmon) -> None:
    """The handler of one agent's mail waits until the other agent's collection has ended."""
    finished = threading.Event()
    salmon.handle("slow@.*", waits_for(finished))

    async def main() -> None:
        async def slow(provider: Dialogue) -> None:
            await provider.reverse()
            assert (await provider.send(MESSAGE, "slow@example.org")).startswith("250")
            await provider.quit()

        async def quick(provider: Dialogue) -> None:
            await provider.reverse()
            await provider.quit()
            finished.set()

        async with scripted(slow, no_more_mail) as one, scripted(quick) as other:
            reports = await collect(
                salmon, agent_keys(one, name="slow"), agent_keys(other, name="quick")
            )
        assert [report.outcome for report in reports] == [Outcome.COLLECTED, Outcome.NO_MAIL]
        assert finished.is_set()

    asyncio.run(main())


def test_what_a_collection_waits_for_can_be_seen(salmon: Salmon) -> None:
    seen: list[str] = []
    salmon.handle(".*", lambda message: look())
    collections: list[Collection] = []

    def look() -> None:
        seen.append(collections[0].doing[0])

    async def script(provider: Dialogue) -> None:
        look()
        await provider.up_to_atrn()
        await provider.hear("ATRN")
        look()
        provider.say("250 reversing")
        await provider.replied(220)
        look()
        provider.say("EHLO odmr.example.net", "MAIL FROM:<a@example.net>")
        await provider.replied(250)
        await provider.replied(250)
        look()
        provider.say("RSET")
        await provider.replied(250)
        assert (await provider.send(MESSAGE)).startswith("250")
        await provider.quit()

    async def main() -> int:
        async with scripted(script, no_more_mail) as port:
            plugins = Plugins.load()
            valid = configuration(agent_keys(port), plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                await collector.collect(valid.agents, collections.append)
        return port

    port = asyncio.run(main())
    assert seen == [
        f"connecting to localhost:{port}",
        f"waiting for the answer of localhost:{port} to ATRN",
        "waiting for the provider's next message",
        "waiting for the rest of a message from the provider",
        "handling a message",
    ]
    assert collections[0].doing[1] >= 0
