"""Services and a provider behind a load balancer, which says in a PROXY header whose connection it
passes on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import smtplib
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from support.configuration import PASSWORD, configuration
from support.listener import listener
from support.messages import MESSAGE
from support.processes import LONG
from support.salmon import Salmon
from support.tls import CERTIFICATE, PRIVATE_KEY
from support.world import World, world
from test_proxy_header import addresses, version_2

from salmon_revsmtp.net import forecourt, places
from salmon_revsmtp.net import listener as listening
from salmon_revsmtp.provider import logins
from salmon_revsmtp.settings import SettingsError

CLIENT = ("203.0.113.9", 41234)
HEADERS = {
    "v1": b"PROXY TCP4 203.0.113.9 192.0.2.1 41234 25\r\n",
    "v2": version_2(0x21, 0x11, addresses(*CLIENT)),
}
ITSELF = {
    "v1": b"PROXY UNKNOWN\r\n",
    "v2": version_2(0x20, 0x00, b""),
}
TLS: dict[str, Any] = {"tls_cert": str(CERTIFICATE), "tls_key": str(PRIVATE_KEY)}


class Client(smtplib.SMTP):
    """One whose connection begins with a header, sent in pieces of so many octets."""

    def __init__(self, port: int, header: bytes, pieces: int = 1000) -> None:
        self._header, self._pieces = header, pieces
        super().__init__("127.0.0.1", port, timeout=LONG)
        self._host = "localhost"  # whose certificate it is

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connection = socket.create_connection((host, port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(self._header), self._pieces):
            connection.sendall(self._header[start : start + self._pieces])
        return connection


def behind(salmon: Salmon, talk: Callable[[int], None], **service: Any) -> None:
    """Have ``talk`` speak, in a thread, to a service that is behind a balancer."""

    async def main() -> None:
        async with listener(salmon, **{"proxy_from": ["127.0.0.0/8"], **service}) as one:
            await asyncio.to_thread(talk, one.port)

    asyncio.run(main())


def provider_behind(salmon: Salmon, talk: Callable[[World], Awaitable[None]], **keys: Any) -> None:
    async def main() -> None:
        provider = {"proxy_from": ["127.0.0.1"], **keys}
        async with world(salmon, provider=provider, proxy_from=["127.0.0.1"]) as here:
            await talk(here)

    asyncio.run(main())


def reset(connection: socket.socket) -> bool:
    """Whether the connection ends with a reset, and not a word before it."""
    try:
        heard = connection.recv(100)
    except ConnectionResetError:
        return True
    raise AssertionError(f"heard {heard!r}")


@contextlib.contextmanager
def connected(port: int, said: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), LONG) as connection:
        if said:
            connection.sendall(said)
        yield connection


# -- who the client is -----------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 1000])
@pytest.mark.parametrize("version", HEADERS)
def test_handlers_and_the_trace_see_the_client_and_not_the_balancer(
    salmon: Salmon, version: str, pieces: int
) -> None:
    salmon.handle(".*")

    def talk(port: int) -> None:
        with Client(port, HEADERS[version], pieces) as client:
            client.sendmail("a@example.net", ["b@example.org"], MESSAGE)

    behind(salmon, talk)
    assert salmon.handled[0].Peer == CLIENT
    assert b" ([203.0.113.9])\n" in salmon.handled[0].Data


def test_a_client_of_ipv6(salmon: Salmon) -> None:
    salmon.handle(".*")

    def talk(port: int) -> None:
        with Client(port, version_2(0x21, 0x21, addresses("2001:db8::9", 5))) as client:
            client.sendmail("a@example.net", ["b@example.org"], MESSAGE)

    behind(salmon, talk)
    assert salmon.handled[0].Peer == ("2001:db8::9", 5)
    assert b"[IPv6:2001:db8::9]" in salmon.handled[0].Data


@pytest.mark.parametrize("version", ITSELF)
def test_when_the_balancer_speaks_for_itself_it_is_the_client(salmon: Salmon, version: str) -> None:
    salmon.handle(".*")

    def talk(port: int) -> None:
        with Client(port, ITSELF[version]) as client:
            client.sendmail("a@example.net", ["b@example.org"], MESSAGE)

    behind(salmon, talk)
    assert salmon.handled[0].Peer[0] == "127.0.0.1"


def test_what_a_client_says_too_early_is_its_own(salmon: Salmon) -> None:
    """It stands after the header in the same packet, and is neither lost nor the header's."""

    def talk(port: int) -> None:
        with connected(port, HEADERS["v1"] + b"NOOP\r\nQUIT\r\n") as connection:
            heard = connection.makefile("rb").read()
        assert [line[:3] for line in heard.splitlines()] == [b"220", b"250", b"221"]

    behind(salmon, talk)


def test_starttls_after_a_header(salmon: Salmon) -> None:
    salmon.handle(".*")

    def talk(port: int) -> None:
        with Client(port, HEADERS["v2"]) as client:
            client.starttls(context=ssl.create_default_context(cafile=str(CERTIFICATE)))
            client.sendmail("a@example.net", ["b@example.org"], MESSAGE)

    behind(salmon, talk, **TLS)
    assert salmon.handled[0].Peer == CLIENT
    assert b"with ESMTPS id" in salmon.handled[0].Data


@pytest.mark.parametrize("early", [0, 1, 10_000])
def test_tls_from_the_start_begins_after_the_header(
    salmon: Salmon, early: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where octets of the handshake come in the packet of the header."""
    caplog.set_level(logging.INFO)

    def talk(port: int) -> None:
        context = ssl.create_default_context(cafile=str(CERTIFICATE))
        come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(come, go, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        hello = go.read()
        with connected(port, HEADERS["v2"] + hello[:early]) as connection:
            connection.sendall(hello[early:])
            heard = b""
            while not heard:
                assert come.write(connection.recv(65536)), "it was closed"
                with contextlib.suppress(ssl.SSLWantReadError):
                    heard = tls.read()
                connection.sendall(go.read())
            assert heard.startswith(b"220 ")
            tls.write(b"EHLO x\r\nAUTH PLAIN AGFjbWUAd3Jvbmc=\r\n")  # acme, wrong
            connection.sendall(go.read())
            while b"\r\n535 " not in heard:
                assert come.write(connection.recv(65536)), "it was closed"
                with contextlib.suppress(ssl.SSLWantReadError):
                    heard += tls.read()

    async def work(here: World) -> None:
        assert here.daemon.provider is not None
        implicit = here.daemon.provider.listeners[1].port
        await asyncio.to_thread(talk, implicit)

    provider_behind(salmon, work, listen_implicit="127.0.0.1:0", **TLS)
    assert "peer=203.0.113.9 account='acme'" in caplog.text


# -- who is let in ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "admitted"),
    [
        ({"deny": ["203.0.113.0/24"]}, False),
        ({"deny": ["127.0.0.0/8"]}, True),
        ({"allow": ["127.0.0.0/8"]}, False),
        ({"allow": ["203.0.113.9"]}, True),
    ],
)
def test_access_control_is_for_the_client(
    salmon: Salmon, rules: dict[str, Any], admitted: bool
) -> None:
    def talk(port: int) -> None:
        if admitted:
            Client(port, HEADERS["v2"]).quit()
            return
        with pytest.raises(smtplib.SMTPConnectError) as refused:
            Client(port, HEADERS["v2"])
        assert refused.value.smtp_code == 554

    behind(salmon, talk, **rules)


def test_a_client_is_not_believed_because_its_balancer_is(salmon: Salmon) -> None:
    def talk(port: int) -> None:
        with Client(port, HEADERS["v2"]) as client:
            client.ehlo()
            assert client.docmd("XFORWARD", "ADDR=192.0.2.7")[0] == 550
        with Client(port, ITSELF["v2"]) as client:
            client.ehlo()
            assert client.docmd("XFORWARD", "ADDR=192.0.2.7")[0] == 250

    behind(salmon, talk, forwarded_from=["127.0.0.1"])


@pytest.mark.parametrize("implicit", [False, True])
def test_places_are_counted_for_clients_and_not_for_the_balancer(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, implicit: bool
) -> None:
    monkeypatch.setattr(listening, "MAX_PER_ADDRESS", 2)
    headers = [b"PROXY TCP4 203.0.%d.9 192.0.2.1 41234 25\r\n" % n for n in (1, 1, 2, 2, 3)]

    def talk(port: int) -> None:
        with contextlib.ExitStack() as stack:
            for header in headers:
                assert stack.enter_context(Client(port, header)).noop()[0] == 250
            with pytest.raises(smtplib.SMTPConnectError) as refused:
                Client(port, headers[0])
            assert refused.value.smtp_code == 421

    def in_handshakes(port: int) -> None:
        with contextlib.ExitStack() as stack:
            for header in headers:
                stack.enter_context(connected(port, header))
            with connected(port, headers[0]) as one:
                assert one.recv(1) == b"", "turned away"

    async def work(here: World) -> None:
        assert here.daemon.provider is not None
        monkeypatch.setattr(places, "IDLE", 1000.0)
        port = here.daemon.provider.listeners[implicit].port
        await asyncio.to_thread(in_handshakes, port)

    if implicit:
        keys = {"listen_implicit": "127.0.0.1:0", "max_sessions_per_address": 2}
        provider_behind(salmon, work, **keys, **TLS)
    else:
        behind(salmon, talk)


def test_who_guesses_passwords_is_shut_out_and_not_all_behind_the_balancer(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logins, "MOST", 2)
    monkeypatch.setattr(logins, "FIRST_DELAY", 0.0)

    def talk(port: int) -> None:
        with Client(port, HEADERS["v2"]) as client:
            client.ehlo()
            for code in (535, 421):
                with pytest.raises(smtplib.SMTPResponseException) as refused:
                    client.login("acme", "wrong")
                assert refused.value.smtp_code == code
        with pytest.raises(smtplib.SMTPConnectError):
            Client(port, HEADERS["v1"])
        with Client(port, b"PROXY TCP4 203.0.114.9 192.0.2.1 41234 25\r\n") as client:
            client.ehlo()
            assert client.login("acme", PASSWORD)[0] == 235

    async def work(here: World) -> None:
        await asyncio.to_thread(talk, here.odmr)

    provider_behind(salmon, work)


def test_a_session_is_its_customers_and_not_the_balancers(salmon: Salmon) -> None:
    """As ``provider sessions`` shows it."""
    shown: list[tuple[str, int]] = []

    def talk(here: World) -> None:
        with connected(here.odmr, HEADERS["v2"]) as connection:
            heard = connection.makefile("rb")

            def said(line: str, code: bytes) -> bytes:
                connection.sendall(line.encode())
                while not (answer := heard.readline()).startswith(code):
                    assert answer, line
                return answer

            said("EHLO x\r\n", b"250 ")
            nonce = base64.b64decode(said("AUTH CRAM-MD5\r\n", b"334 ")[4:])
            digest = hmac.new(PASSWORD.encode(), nonce, "md5").hexdigest()
            proof = base64.b64encode(f"acme {digest}".encode()).decode()
            said(f"{proof}\r\n", b"235 ")
            said("XHOLD\r\n", b"250 ")
            said("ATRN\r\n", b"250 ")
            shown.extend(one.peer for one in here.daemon.sessions)

    async def work(here: World) -> None:
        await asyncio.to_thread(talk, here)

    provider_behind(salmon, work)
    assert shown == [CLIENT]


# -- what is no header -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"EHLO x\r\n", "does not begin with a PROXY header"),
        (b"\x16\x03\x01", "does not begin with a PROXY header"),
        (b"PROXY TCP4 x\r\n", "malformed"),
        (version_2(0x21, 0x11, bytes(5000)), "longer than 4096 octets"),
    ],
)
def test_a_balancer_that_says_something_else_is_dropped(
    salmon: Salmon, said: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    def talk(port: int) -> None:
        with connected(port, said) as connection:
            assert reset(connection)

    with caplog.at_level(logging.WARNING):
        behind(salmon, talk)
    [line] = caplog.messages
    assert line.startswith("service=default peer=127.0.0.1 proxy_from: ") and why in line


@pytest.mark.parametrize("said", [b"", HEADERS["v1"][:-1], HEADERS["v2"][:-1]])
def test_a_balancer_that_says_nothing_is_dropped_in_time(
    salmon: Salmon,
    said: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(forecourt, "HEADER", 0.2)

    def talk(port: int) -> None:
        with connected(port, said) as connection:
            assert reset(connection)

    with caplog.at_level(logging.WARNING):
        behind(salmon, talk)
    [line] = caplog.messages
    assert "no PROXY header came in 0.2 seconds" in line


@pytest.mark.parametrize(("said", "lines"), [(b"", 0), (HEADERS["v1"][:-1], 1)])
def test_a_balancer_that_goes_without_a_header(
    salmon: Salmon, said: bytes, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One that only looks whether the port is open does so every other second."""

    def talk(port: int) -> None:
        with connected(port, said):
            pass
        Client(port, HEADERS["v1"]).quit()  # after that one

    with caplog.at_level(logging.WARNING):
        behind(salmon, talk)
    assert len(caplog.messages) == lines


def test_what_a_stranger_says_is_no_header(salmon: Salmon) -> None:
    salmon.handle(".*")

    def talk(port: int) -> None:
        for header, code in ((HEADERS["v1"], 500), (HEADERS["v2"], 500)):
            with connected(port, b"") as connection:
                heard = connection.makefile("rb")
                assert heard.readline().startswith(b"220 "), "greeted at once"
                connection.sendall(header + b"\r\n")
                assert int(heard.readline()[:3]) == code
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.sendmail("a@example.net", ["b@example.org"], MESSAGE)

    behind(salmon, talk, proxy_from=["192.0.2.0/24"])
    assert salmon.handled[0].Peer[0] == "127.0.0.1"


def test_only_so_many_wait_for_their_header(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forecourt, "WAITING", 2)

    def talk(port: int) -> None:
        with connected(port, b"P") as one, connected(port, b"P"):
            with connected(port, b"P") as third:
                assert reset(third)
            one.sendall(HEADERS["v1"][1:])
            assert one.recv(4) == b"220 "
            Client(port, HEADERS["v1"]).quit()

    with caplog.at_level(logging.WARNING):
        behind(salmon, talk)
    assert "more than 2 connections wait for a PROXY header" in caplog.text


def test_a_stop_waits_for_no_header(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecourt, "HEADER", 10 * LONG)

    async def main() -> None:
        async with listener(salmon, proxy_from=["127.0.0.1"]) as one:
            reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
            greeted, greeting = await asyncio.open_connection("127.0.0.1", one.port)
            greeting.write(HEADERS["v1"])
            await greeted.readline()  # so the one before it has been accepted, too
            began = time.monotonic()
            await one.stop(LONG)
            assert time.monotonic() - began < LONG / 2
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), LONG)
            writer.close()
            greeting.close()

    asyncio.run(main())


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("192.0.2.1", "a single string is not a list"),
        (["192.168.1.1/24"], "192.168.1.0/24"),
        (["balancer.example.net"], "is no network"),
    ],
)
@pytest.mark.parametrize("of", ["service", "provider"])
def test_wrong_networks(of: str, value: object, words: str) -> None:
    keys: dict[str, Any] = {"proxy_from": value}
    with pytest.raises(SettingsError) as found:
        if of == "service":
            configuration(default=keys)
        else:
            configuration(provider=keys)
    [problem] = [one for one in str(found.value).splitlines() if "proxy_from" in one]
    assert words in problem and "192.0.2.0/24" in problem
