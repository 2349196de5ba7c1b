"""The plugin of the page "A spam filter" asks a real rspamd, at home and at a provider's intake."""

from __future__ import annotations

import asyncio
import smtplib
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from support.collecting import exchange
from support.configuration import agent_keys, configuration
from support.ends import Ends, both_ends
from support.listener import listener
from support.plugins import module
from support.rspamd import Rspamd
from support.salmon import Salmon
from support.world import World, in_the_world

from salmon_revsmtp import (
    Agent,
    AgentSettings,
    Collection,
    Envelope,
    Outcome,
    QueueConsumer,
    hookimpl,
)
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.smtp.envelope import Client

pytestmark = pytest.mark.interop

# rspamd's own test patterns: reject, add header, rewrite subject.
PATTERN = b"JS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X\r\n"
GTUBE, SPAM, RENAMED = (letter + PATTERN for letter in (b"X", b"Y", b"Z"))
HEADER = (
    f"From: Ann <ann@example.net>\r\nTo: b@example.org\r\nSubject: tomorrow\r\n"
    f"Date: {formatdate()}\r\nMessage-ID: <1@example.net>\r\n"
).encode()
BODY = b"\r\nDear Bea,\r\n\r\nthe train is at nine. See you there!\r\n"
HAM = HEADER + BODY


@pytest.fixture(scope="module")
def rspamd(chroot: Callable[[str], Path]) -> Iterator[Rspamd]:
    with Rspamd(chroot("rspamd")) as server:
        yield server


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, rspamd: Rspamd) -> Any:
    """The plugin's module, which asks that server."""
    found = module("rspamd", monkeypatch)
    found.from_environment.cache_clear()
    monkeypatch.setenv("RSPAMD_URL", rspamd.url)
    return found


@pytest.fixture
def plugins(plugin: Any) -> Plugins:
    found = Plugins.load()
    found.register(plugin, "rspamd")
    return found


def spam_fields(message: bytes) -> dict[str, str]:
    """What the plugin has added, which is beneath our Received line."""
    header = message.replace(b"\r\n", b"\n").partition(b"\n\n")[0].replace(b"\n\t", b" ").decode()
    received, *fields = header.split("\n")
    assert received.startswith("Received: ")
    added = [one.partition(": ") for one in fields if one.startswith("X-Spam")]
    assert [one.split(":")[0] for one in fields[: len(added)]] == [name for name, _, _ in added]
    return {name: value for name, _, value in added}


def symbols(message: bytes) -> set[str]:
    return set(spam_fields(message)["X-Spam-Symbols"].split(", "))


def send(port: int, data: bytes, source: str = "127.0.0.1", sender: str = "ann@example.net") -> Any:
    """Send a message from an address of the loopback; what the server says at its end."""
    with smtplib.SMTP("127.0.0.1", port, source_address=(source, 0)) as client:
        client.ehlo("mx.example.net")
        client.mail(sender)
        client.rcpt("b@example.org")
        code, text = client.data(data)
        return code, text.decode()


def sent(
    salmon: Salmon, plugins: Plugins, *messages: tuple[bytes, str], **service: Any
) -> list[Any]:
    """Send messages (octets, source address) to a listening service; what it says of each."""

    async def main() -> list[Any]:
        async with listener(salmon, plugins=plugins, **service) as one:
            return [
                await asyncio.to_thread(send, one.port, data, source) for data, source in messages
            ]

    return asyncio.run(main())


# -- at home ---------------------------------------------------------------------------------------


def test_ham_passes_and_spf_is_that_of_the_client(salmon: Salmon, plugins: Plugins) -> None:
    salmon.handle(".*")
    answers = sent(salmon, plugins, (HAM, "127.0.0.2"), (HAM + b"PS\r\n", "127.0.0.3"))
    assert [code for code, _ in answers] == [250, 250]
    allowed, forbidden = (message.Data for message in salmon.handled)
    assert spam_fields(allowed)["X-Spam"] == "No"
    assert "R_SPF_ALLOW" in symbols(allowed) and "R_SPF_FAIL" not in symbols(allowed)
    assert "R_SPF_FAIL" in symbols(forbidden) and "R_SPF_ALLOW" not in symbols(forbidden)


@pytest.mark.parametrize("delivery", ["router", "queue"])
def test_what_rspamd_rejects_is_refused_with_its_words_and_what_it_marks_is_marked(
    salmon: Salmon, plugins: Plugins, delivery: str
) -> None:
    salmon.handle(".*")
    # rspamd does not see a body that is one line without an end.
    messages = [(HEADER + b"\r\n" + end, "127.0.0.2") for end in (GTUBE, SPAM, RENAMED)]
    answers = sent(salmon, plugins, *messages, delivery=delivery)
    assert answers[0] == (550, "5.7.1 Gtube pattern")
    assert [code for code, _ in answers[1:]] == [250, 250]
    if delivery == "queue":
        QueueConsumer(relay=lambda: salmon.relay).start(one_shot=True)
    assert len(salmon.handled) == 2
    for message in salmon.handled:
        assert spam_fields(message.Data)["X-Spam"] == "Yes"
        assert message["X-Spam"] == "Yes"
        assert "GTUBE" in symbols(message.Data)


def test_what_rspamd_rejects_is_marked_where_nothing_is_refused(
    salmon: Salmon, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSPAMD_REJECT", "mark")
    salmon.handle(".*")
    [(code, _)] = sent(salmon, plugins, (HAM + GTUBE, "127.0.0.2"))
    assert code == 250
    assert spam_fields(salmon.handled[0].Data)["X-Spam"] == "Yes"


def test_a_score_that_would_have_it_greylisted_defers_nothing_for_ever(
    salmon: Salmon, plugins: Plugins, caplog: pytest.LogCaptureFixture
) -> None:
    """This rspamd has no Redis, and says the same each time."""
    caplog.set_level("INFO")
    salmon.handle(".*")
    odd = HEADER.replace(b"To: b@example.org\r\n", b"").partition(b"Message-ID")[0] + BODY
    [(code, _)] = sent(salmon, plugins, (odd, "127.0.0.2"))
    assert "from='ann@example.net' action='greylist' score=4." in caplog.text
    assert code == 250
    assert spam_fields(salmon.handled[0].Data)["X-Spam"] == "No"


class Forwarded(Agent):
    """Collects one message, and knows where the provider has it from."""

    protocol = "forwarded"
    Settings = AgentSettings
    envelope: Envelope

    @property
    def address(self) -> str:
        return "here"

    @property
    def domains(self) -> tuple[str, ...]:
        return ("example.org",)

    async def collect(self, collection: Collection) -> Outcome:
        [reply] = await collection.deliver(self.envelope, HAM)
        assert reply.positive, reply
        return Outcome.COLLECTED


class Forwards:
    @hookimpl
    def register_agent_types(self, register: Callable[[type[Agent]], None]) -> None:
        register(Forwarded)


@pytest.mark.parametrize(
    ("address", "sender", "spf"),
    [
        ("192.0.2.25", "ann@example.net", "R_SPF_ALLOW"),
        ("2001:db8::25", "ann@example.net", "R_SPF_ALLOW"),
        ("192.0.2.99", "ann@example.net", "R_SPF_FAIL"),
        ("192.0.2.25", "gr\u00fc\u00dfe@b\u00fccher.example", "R_SPF_ALLOW"),
        ("192.0.2.99", "gr\u00fc\u00dfe@b\u00fccher.example", "R_SPF_FAIL"),
    ],
)
def test_spf_is_that_of_the_original_client_of_collected_mail(
    salmon: Salmon, plugins: Plugins, address: str, sender: str, spf: str
) -> None:
    salmon.handle(".*")
    plugins.register(Forwards())
    client = Client(address, 4711, protocol="ESMTP", helo="mx.example.net", ident="4bXk")
    Forwarded.envelope = Envelope(sender, ("b@example.org",), client=client)

    async def main() -> Outcome:
        valid = configuration({"name": "one", "protocol": "forwarded"}, plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            [report] = await collector.collect(valid.agents)
        return report.outcome

    assert asyncio.run(main()) is Outcome.COLLECTED
    found = symbols(salmon.handled[0].Data)
    assert {one for one in found if one.startswith("R_SPF")} == {spf}
    assert "BROKEN_HEADERS" not in found


def test_the_provider_is_not_the_client_of_what_is_collected(
    salmon: Salmon, plugins: Plugins
) -> None:
    """Without a client there is no SPF, unless the provider has written where it has it from."""
    salmon.handle(".*")
    trace = (
        b"Received: from mx.example.net ([192.0.2.%d])\r\n\tby mx.example.com with ESMTP id 1;\r\n"
    )
    trace += b"\tMon, 02 Nov 2026 09:30:00 +0100\r\n"
    for data in (HAM, trace % 25 + HAM, trace % 99 + HAM):
        [heard], _ = exchange(salmon, "b@example.org", data=data, plugins=plugins)
        assert heard.startswith("250 ")
    spf = [
        {one for one in symbols(message.Data) if "SPF" in one and one != "VIOLATED_DIRECT_SPF"}
        for message in salmon.handled
    ]
    assert spf == [set(), {"R_SPF_ALLOW"}, {"R_SPF_FAIL"}]


def test_the_line_that_our_provider_writes_tells_the_client_of_what_was_held(
    salmon: Salmon, plugins: Plugins
) -> None:
    salmon.handle(".*")

    async def work(here: World) -> None:
        for source in ("127.0.0.2", "127.0.0.3"):
            await asyncio.to_thread(send, here.mx, HAM, source)
        valid = configuration(agent_keys(here.odmr), plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            [report] = await collector.collect(valid.agents)
        assert (report.outcome, report.messages) == (Outcome.COLLECTED, 2)

    in_the_world(salmon, work)
    allowed, forbidden = (symbols(message.Data) for message in salmon.handled)
    assert "R_SPF_ALLOW" in allowed and "R_SPF_FAIL" in forbidden


def test_behind_a_provider_the_sender_hears_the_filter_at_home(
    salmon: Salmon, plugins: Plugins
) -> None:
    """The message comes live, and rspamd is told of the host that the provider has it from."""
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        port = ends.provider.mx
        said = [
            await asyncio.to_thread(send, port, data, source)
            for data, source in (
                (HAM + GTUBE, "127.0.0.2"),
                (HAM, "127.0.0.2"),
                (HAM + b"PS\r\n", "127.0.0.3"),
            )
        ]
        assert said[0] == (550, "5.7.1 Gtube pattern")
        assert [code for code, _ in said[1:]] == [250, 250] and ends.held == 0
        allowed, forbidden = (message.Data for message in salmon.handled)
        assert "R_SPF_ALLOW" in symbols(allowed) and "R_SPF_FAIL" in symbols(forbidden)

    both_ends(salmon, work, plugins=plugins)
    assert salmon.relayed == []


# -- at the provider -------------------------------------------------------------------------------


def test_the_intake_refuses_and_marks_before_mail_is_held(salmon: Salmon, plugins: Plugins) -> None:
    async def work(here: World) -> None:
        for data, source in ((HAM, "127.0.0.2"), (HAM, "127.0.0.3"), (HAM + SPAM, "127.0.0.2")):
            code, text = await asyncio.to_thread(send, here.mx, data, source)
            assert (code, text[:13]) == (250, "2.6.0 held as")
        refused = await asyncio.to_thread(send, here.mx, HAM + GTUBE)
        assert refused == (550, "5.7.1 Gtube pattern")
        ham, forged, spam = map(here.data, here.held())
        assert spam_fields(ham)["X-Spam"] == "No" and "R_SPF_ALLOW" in symbols(ham)
        assert "R_SPF_FAIL" in symbols(forged)
        assert spam_fields(spam)["X-Spam"] == "Yes"
        assert all(one.endswith(b"See you there!\r\n") for one in (ham, forged))

    in_the_world(salmon, work, plugins=plugins)


# -- without rspamd --------------------------------------------------------------------------------


@pytest.mark.parametrize(("unreachable", "code"), [("defer", 451), ("accept", 250)])
def test_a_message_that_comes_while_rspamd_is_down(
    salmon: Salmon,
    chroot: Callable[[str], Path],
    plugins: Plugins,
    monkeypatch: pytest.MonkeyPatch,
    unreachable: str,
    code: int,
) -> None:
    salmon.handle(".*")
    monkeypatch.setenv("RSPAMD_UNREACHABLE", unreachable)

    async def main() -> None:
        async with listener(salmon, plugins=plugins) as one:
            with Rspamd(chroot("rspamd")) as server:
                monkeypatch.setenv("RSPAMD_URL", server.url)
                assert (await asyncio.to_thread(send, one.port, HAM))[0] == 250
            answer, _ = await asyncio.to_thread(send, one.port, HAM + b"PS\r\n")
            assert answer == code

    asyncio.run(main())
    found = [spam_fields(message.Data)["X-Spam"] for message in salmon.handled]
    assert found == ["No"] + (["Unknown"] if code == 250 else [])
