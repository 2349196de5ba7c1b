"""What a person reads when the network fails: what was done, to whom, what came back, what to try.

Each error is a real one: of a socket on the loopback, or of the system's resolver.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from salmon.server import Relay
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue, Script
from support.project import Project, isp
from support.tls import server_tls

from salmon_revsmtp.delivery.relay import address_of, try_relay, why
from salmon_revsmtp.net.listener import cannot_listen, why_not_listen
from salmon_revsmtp.net.outcome import CollectionError
from salmon_revsmtp.net.words import came_back, reach_advice
from salmon_revsmtp.service.policy import Service


def said(port: int, **keys: Any) -> str:
    """What an agent's check says that does not come far."""
    [agent] = configuration(agent_keys(port, **{"timeout": 2, **keys})).agents
    service = Service("default", configuration().services["default"])
    with pytest.raises(CollectionError) as raised:
        asyncio.run(agent.check(service))
    return str(raised.value)


def said_of(script: Script, context: ssl.SSLContext | None = None, **keys: Any) -> str:
    """The same of a server that follows a script as far as it gets, under TLS if there is a
    context."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, AssertionError):
            await script(Dialogue(reader, writer))
        writer.close()

    async def main() -> str:
        server = await asyncio.start_server(serve, "localhost", 0, family=2, ssl=context)
        async with server:
            return await asyncio.to_thread(said, server.sockets[0].getsockname()[1], **keys)

    return asyncio.run(main())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# -- an agent and its server -----------------------------------------------------------------------


def test_a_port_where_no_one_listens() -> None:
    port = free_port()
    assert said(port, server="127.0.0.1") == (
        f"connecting to 127.0.0.1:{port}: 127.0.0.1: Connection refused; is it running, is the "
        "port right?"
    )


def test_several_addresses_have_one_advice() -> None:
    text = said(free_port(), server="localhost")  # IPv4 and IPv6, where there is that
    assert text.count("Connection refused") >= 1
    assert text.count("is it running") == 1


def test_a_name_that_is_not_there() -> None:
    text = said(366, server="odmr.invalid")
    assert text.startswith("connecting to odmr.invalid:366: its name was not resolved (")
    assert text.endswith("); check server; is the name right, and does DNS work here?")


async def silence(server: Dialogue) -> None:
    await server.ignore()


async def greeting(server: Dialogue) -> None:
    server.say("220 odmr")
    await server.ignore()


async def with_starttls(server: Dialogue) -> None:
    server.say("220 odmr")
    await server.asks("EHLO", "250-odmr", "250 STARTTLS")
    await server.asks("STARTTLS", "220 go ahead")
    with contextlib.suppress(OSError, ssl.SSLError):
        await server.starttls(server_tls())


async def answers_in_the_clear(server: Dialogue) -> None:
    server.say("220 odmr")
    await server.asks("EHLO", "250-odmr", "250 STARTTLS")
    await server.asks("STARTTLS", "220 go ahead")
    await server.reader.read(5)  # the beginning of TLS
    server.say("554 what is that?")
    await server.ignore()


@pytest.mark.parametrize(
    ("script", "tls", "words"),
    [
        (silence, "starttls", ["no greeting in", "set tls to 'implicit', or check port"]),
        (silence, "implicit", ["no TLS handshake in", "set tls to 'starttls', or check port"]),
        (greeting, "implicit", ["does not speak TLS there", "set tls to 'starttls', or check"]),
        (answers_in_the_clear, "starttls", ["does not speak TLS there: it answered in the clear"]),
        (with_starttls, "starttls", ["self-signed certificate", "set ca_file to the certificate"]),
    ],
)
def test_a_port_that_speaks_something_else(script: Script, tls: str, words: list[str]) -> None:
    text = said_of(script, tls=tls, timeout=0.7)
    assert text.startswith(("connecting to localhost:", "STARTTLS with localhost:"))
    for word in words:
        assert word in text


def test_a_tls_port_where_starttls_was_meant() -> None:
    assert "set tls to 'implicit'" in said_of(silence, server_tls(), tls="starttls", timeout=0.7)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("expired", ["certificate has expired", "its owner has to renew it", "the clock here"]),
        ("later", ["not yet valid", "it is valid later, unless the clock here is wrong"]),
        ("name", ["Hostname mismatch", "set server to a name that it is for"]),
        ("stranger", ["unable to get local issuer", "set ca_file to the certificate or CA"]),
        ("self-signed", ["self-signed certificate", "no CA that is trusted here has signed it"]),
    ],
)
def test_a_certificate_that_is_refused(tmp_path: Path, fault: str, words: list[str]) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    trusted = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(trusted)
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    made: dict[str, Callable[[], trustme.LeafCert]] = {
        "expired": lambda: authority.issue_cert(
            "localhost", not_before=now - 2 * day, not_after=now - day
        ),
        "later": lambda: authority.issue_cert(
            "localhost", not_before=now + day, not_after=now + 2 * day
        ),
        "name": lambda: authority.issue_cert("mx.example.net"),
        "stranger": lambda: stranger.issue_cert("localhost"),
    }
    context = server_tls()
    if fault in made:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made[fault]().configure_cert(context)
    text = said_of(silence, context, tls="implicit", ca_file=str(trusted))
    assert "its certificate was not accepted (" in text
    for word in words:
        assert word in text
    assert "_ssl.c" not in text


# -- what the system says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ECONNREFUSED, "Connection refused; is it running, is the port right?"),
        (errno.EHOSTUNREACH, "No route to host; is this machine online"),
        (errno.ENETUNREACH, "Network is unreachable; is this machine online"),
        (errno.ETIMEDOUT, "Connection timed out; is it running, is the port right, does a fire"),
        (errno.ECONNRESET, "Connection reset by peer; is the port right"),
        (errno.EPERM, "Operation not permitted; a firewall of this machine forbids it"),
    ],
)
def test_what_cannot_be_reached(number: int, words: str) -> None:
    error = OSError(number, os.strerror(number))
    assert f"{came_back(error)}; {reach_advice(error)}".startswith(words)


# -- listening -------------------------------------------------------------------------------------


def not_listening(host: str, port: int) -> str:
    return asyncio.run(why_not_listen("service=default", host, port)) or ""


def test_an_address_that_another_program_has() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not_listening("127.0.0.1", port) == (
            f"service=default cannot listen on 127.0.0.1:{port}: Address already in use; another "
            "program has it, maybe a mail server, or this one a second time; "
            f"`ss -ltnp 'sport = :{port}'` says which"
        )


def test_an_address_that_is_another_machines() -> None:
    text = not_listening("192.0.2.1", free_port())
    assert "Cannot assign requested address; this machine has no such address" in text


def test_a_name_to_listen_on_that_is_not_there() -> None:
    assert "is the host right? 0.0.0.0 and [::]" in not_listening("mx.invalid", free_port())


def test_a_port_that_needs_a_privilege() -> None:
    # Root, and containers, may have every port.
    error = PermissionError(errno.EACCES, "Permission denied")
    text = str(cannot_listen("provider", "0.0.0.0", 366, error))
    assert "provider cannot listen on 0.0.0.0:366: Permission denied; ports below 1024 need" in text
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE" in text
    assert "`sysctl net.ipv4.ip_unprivileged_port_start=366`" in text
    assert "privilege" not in str(cannot_listen("x", "0.0.0.0", 2525, error))


# -- the relay -------------------------------------------------------------------------------------


@contextlib.contextmanager
def relay_says(*lines: bytes) -> Iterator[int]:
    """A relay that says a line, and one more for each line that it hears."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection, connection.makefile("rb") as heard:
                    for line in lines:
                        connection.sendall(line + b"\r\n")
                        heard.readline()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        thread.join(60)


@pytest.mark.parametrize(
    ("lines", "keys", "words"),
    [
        ([b"554 no"], {}, "it said 554 no"),
        ([], {}, "it broke the connection off"),
        ([b"220 x", b"250 x"], {"starttls": True}, "STARTTLS extension not supported by server"),
        (
            [b"220 x", b"250-x\r\n250 AUTH PLAIN", b"535 no such user"],
            {"username": "u", "password": "p"},
            "logging in, it said 535 no such user; check username and password of relay_config",
        ),
    ],
)
def test_what_a_relay_says(lines: list[bytes], keys: dict[str, Any], words: str) -> None:
    with relay_says(*lines) as port, pytest.raises(OSError) as raised:
        try_relay(Relay("127.0.0.1", port, **keys), 5)
    assert words in why(raised.value)


def test_a_relay_that_is_there_and_one_that_is_not() -> None:
    with relay_says(b"220 x", b"250 x", b"221 x") as port:
        try_relay(Relay("127.0.0.1", port), 5)
    relay = Relay("127.0.0.1", free_port())
    with pytest.raises(OSError) as raised:
        try_relay(relay, 5)
    assert why(raised.value) == "Connection refused; is it running, is the port right?"
    assert address_of(relay) == f"127.0.0.1:{relay.port}"
    with pytest.raises(OSError) as raised:
        try_relay(Relay("relay.invalid", 25), 5)
    assert "check host of relay_config" in why(raised.value)


# -- Salmon's receiver -----------------------------------------------------------------------------


def test_the_port_of_salmons_receiver_is_named(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        project.configure(isp(1))
        settings = project.folder / "config/settings.py"
        port = taken.getsockname()[1]
        receiver = f"receiver_config = {{'host': '127.0.0.1', 'port': {port}}}\n"
        settings.write_text(settings.read_text() + receiver)
        done = project.run("check")
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "Address already in use: another program has the port of Salmon's receiver" in told
    assert "(config/boot.py, line" in told
