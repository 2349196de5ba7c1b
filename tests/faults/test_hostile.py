"""Providers that mean harm or do not know better, as dialogues: what a collection makes of them.

After each: the outcome is there, the error says what was done and to whom, no secret is in it,
nothing was handled that should not be, and the connection is closed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import logging
import ssl
import threading
import tracemalloc
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.collecting import collect, collect_from
from support.configuration import PASSWORD, agent_keys
from support.dialogue import Dialogue, scripted
from support.listener import listener
from support.messages import MESSAGE
from support.salmon import Salmon
from support.tls import CERTIFICATE, PRIVATE_KEY, server_tls

from salmon_revsmtp import hookimpl
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.net import driver
from salmon_revsmtp.net import listener as listening
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.service import session
from salmon_revsmtp.service.session import LOGGED_REFUSALS

MIB = 1024 * 1024


def failed(report: Report, *words: str) -> bool:
    """It failed, and the error has these words and no secret."""
    assert report.outcome is Outcome.FAILED, report
    assert report.error is not None
    for word in ("localhost:", *words):
        assert word in report.error, report.error
    return no_secret(report.error)


def no_secret(text: str) -> bool:
    plain = f"\0acme\0{PASSWORD}"
    for secret in (
        PASSWORD,
        *(base64.b64encode(one.encode()).decode() for one in (PASSWORD, plain)),
    ):
        assert secret not in text
    return True


# -- before the reversal ---------------------------------------------------------------------------

EHLO = ("250-odmr.example.net", "250-AUTH CRAM-MD5", "250 ATRN")


async def to_greeting(provider: Dialogue) -> None:
    pass


async def to_ehlo(provider: Dialogue) -> None:
    provider.say("220 odmr.example.net")
    await provider.hear("EHLO")


async def to_starttls(provider: Dialogue) -> None:
    await to_ehlo(provider)
    provider.say("250-odmr.example.net", "250 STARTTLS")
    await provider.hear("STARTTLS")


async def to_handshake(provider: Dialogue) -> None:
    await to_starttls(provider)
    provider.say("220 go ahead")


async def to_auth(provider: Dialogue) -> None:
    await to_ehlo(provider)
    provider.say(*EHLO)
    await provider.hear("AUTH CRAM-MD5")


async def to_response(provider: Dialogue) -> None:
    await to_auth(provider)
    provider.say("334 PDFAeD4=")
    await provider.hear()


async def to_second_ehlo(provider: Dialogue) -> None:
    await to_response(provider)
    provider.say("235 welcome")
    await provider.hear("EHLO")


async def to_atrn(provider: Dialogue) -> None:
    await provider.up_to_atrn()
    await provider.hear("ATRN")


Stage = Callable[[Dialogue], Awaitable[None]]
STAGES: dict[str, tuple[Stage, str, int]] = {
    "greeting": (to_greeting, "connecting to", 220),
    "ehlo": (to_ehlo, "greeting", 250),
    "starttls": (to_starttls, "STARTTLS with", 220),
    "auth": (to_auth, "logging in to", 334),
    "response": (to_response, "logging in to", 235),
    "second ehlo": (to_second_ehlo, "greeting", 250),
    "atrn": (to_atrn, "waiting for the answer of", 250),
}


def tls_of(stage: str) -> dict[str, Any]:
    return {"tls": "starttls"} if stage in ("starttls", "handshake") else {}


async def flood(provider: Dialogue, block: bytes) -> int:
    """Send a block for ever; returns how many octets went out until the other side closed."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 200 * MIB:
            provider.writer.write(block)
            await provider.writer.drain()
            sent += len(block)
    return sent


@pytest.mark.parametrize("endless", ["lines", "line"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_reply_without_an_end(salmon: Salmon, stage: str, endless: str) -> None:
    """It is given up when it is longer than any reply is, and not when the time is up: what the
    provider got rid of by then is little more than what the sockets hold."""
    reach, doing, code = STAGES[stage]
    sent = 0

    async def script(provider: Dialogue) -> None:
        nonlocal sent
        await reach(provider)
        line = b"%d-and more\r\n" % code if endless == "lines" else b"%d x" % code
        sent = await flood(provider, line * 5000)

    report = collect_from(salmon, script, timeout=3600, **tls_of(stage))
    assert failed(report, doing)
    assert report.error is not None and len(report.error) < 400
    assert sent < 50 * MIB
    assert report.seconds < 60


def turn_on(seconds: float) -> None:
    """Turn the loop's clock on: what waits for that long has waited long enough."""
    loop: Any = asyncio.get_running_loop()
    if not hasattr(loop, "ahead"):
        loop.ahead, real = 0.0, loop.time
        loop.time = lambda: real() + loop.ahead
    loop.ahead += seconds


async def outlast(provider: Dialogue, octets: bytes = b"") -> float:
    """Say nothing more, or an octet every ten seconds, until the other side closes; returns how
    many seconds that took on the loop's clock.  Nothing here waits."""
    closed = asyncio.ensure_future(provider.reader.read())
    seconds = 0.0
    while not closed.done():
        assert seconds < 10_000, "it waits for ever"
        provider.writer.write(octets)
        for _ in range(20):
            await asyncio.sleep(0)
        turn_on(10)
        seconds += 10
        for _ in range(20):
            await asyncio.sleep(0)
    with contextlib.suppress(ConnectionError):
        closed.result()
    return seconds


@pytest.mark.parametrize("stage", [*STAGES, "handshake"])
@pytest.mark.parametrize("octets", [b"", b"2"])
def test_a_provider_that_never_ends_its_answer(salmon: Salmon, stage: str, octets: bytes) -> None:
    """It says nothing, or an octet now and then: the clock runs on the whole reply."""
    reach, doing, _ = STAGES.get(stage, (to_handshake, "STARTTLS with", 0))
    seconds = 0.0

    async def script(provider: Dialogue) -> None:
        nonlocal seconds
        await reach(provider)
        seconds = await outlast(provider, octets)

    report = collect_from(salmon, script, **tls_of(stage))
    if stage != "handshake" or not octets:
        # RFC 2645 5.2.1: ten minutes for ATRN
        assert failed(report, doing, f" in {600 if stage == 'atrn' else 60} seconds")
        assert 0 <= seconds - (600 if stage == "atrn" else 60) <= 50
    else:  # which is no TLS
        assert failed(report, doing)


@pytest.mark.parametrize("reply", ["235 {plain}", "535 wrong: {password}", "535 {both}", "{plain}"])
def test_a_provider_that_gives_our_password_back(
    salmon: Salmon, reply: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = base64.b64encode(f"\0acme\0{PASSWORD}".encode()).decode()
    answer = reply.format(
        plain=plain, password=PASSWORD, both=base64.b64encode(PASSWORD.encode()).decode()
    )

    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH PLAIN")
        await provider.asks("AUTH PLAIN", answer)
        with contextlib.suppress(AssertionError):
            await provider.asks("EHLO", f"250-odmr {PASSWORD}", f"250 X-{plain} {PASSWORD}")
            await provider.asks("ATRN", f"550 {PASSWORD} {plain}")
            await provider.hear("QUIT")

    caplog.set_level(logging.DEBUG)
    report = collect_from(salmon, script, tls="implicit", ca_file=str(CERTIFICATE))
    assert report.outcome in (Outcome.REFUSED, Outcome.FAILED)
    assert report.error is not None and no_secret(report.error) and no_secret(caplog.text)


@pytest.mark.parametrize(
    "challenge",
    [
        "r={nonce}x,s=c2FsdHNhbHRzYWx0c2FsdA==,i=2147483647",
        "r={nonce}x,s=c2FsdHNhbHRzYWx0c2FsdA==,i=99999999999999999999",
        "r={nonce}x,s=c2FsdHNhbHRzYWx0c2FsdA==,i=0",
        "r={nonce}x,s=c2FsdHNhbHRzYWx0c2FsdA==,i=-4096",
        "r={nonce}x,s=c2FsdHNhbHRzYWx0c2FsdA==,i=many",
        "r={nonce}x,s=c2FsdHNhbHRzYWx0c2FsdA==",
        "r=another,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096",
        "r={nonce}x,s=?,i=4096",
        "m=extension,r={nonce}x,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096",
        "nonsense",
        "",
        ",,,",
        "=",
        "\xff",
    ],
)
def test_a_scram_challenge_that_is_none(salmon: Salmon, challenge: str) -> None:
    """Nor one that would keep a processor busy for hours."""

    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH SCRAM-SHA-256")
        first = (await provider.hear("AUTH SCRAM-SHA-256 ")).split()[2]
        nonce = base64.b64decode(first).decode().split("r=")[1]
        answer = challenge.format(nonce=nonce).encode("latin-1")
        provider.say(b"334 " + base64.b64encode(answer))
        await provider.silence()

    report = collect_from(salmon, script)
    assert failed(report, "logging in to", "acme", "SCRAM-SHA-256")
    assert report.seconds < 15


def test_a_flood_behind_the_answer_to_atrn_is_not_kept_while_plugins_get_ready(
    salmon: Salmon,
) -> None:
    salmon.handle(".*")
    flooded = threading.Event()
    peak = 0

    class Slow:
        @hookimpl
        def connection_reversed(self) -> None:
            nonlocal peak
            assert flooded.wait(60)
            peak = tracemalloc.get_traced_memory()[1]

    async def script(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        await provider.asks("ATRN", "250 reversing")
        for _ in range(300):
            provider.writer.write(b"NOOP\r\n" * 20_000)
            await provider.writer.drain()
        flooded.set()
        await flood(provider, b"NOOP\r\n" * 20_000)

    plugins = Plugins.load()
    plugins.register(Slow())

    async def main() -> Report:
        async with scripted(script) as port:
            [report] = await collect(salmon, agent_keys(port), plugins=plugins)
        return report

    tracemalloc.start()
    report = asyncio.run(main())
    tracemalloc.stop()
    assert failed(report, "more bytes came with the answer")
    assert 0 < peak < 12 * MIB  # 36 MB came


# -- TLS -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_asyncio() -> Iterator[None]:
    """asyncio logs handshakes that fail, in whichever role."""
    log = logging.getLogger("asyncio")
    level, log.level = log.level, logging.CRITICAL
    try:
        yield
    finally:
        log.level = level


def collect_under(
    salmon: Salmon, context: ssl.SSLContext, tls: str, ca_file: Path | None = None
) -> Report:
    """Collect once from a provider with this TLS, which hears not a word."""

    async def speaks_tls(provider: Dialogue) -> None:
        await to_handshake(provider)
        writer = provider.writer
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            await asyncio.get_running_loop().start_tls(
                writer.transport, writer.transport.get_protocol(), context, server_side=True
            )
            assert await provider.reader.read() == b"", "a word on an untrusted connection"

    keys: dict[str, Any] = {"tls": tls, **({"ca_file": str(ca_file)} if ca_file else {})}

    async def main() -> Report:
        scripts = [speaks_tls] if tls == "starttls" else []
        implicit = context if tls == "implicit" else None
        async with scripted(*scripts, tls=implicit) as port:
            [report] = await collect(salmon, agent_keys(port, **keys))
        return report

    with quiet_asyncio():
        return asyncio.run(main())


def tls_server(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.mark.parametrize("tls", ["implicit", "starttls"])
@pytest.mark.parametrize(
    "fault", ["expired", "another name", "self-signed", "unknown CA", "another CA"]
)
def test_a_certificate_that_proves_nothing(
    salmon: Salmon, tmp_path: Path, fault: str, tls: str
) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    year = datetime.timedelta(days=365)
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate, trusted, words, advice = {
        "expired": (
            authority.issue_cert("localhost", not_before=now - 2 * year, not_after=now - year),
            ca_file,
            "certificate has expired",
            "has to renew it",
        ),
        "another name": (
            authority.issue_cert("odmr.example.net"),
            ca_file,
            "Hostname mismatch",
            "set server",
        ),
        "self-signed": (None, None, "self-signed certificate", "set ca_file"),
        "unknown CA": (
            authority.issue_cert("localhost"),
            None,
            "unable to get local issuer",
            "set ca_file",
        ),
        "another CA": (
            stranger.issue_cert("localhost"),
            ca_file,
            "unable to get local issuer",
            "set ca_file",
        ),
    }[fault]
    context = tls_server(certificate) if certificate else server_tls()
    report = collect_under(salmon, context, tls, trusted)
    assert failed(report, "its certificate was not accepted", words, advice, "localhost")
    assert report.sessions == 0 and report.tls is None


@pytest.mark.parametrize("tls", ["implicit", "starttls"])
def test_a_provider_that_speaks_tls_1_0_only(salmon: Salmon, tmp_path: Path, tls: str) -> None:
    authority = trustme.CA()
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    context = tls_server(authority.issue_cert("localhost"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
        except (ssl.SSLError, ValueError) as error:
            pytest.skip(f"this OpenSSL has no TLS 1.0 at all: {error}")
    report = collect_under(salmon, context, tls, ca_file)
    assert failed(report, "TLS failed", "TLS 1.2")


# -- after the reversal ----------------------------------------------------------------------------


async def to_mail(provider: Dialogue) -> None:
    await provider.reverse()


async def to_220(provider: Dialogue) -> None:
    await provider.up_to_atrn()
    await provider.asks("ATRN", "250 reversing")
    await provider.replied(220)


async def to_half_a_command(provider: Dialogue) -> None:
    await provider.reverse()
    provider.writer.write(b"MAIL FRO")


async def to_data(provider: Dialogue) -> None:
    await provider.reverse()
    provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>", "DATA", "Subject: half")
    for code in (250, 250, 354):
        await provider.replied(code)


async def to_chunk(provider: Dialogue) -> None:
    await provider.reverse()
    provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>", "BDAT 999 LAST", "half")
    for code in (250, 250):
        await provider.replied(code)


async def to_the_next_message(provider: Dialogue) -> None:
    await provider.reverse()
    assert (await provider.send(MESSAGE)).startswith("250")


@pytest.mark.parametrize("octets", [b"", b"x"])
@pytest.mark.parametrize(
    "reach", [to_220, to_mail, to_half_a_command, to_data, to_chunk, to_the_next_message]
)
def test_a_provider_that_falls_silent_or_trickles(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, reach: Stage, octets: bytes
) -> None:
    """RFC 5321 4.5.3.2: five minutes, and an octet every ten seconds does not make it more."""
    salmon.handle(".*")
    # The guardian says 421, and that at its own time, which no test turns on.
    monkeypatch.setattr(driver, "guard", lambda *_: None)
    seconds = 0.0

    async def script(provider: Dialogue) -> None:
        nonlocal seconds
        await reach(provider)
        seconds = await outlast(provider, octets)

    async def again(provider: Dialogue) -> None:
        """A session that brought something is followed by another."""
        await to_atrn(provider)
        provider.say("453 you have no mail")

    served = reach is to_the_next_message
    report = collect_from(salmon, script, *([again] if served else []))
    if served:
        assert (report.outcome, report.messages) == (Outcome.COLLECTED, 1)
    else:
        assert failed(report, "receiving from", " in 300 seconds")
    assert 0 <= seconds - 300 <= 50
    assert len(salmon.handled) == served


def test_a_provider_with_endless_refusals_does_not_fill_the_log(
    salmon: Salmon, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CALM", 3600.0)  # however slow this machine is
    salmon.handle(".*")

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<a@example.net>")
        await provider.replied(250)
        for _ in range(100):
            provider.say(*["RCPT TO:<x@elsewhere.example>"] * 101)
            await provider.writer.drain()
        for _ in range(10_000):
            await provider.replied(550)
        assert "refusals in a row" in await provider.replied(421)
        with contextlib.suppress(ConnectionError):
            await provider.silence()

    report = collect_from(salmon, script)
    assert failed(report, "we closed the session", "refusals in a row", "the log names")
    assert report.refused == 10_001
    lines = [
        one.getMessage() for one in caplog.records if one.name == "salmon_revsmtp.service.session"
    ]
    assert len(lines) == LOGGED_REFUSALS + 1
    assert f"{10_001 - LOGGED_REFUSALS} more refused" in lines[-1]


def test_what_handlers_see_of_odd_recipients(salmon: Salmon) -> None:
    salmon.handle(".*")
    recipients = [
        ("b%elsewhere.example@example.org", "b%elsewhere.example@example.org"),
        ("elsewhere.example!b@example.org", "elsewhere.example!b@example.org"),
        ("@elsewhere.example:c@example.org", "c@example.org"),
        ('"b@elsewhere.example"@example.org', '"b@elsewhere.example"@example.org'),
        ('"d e"@example.org', '"d e"@example.org'),
        ('"x>, <y@elsewhere.example"@example.org', '"x>, <y@elsewhere.example"@example.org'),
        ("Postmaster", "postmaster"),
    ]
    foreign = ["b@elsewhere.example", "b@[127.0.0.1]", '"b@example.org"@elsewhere.example']

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<a@example.net>")
        await provider.replied(250)
        for path in foreign:
            provider.say(f"RCPT TO:<{path}>")
            assert (await provider.replied(550)).startswith("550 5.7.1 ")
        for path, _ in recipients:
            provider.say(f"RCPT TO:<{path}>")
            await provider.replied(250)
        provider.writer.write(b"BDAT %d LAST\r\n" % len(MESSAGE) + MESSAGE)
        await provider.replied(250)
        await provider.quit()

    async def done(provider: Dialogue) -> None:
        await to_atrn(provider)
        provider.say("453 no mail")

    report = collect_from(salmon, script, done)
    assert (report.outcome, report.recipients, report.refused) == (Outcome.COLLECTED, 7, 3)
    assert [message.To for message in salmon.handled] == [to for _, to in recipients]


# -- on a listening socket -------------------------------------------------------------------------


def test_a_browser_on_the_listening_port_hears_one_line(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def main() -> None:
        async with listener(salmon) as one:
            reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
            writer.write(
                b"POST / HTTP/1.1\r\nHost: mail.example.org\r\nContent-Type: text/plain\r\n\r\n"
                b"EHLO x\r\nMAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\n"
                b"DATA\r\nevil\r\n.\r\nQUIT\r\n"
            )
            heard = await asyncio.wait_for(reader.read(), 60)
            assert [line[:4] for line in heard.splitlines()] == [b"220 ", b"421 "]
            writer.close()

    asyncio.run(main())
    assert salmon.handled == []


def test_tls_on_the_plain_listening_port_is_over_at_once(salmon: Salmon) -> None:
    async def main() -> None:
        async with listener(salmon) as one:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.wait_for(
                    asyncio.open_connection(
                        "127.0.0.1", one.port, ssl=ssl.create_default_context()
                    ),
                    20,
                )

    asyncio.run(main())


async def greeting(port: int) -> bytes:
    """The code with which a listener greets one more client."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    code = (await reader.readline())[:3]
    writer.close()
    await writer.wait_closed()
    return code


async def admitted(port: int) -> None:
    """Wait until a listener has a place free."""
    while await greeting(port) != b"220":
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("then", ["silence", "a command", "half a hello", "gone", "we stop"])
def test_a_tls_handshake_that_never_ends_leaves_nothing_open(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """A client that says STARTTLS and then does no handshake: its place is free afterwards."""
    monkeypatch.setattr(listening, "MAX_PER_ADDRESS", 1)
    # The guardian lets go at its own time, which no test turns on.
    monkeypatch.setattr(driver, "guard", lambda *_: None)
    octets = {"a command": b"MAIL FROM:<a@example.net>\r\n", "half a hello": b"\x16\x03\x01\x00"}

    async def main() -> None:
        keys: dict[str, Any] = {"tls_cert": str(CERTIFICATE), "tls_key": str(PRIVATE_KEY)}
        keys["max_connections"] = 1
        async with listener(salmon, **keys) as one:
            reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
            client = Dialogue(reader, writer)
            await client.replied(220)
            client.say("EHLO x", "STARTTLS")
            await client.replied(250)
            await client.replied(220)
            assert await greeting(one.port) == b"421"
            writer.write(octets.get(then, b""))
            if then == "gone":
                client.abort()
            elif then == "we stop":
                await one.stop(5)
                await asyncio.wait_for(reader.read(), 5)  # it is closed
            else:
                assert await outlast(client) <= 350
            if then != "we stop":
                await asyncio.wait_for(admitted(one.port), 5)
            writer.close()

    with quiet_asyncio():
        asyncio.run(main())
