"""A service that listens, talked to by the standard library's client."""

from __future__ import annotations

import asyncio
import smtplib
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.configuration import agent_keys, configuration
from support.listener import listener
from support.messages import MESSAGE
from support.plugins import module
from support.salmon import Salmon
from support.tls import CERTIFICATE, PRIVATE_KEY

from salmon_revsmtp.net import listener as listening
from salmon_revsmtp.net.listener import Listener
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.settings import SettingsError


def with_listener(
    salmon: Salmon,
    talk: Callable[[int], None],
    *,
    plugins: Plugins | None = None,
    **service: Any,
) -> None:
    """Have ``talk`` speak to a listener's port, in a thread."""

    async def main() -> None:
        async with listener(salmon, plugins=plugins, **service) as one:
            await asyncio.to_thread(talk, one.port)

    asyncio.run(main())


def test_it_takes_mail_for_several_recipients_in_one_transaction(salmon: Salmon) -> None:
    salmon.handle(".*")

    def talk(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port) as client:
            refused = client.sendmail(
                "a@example.net",
                ["b@example.org", "c@example.org", "d@elsewhere.example"],
                MESSAGE,
            )
            assert list(refused) == ["d@elsewhere.example"]
            assert refused["d@elsewhere.example"][0] == 550

    with_listener(salmon, talk)
    assert [message.To for message in salmon.handled] == ["b@example.org", "c@example.org"]
    trace = b" ".join(salmon.handled[0].Data.split(b"\nFrom:")[0].split())
    assert b"(salmon-revsmtp service default) with ESMTP id" in trace


def test_starttls_is_offered_with_a_certificate(salmon: Salmon) -> None:
    salmon.handle(".*")

    def talk(port: int) -> None:
        with smtplib.SMTP("localhost", port) as client:
            client.starttls(context=ssl.create_default_context(cafile=CERTIFICATE))
            client.ehlo()
            assert not client.has_extn("starttls")
            client.sendmail("a@example.net", ["b@example.org"], MESSAGE)

    keys: dict[str, Any] = {"tls_cert": str(CERTIFICATE), "tls_key": str(PRIVATE_KEY)}
    with_listener(salmon, talk, listen="localhost:0", **keys)
    assert b"with ESMTPS id" in salmon.handled[0].Data


def test_without_a_certificate_there_is_no_starttls(salmon: Salmon) -> None:
    def talk(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.ehlo()
            assert not client.has_extn("starttls")
            assert client.docmd("STARTTLS")[0] == 502

    with_listener(salmon, talk)


def test_bytes_behind_starttls_are_never_read(salmon: Salmon) -> None:
    def talk(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.ehlo()
            client.send(b"STARTTLS\r\nMAIL FROM:<evil@example.net>\r\n")
            assert client.getreply()[0] == 421

    with_listener(salmon, talk, tls_cert=str(CERTIFICATE), tls_key=str(PRIVATE_KEY))


@pytest.mark.parametrize(
    ("rules", "admitted"),
    [
        ({"deny": ["127.0.0.0/8"]}, False),
        ({"allow": ["192.0.2.0/24"]}, False),
        ({"allow": ["127.0.0.1"]}, True),
        ({"allow": ["127.0.0.0/8"], "deny": ["127.0.0.1/32"]}, False),
    ],
)
def test_access_control(salmon: Salmon, rules: dict[str, Any], admitted: bool) -> None:
    def talk(port: int) -> None:
        if admitted:
            smtplib.SMTP("127.0.0.1", port).quit()
            return
        with pytest.raises(smtplib.SMTPConnectError) as refused:
            smtplib.SMTP("127.0.0.1", port)
        assert refused.value.smtp_code == 554

    with_listener(salmon, talk, **rules)


def test_connections_of_one_address_are_bounded(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "MAX_PER_ADDRESS", 2)

    def talk(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port), smtplib.SMTP("127.0.0.1", port):
            with pytest.raises(smtplib.SMTPConnectError) as refused:
                smtplib.SMTP("127.0.0.1", port)
            assert refused.value.smtp_code == 421
        smtplib.SMTP("127.0.0.1", port).quit()

    with_listener(salmon, talk)


def test_the_plugin_of_the_documentation_hears_of_mail_that_no_agent_collected(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    plugins = Plugins.load()
    plugins.register(module("spool", monkeypatch), "spool")
    salmon.handle(".*")

    def talk(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.sendmail("a@example.net", ["b@example.org"], MESSAGE)

    with_listener(salmon, talk, plugins=plugins)
    said = [one.getMessage() for one in caplog.records if one.name == "spool"]
    assert said == ["a listening service: b@example.org: 250 2.0.0 delivered"]
    assert "plugin=spool" not in caplog.text, "it raised"


def dialogue(salmon: Salmon, work: Callable[[Listener, Any, Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with listener(salmon) as one:
            reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
            await asyncio.wait_for(work(one, reader, writer), 60)
            writer.close()

    asyncio.run(main())


def test_stopping_finishes_the_message_in_hand_and_takes_no_other(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def work(one: Listener, reader: Any, writer: Any) -> None:
        writer.write(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nDATA\r\nSubject: x\r\n")
        while not (await reader.readline()).startswith(b"354"):
            pass
        stopping = asyncio.create_task(one.stop(10))
        await asyncio.sleep(0)
        writer.write(b"\r\nhello\r\n.\r\nMAIL FROM:<>\r\n")
        replies = (await reader.read()).decode().splitlines()
        assert [line[:3] for line in replies] == ["250", "421"]
        await stopping

    dialogue(salmon, work)
    assert len(salmon.handled) == 1


def test_stopping_sends_an_idle_client_away(salmon: Salmon) -> None:
    async def work(one: Listener, reader: Any, writer: Any) -> None:
        assert (await reader.readline()).startswith(b"220")
        await one.stop(10)
        assert (await reader.read()).startswith(b"421 4.3.2")

    dialogue(salmon, work)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"listen": "somewhere"}, "listen: found 'somewhere'"),
        ({"listen": "127.0.0.1:0", "tls_key": "x"}, "tls_key: it needs a tls_cert"),
        (
            {"listen": "127.0.0.1:0", "tls_cert": "/nowhere"},
            "tls_cert: /nowhere cannot be read: No such",
        ),
    ],
)
def test_wrong_settings(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        configuration(agent_keys(366), default=keys)


def test_a_listening_service_needs_domains() -> None:
    with pytest.raises(SettingsError, match="no agent of the service asks for any"):
        configuration(default={"listen": "127.0.0.1:0"})
