"""Loops and storms: mail that makes mail, and calls that reach ourselves."""

from __future__ import annotations

import asyncio
import smtplib
from types import SimpleNamespace
from typing import Any

import pytest
from salmon.mail import MailRequest
from support.configuration import agent_keys, configuration
from support.holding import Holding
from support.messages import MESSAGE
from support.salmon import Salmon, fails

from salmon_revsmtp.customer import odmr
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.delivery.trace import MAX_HOPS
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.smtp.envelope import Envelope


class World:
    """A provider to which whatever the relay is given comes back."""

    def __init__(self, salmon: Salmon) -> None:
        self.salmon = salmon
        self.held = Holding(salmon.folder / "provider")
        self.mailed: list[tuple[str, str]] = []
        salmon.relay = SimpleNamespace(deliver=self._relay)

    def _relay(self, message: Any, To: str, From: str) -> None:
        self.mail(str(message).encode().replace(b"\n", b"\r\n"), To, From.strip("<>"))

    def mail(self, data: bytes, recipient: str, sender: str = "ann@example.net") -> None:
        self.mailed.append((sender, recipient))
        self.held.put(Envelope(sender, (recipient,)), data)

    def collect(self) -> Report:
        async def main() -> Report:
            plugins = Plugins.load()
            async with self.held.provider() as provider:
                valid = configuration(agent_keys(provider.port), plugins=plugins)
                with Collector(valid, plugins, lambda: self.salmon.relay) as collector:
                    [report] = await collector.collect(valid.agents)
            return report

        return asyncio.run(main())


def test_a_handler_that_mails_back_does_not_make_a_collection_endless(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(odmr, "MAX_SESSIONS", 7)
    world = World(salmon)

    def answers(message: MailRequest) -> None:
        number = len(salmon.handled)
        world.mail(MESSAGE + b"answer %d\r\n" % number, "robot@example.org", "robot@example.org")

    salmon.handle("robot@.*", answers)
    world.mail(MESSAGE, "robot@example.org")
    report = world.collect()
    assert (report.outcome, report.sessions) == (Outcome.COLLECTED, 7)
    # An answer may still come in the session of the message that it answers.
    assert report.messages == len(salmon.handled) >= 7, "each once"
    assert len(world.mailed) == len(salmon.handled) + 1
    assert "does a handler mail back into a domain that is collected?" in caplog.text
    assert len(world.held) == 1, "the next collection's"


@pytest.mark.parametrize("form", ["as it came", "as Salmon writes it"])
def test_a_message_that_is_forwarded_in_a_circle_ends(salmon: Salmon, form: str) -> None:
    """With the headers kept, as forwarding is done."""
    world = World(salmon)

    def forwards(message: MailRequest) -> None:
        data = message.Data if form == "as it came" else str(message).encode()
        world.mail(data.replace(b"\n", b"\r\n"), "b@example.org")

    salmon.handle("b@.*", forwards)
    world.mail(MESSAGE, "b@example.org")
    report = world.collect()
    assert report.outcome is Outcome.COLLECTED
    assert len(salmon.handled) == MAX_HOPS
    assert report.refused == 1
    assert len(world.held) == 0


def test_a_notification_that_comes_back_makes_no_other(salmon: Salmon) -> None:
    """The sender is one of our own addresses, and its handler refuses everything."""
    world = World(salmon)
    salmon.handle("good@.*")
    salmon.handle("(never|sender)@.*", fails(550, "5.1.1 no"))
    world.held.put(
        Envelope("sender@example.org", ("good@example.org", "never@example.org")), MESSAGE
    )
    # Our provider speaks PRDR and would hear of "never" by itself.
    world.held.put(Envelope("sender@example.org", ("good@example.org",)), MESSAGE)
    assert world.collect().outcome is Outcome.COLLECTED
    assert world.mailed == []

    async def without_prdr() -> None:
        plugins = Plugins.load()
        service = {"hostname": "x", "listen": "127.0.0.1:0"}
        valid = configuration(agent_keys(366), plugins=plugins, default=service)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            [listener] = await collector.listeners()
            await listener.start()
            everyone = ["good@example.org", "never@example.org"]
            data = MESSAGE + b"another\r\n"
            await asyncio.to_thread(_send, listener.port, "sender@example.org", everyone, data)
            await listener.stop(5)

    asyncio.run(without_prdr())
    assert world.mailed == [("", "sender@example.org")]
    report = world.collect()
    assert report.refused == 1
    assert world.collect().outcome is Outcome.NO_MAIL
    assert world.mailed == [("", "sender@example.org")]


def _send(port: int, sender: str, recipients: list[str], data: bytes) -> None:
    with smtplib.SMTP("127.0.0.1", port) as client:
        client.sendmail(sender, recipients, data)


def test_a_handler_that_mails_to_our_own_listener_waits_no_longer_than_its_timeout(
    salmon: Salmon,
) -> None:
    """There is one delivery thread: what the handler sends cannot be handled before it returns."""
    ports: list[int] = []
    refused: list[int] = []

    def sends(message: MailRequest) -> None:
        try:
            _send(ports[0], "a@example.org", ["b@example.org"], MESSAGE + b"inner\r\n")
        except smtplib.SMTPDataError as error:
            refused.append(error.smtp_code)

    salmon.handle("a@.*", sends)
    salmon.handle("b@.*")

    async def main() -> None:
        plugins = Plugins.load()
        service = {"hostname": "x", "listen": "127.0.0.1:0", "handler_timeout": 1.5}
        valid = configuration(agent_keys(366), plugins=plugins, default=service)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            [listener] = await collector.listeners()
            await listener.start()
            ports.append(listener.port)
            with pytest.raises(smtplib.SMTPDataError, match="451"):
                await asyncio.to_thread(
                    _send, listener.port, "ann@example.net", ["a@example.org"], MESSAGE
                )
            # Its own sender tries again, and hears what became of it.
            await asyncio.to_thread(
                _send, listener.port, "ann@example.net", ["a@example.org"], MESSAGE
            )
            await listener.stop(5)

    asyncio.run(main())
    assert refused == [451]
    assert [message.To for message in salmon.handled] == ["a@example.org"]


@pytest.mark.parametrize("protocol", ["odmr", "etrn"])
def test_an_agent_pointed_at_ourselves_fails_and_says_so(salmon: Salmon, protocol: str) -> None:
    async def main() -> Report:
        plugins = Plugins.load()
        service = {"hostname": "mail.example.org", "listen": "127.0.0.1:0"}
        listening = configuration(agent_keys(366), plugins=plugins, default=service)
        with Collector(listening, plugins, lambda: salmon.relay) as collector:
            [listener] = await collector.listeners()
            await listener.start()
            keys = agent_keys(listener.port, server="127.0.0.1", protocol=protocol)
            if protocol == "etrn":
                del keys["account"], keys["password"]
            valid = configuration(keys, plugins=plugins, default=service)
            with Collector(valid, plugins, lambda: salmon.relay) as other:
                [report] = await other.collect(valid.agents)
            await listener.stop(5)
        return report

    report = asyncio.run(main())
    assert report.outcome is Outcome.FAILED
    words = {"odmr": "offers no AUTH", "etrn": "does not offer ETRN"}[protocol]
    assert report.error is not None and words in report.error
