"""The provider's disk is full while home is there: what goes through needs none of it, and what
would have to be held stays with its sender."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from salmon.mail import MailRequest
from salmon.server import SMTPError
from support.disk import Disk, small_disk
from support.ends import PATIENCE, Ends, both_ends, message
from support.salmon import Salmon
from support.senders import Mail, send_until_heard

from salmon_revsmtp import Reply

MIB = 1024 * 1024


@pytest.fixture
def disk(salmon: Salmon) -> Iterator[Disk]:
    """Where the provider holds its mail; home's journal and all else is elsewhere."""
    (salmon.folder / "held").mkdir()
    with small_disk(salmon.folder / "held", 2 * MIB) as mounted:
        yield mounted


PROVIDER = {"hold": "held/hold"}


def no_litter(disk: Disk) -> bool:
    """Nothing is left of what could not be held."""
    return not [*disk.folder.glob("hold/tmp/*"), *disk.folder.glob("hold/bodies/*")]


def test_small_messages_go_through_a_full_disk(salmon: Salmon, disk: Disk) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        disk.fill()
        for number in range(5):
            heard = await ends.send(message(f"{number}", 20_000), "b", "c")
            assert [str(reply) for reply in heard] == [
                "250 2.1.5 recipient ok",
                "250 2.1.5 recipient ok",
                "250 2.0.0 delivered",
            ]
        assert ends.handled == [f"{number}" for number in range(5) for _ in range(2)]

    both_ends(salmon, work, provider=PROVIDER)


def test_what_has_to_be_held_stays_with_its_sender(salmon: Salmon, disk: Disk) -> None:
    """Home defers one of two recipients, and then takes it."""
    deferred: list[str] = []

    def later(message: MailRequest) -> None:
        if str(message.To).startswith("later") and len(deferred) < 3:
            deferred.append(str(message.To))
            raise SMTPError(451, "4.3.0 later")

    salmon.handle(".*", later)

    async def work(ends: Ends) -> None:
        await ends.open()
        disk.fill()
        heard: list[tuple[str, int]] = []
        mail = Mail(message("one"), ("b@example.org", "later@example.org"), prdr=True)

        async def again() -> None:
            heard.append(("again", 0))
            assert not ends.held

        def note(recipient: str, reply: Reply) -> None:
            heard.append((recipient, reply.code))

        said = await send_until_heard(ends.way_in.port, mail, heard=note, again=again)
        assert {str(reply) for reply in said.values()} == {"250 2.0.0 delivered"}
        assert heard == [
            ("b@example.org", 250),
            *[("again", 0)] * 3,
            ("later@example.org", 250),
        ]

    both_ends(salmon, work, provider=PROVIDER)
    handled = [str(one.To) for one in salmon.handled]
    assert handled.count("b@example.org") == 1 and handled.count("later@example.org") == 4
    assert no_litter(disk) and salmon.relayed == []


def test_a_sender_hears_452_and_its_message_is_handled_once(salmon: Salmon, disk: Disk) -> None:
    """The session breaks while home is at work, and nothing can be held."""
    go, begun = threading.Event(), threading.Event()

    def slow(message: MailRequest) -> None:
        begun.set()
        go.wait(PATIENCE)

    salmon.handle(".*", slow)

    async def work(ends: Ends) -> None:
        session = await ends.open()
        disk.fill()
        data = message("one")
        sending = asyncio.ensure_future(ends.send(data))
        assert await asyncio.to_thread(begun.wait, PATIENCE)
        session.abort("the test breaks it")
        assert [reply.code for reply in await sending] == [250, 452]
        assert not ends.held
        go.set()
        await ends.until(lambda: session not in ends.sessions)
        await ends.open()
        assert str((await ends.send(data))[-1]) == "250 2.0.0 delivered"
        assert ends.handled == ["one"]

    both_ends(salmon, work, provider=PROVIDER, agent={"every": 0.0005})
    assert no_litter(disk) and salmon.relayed == []


def test_a_large_message_waits_for_room(salmon: Salmon, disk: Disk) -> None:
    """It goes by a file, whether or not home is there."""
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        disk.fill()
        data = message("large", 1_300_000)
        for _ in range(2):
            assert [reply.code for reply in await ends.send(data)] == [250, 452]
            assert no_litter(disk) and ends.handled == []
        disk.empty()
        assert str((await ends.send(data))[-1]) == "250 2.0.0 delivered"
        assert ends.handled == ["large"]

    both_ends(salmon, work, provider=PROVIDER)
