"""Sessions that end in another order than the RFC's, or twice, or not at all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue, Script, no_more_mail, scripted
from support.holding import Holding
from support.messages import MESSAGE
from support.processes import KillableProcess
from support.salmon import Salmon, waits_for
from support.tls import CERTIFICATE, server_tls

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.smtp.envelope import Envelope

ENVELOPE = (b"MAIL FROM:<a@example.net>", b"RCPT TO:<b@example.org>")
DATA = b"BDAT %d LAST\r\n%b" % (len(MESSAGE), MESSAGE)


def run(salmon: Salmon, *scripts: Script, collections: int = 1) -> list[Report]:
    """Collect from a provider with these scripts, so many times with one memory."""

    async def main() -> list[Report]:
        async with scripted(*scripts) as port:
            plugins = Plugins.load()
            valid = configuration(agent_keys(port), plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                return [(await collector.collect(valid.agents))[0] for _ in range(collections)]

    return asyncio.run(main())


def test_a_message_whose_250_was_lost_comes_again_and_is_not_handled_again(
    salmon: Salmon,
) -> None:
    salmon.handle(".*")

    async def deaf(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("250")
        provider.abort()  # as if that had not arrived

    async def again(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("250")
        assert (await provider.send(MESSAGE + b"another\r\n")).startswith("250")
        await provider.quit()

    [report] = run(salmon, deaf, again, no_more_mail)
    assert (report.outcome, report.messages, report.recipients) == (Outcome.COLLECTED, 2, 2)
    assert len(salmon.handled) == 2


def test_a_message_that_comes_again_in_the_next_collection(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def session(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("250")
        provider.abort()

    first, second = run(salmon, session, no_more_mail, session, no_more_mail, collections=2)
    assert (first.outcome, first.messages) == (Outcome.COLLECTED, 1)
    assert (second.outcome, second.messages) == (Outcome.COLLECTED, 0)
    assert len(salmon.handled) == 1


def test_quit_twice_is_answered_once(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def session(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("250")
        provider.say("QUIT", "QUIT")
        await provider.replied(221)
        await provider.silence()

    [report] = run(salmon, session, no_more_mail)
    assert (report.outcome, report.messages) == (Outcome.COLLECTED, 1)


def test_quit_behind_the_data_before_its_answer(salmon: Salmon) -> None:
    """RFC 2920: the answers come in order, that to the data first, and only when it is safe."""
    quitted = threading.Event()
    salmon.handle(".*", waits_for(quitted))

    async def session(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say(*ENVELOPE, DATA + b"QUIT")
        await provider.replied(250)
        await provider.replied(250)
        quitted.set()
        await provider.replied(250)
        await provider.replied(221)
        await provider.silence()

    [report] = run(salmon, session, no_more_mail)
    assert (report.outcome, report.messages) == (Outcome.COLLECTED, 1)
    assert len(salmon.handled) == 1


def test_two_messages_and_quit_in_one_write(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def session(provider: Dialogue) -> None:
        await provider.reverse()
        other = b"BDAT 2 LAST\r\n\r\n"
        provider.say(b"\r\n".join([*ENVELOPE, DATA + ENVELOPE[0], ENVELOPE[1], other + b"QUIT"]))
        for _ in range(6):
            await provider.replied(250)
        await provider.replied(221)
        await provider.silence()

    [report] = run(salmon, session, no_more_mail)
    assert (report.outcome, report.messages) == (Outcome.COLLECTED, 2)
    assert len(salmon.handled) == 2


@pytest.mark.parametrize("reset", [True, False])
def test_a_provider_that_does_not_wait_for_the_221(salmon: Salmon, reset: bool) -> None:
    salmon.handle(".*")

    async def session(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("250")
        provider.say("QUIT")
        if reset:
            provider.abort()

    [report] = run(salmon, session, no_more_mail)
    assert (report.outcome, report.messages, report.error) == (Outcome.COLLECTED, 1, None)


def test_a_provider_that_ends_its_side_behind_the_data_hears_the_answer(salmon: Salmon) -> None:
    ended = threading.Event()
    salmon.handle(".*", waits_for(ended))

    async def session(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say(*ENVELOPE)
        await provider.replied(250)
        await provider.replied(250)
        provider.say(DATA[:-2])  # say() adds what is missing
        provider.end()
        ended.set()
        await provider.replied(250)
        await provider.silence()

    [report] = run(salmon, session, no_more_mail)
    assert (report.outcome, report.messages) == (Outcome.COLLECTED, 1)
    assert len(salmon.handled) == 1


def test_a_provider_that_ends_its_side_within_the_data(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def session(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say(*ENVELOPE)
        await provider.replied(250)
        await provider.replied(250)
        provider.say(DATA[:-4])
        provider.end()
        await provider.hear(LAST_WORDS)
        await provider.silence()

    [report] = run(salmon, session)
    assert (report.outcome, report.messages) == (Outcome.FAILED, 0)
    assert salmon.handled == []


def test_a_provider_that_dies_before_it_has_struck_the_message_off(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 250 has arrived, and the crash comes before it is settled: it comes again."""
    salmon.handle(".*")

    def crash(self: EmbeddedStore, *arguments: object) -> None:
        raise OSError("it has crashed")

    async def main() -> None:
        plugins = Plugins.load()

        async def collection(held: Holding) -> Report:
            provider = held.provider()
            await provider.start()
            valid = configuration(agent_keys(provider.port, server="127.0.0.1"), plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                [report] = await collector.collect(valid.agents)
            await provider.stop(grace=0.1)
            held.close()
            return report

        held = Holding(salmon.folder / "provider")
        held.put(Envelope("a@example.net", ("a@example.org", "b@example.org")), MESSAGE)
        with monkeypatch.context() as patch:
            patch.setattr(EmbeddedStore, "settle", crash)
            first = await collection(held)
        assert (first.outcome, first.messages) == (Outcome.COLLECTED, 1)
        held = Holding(salmon.folder / "provider")
        assert len(held) == 1
        second = await collection(held)
        assert (second.outcome, second.messages) == (Outcome.COLLECTED, 0)
        held = Holding(salmon.folder / "provider")
        assert len(held) == 0
        held.close()

    asyncio.run(main())
    assert sorted(message.To for message in salmon.handled) == ["a@example.org", "b@example.org"]


# -- Exim takes the end of a connection after the replies to its RCPTs for success ----------------

BEGUN = {
    "after RCPT": ENVELOPE,
    "within DATA": (*ENVELOPE, b"DATA\r\nSubject: hi"),
    "within BDAT": (*ENVELOPE, b"BDAT 100 LAST\r\nSubject: hi"),
    "between BDATs": (*ENVELOPE, b"BDAT 3\r\nx"),
}
LAST_WORDS = "421 4.3.2 mail.example.org has ended this session; send the mail again"

in_the_clear = pytest.mark.parametrize("begun", BEGUN.values(), ids=BEGUN)


async def begin(provider: Dialogue, begun: tuple[bytes, ...]) -> None:
    """Say this, and wait until it has been read."""
    await provider.reverse()
    provider.say(*begun)
    await provider.replied(250)
    await provider.replied(250)
    if len(begun) > 2 and begun[2] != b"BDAT 100 LAST\r\nSubject: hi":
        await provider.hear("354" if b"DATA" in begun[2] else "250")


async def ends_in_words(provider: Dialogue) -> None:
    """The last words arrive whatever is on its way to those who said them, they answer each command
    after that, and the end comes after QUIT."""
    provider.writer.write(b"more of the message, which no one reads\r\n" * 10_000)
    await provider.hear(LAST_WORDS)
    provider.say("QUIT")
    rest = (await asyncio.wait_for(provider.reader.read(), 60)).decode()
    assert set(rest.splitlines()) == {LAST_WORDS}


async def is_reset(provider: Dialogue) -> None:
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(provider.reader.read(), 60)


Killing = Callable[[Dialogue, KillableProcess], Awaitable[None]]


def run_to_be_killed(salmon: Salmon, script: Killing, **keys: str) -> None:
    """Collect in a process that the script kills."""
    customers: list[KillableProcess] = []

    async def main() -> None:
        tls = server_tls() if keys else None

        async def with_customer(provider: Dialogue) -> None:
            await script(provider, customers[0])

        async with scripted(with_customer, tls=tls) as port:
            customers.append(KillableProcess(salmon.folder, agent_keys(port, **keys), "router"))
            assert await asyncio.to_thread(customers[0].run, "collect") == -9
            customers[0].close()

    asyncio.run(main())


@in_the_clear
def test_a_process_that_is_killed_within_a_message_ends_the_session_in_words(
    salmon: Salmon, begun: tuple[bytes, ...]
) -> None:
    async def script(provider: Dialogue, customer: KillableProcess) -> None:
        await begin(provider, begun)
        customer.kill()
        await ends_in_words(provider)

    run_to_be_killed(salmon, script)


def test_a_process_that_is_killed_within_a_message_under_tls_resets_the_connection(
    salmon: Salmon,
) -> None:
    async def script(provider: Dialogue, customer: KillableProcess) -> None:
        await begin(provider, BEGUN["within DATA"])
        customer.kill()
        await is_reset(provider)

    run_to_be_killed(salmon, script, tls="implicit", ca_file=str(CERTIFICATE))


@in_the_clear
def test_a_session_that_is_dropped_within_a_message_ends_in_words(
    salmon: Salmon, begun: tuple[bytes, ...]
) -> None:
    collections: list[asyncio.Task[list[Report]]] = []

    async def script(provider: Dialogue) -> None:
        await begin(provider, begun)
        collections[0].cancel()
        await ends_in_words(provider)

    async def main() -> None:
        async with scripted(script) as port:
            plugins = Plugins.load()
            valid = configuration(agent_keys(port), plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                collections.append(asyncio.create_task(collector.collect(valid.agents)))
                await asyncio.wait(collections, timeout=20)

    asyncio.run(main())


def test_a_provider_that_ends_its_side_within_a_transaction_hears_last_words(
    salmon: Salmon,
) -> None:
    async def script(provider: Dialogue) -> None:
        await begin(provider, ENVELOPE)
        provider.end()
        await provider.hear(LAST_WORDS)
        await provider.silence()

    [report] = run(salmon, script)
    assert report.outcome is Outcome.FAILED
