"""Places on a listening service: strangers lock out neither those we expect nor each other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from support.configuration import configuration, etrn_keys
from support.dialogue import Dialogue
from support.listener import listener
from support.salmon import Salmon

from salmon_revsmtp.net import places
from salmon_revsmtp.net.expected import Expected
from salmon_revsmtp.net.places import Places
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector


class Peer:
    """A connection, as far as places know it."""

    def __init__(self, address: str, since: float | None = 0.0, boundary: bool = True) -> None:
        self.peer = (address, 1)
        self.waits_since, self.at_boundary = since, boundary
        self.heard = ""

    def send_away(self, reply: object) -> None:
        self.heard = str(reply)

    def slower_than(self, rate: int, after: float) -> bool:
        return self.waits_since == 0.0


def at(now: float, work: Callable[[], None]) -> None:
    """Run ``work`` when the event loop's clock shows this."""
    loop = asyncio.new_event_loop()
    loop.time = lambda: now  # type: ignore[method-assign]

    async def main() -> None:
        work()

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def admit(some: Places, *peers: Peer) -> list[str]:
    """For each: "", or the code that it hears."""
    return [str(some.admit(cast(Any, one)) or "")[:3] for one in peers]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("192.0.2.1", "192.0.2.254", True),
        ("192.0.2.1", "::ffff:192.0.2.9", True),
        ("192.0.2.1", "192.0.3.1", False),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::1", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_a_network_is_what_one_owner_has(first: str, second: str, same: bool) -> None:
    def work() -> None:
        some = Places(10, 1)
        assert admit(some, Peer(first), Peer(second)) == ["", "421" if same else ""]

    at(1.0, work)


def test_of_the_largest_crowd_the_one_that_is_idle_longest_gives_way() -> None:
    def work() -> None:
        crowd = [Peer(f"192.0.2.{number}", since=5.0 - number) for number in range(5)]
        others = [Peer(f"198.51.{number}.1", since=0.0) for number in range(5)]
        some = Places(10, 5)
        assert set(admit(some, *crowd, *others)) == {""}
        assert admit(some, Peer("203.0.113.1")) == [""]
        assert [one.heard[:3] for one in crowd] == ["", "", "", "", "421"]
        assert len(some) == 10

    at(5.0, work)


@pytest.mark.parametrize(("since", "boundary"), [(None, True), (95.0, True), (50.0, False)])
def test_who_is_at_work_gives_way_to_no_stranger(since: float | None, boundary: bool) -> None:
    def work() -> None:
        some = Places(2, 2)
        admit(some, Peer("192.0.2.1", since, boundary), Peer("198.51.100.1", since, boundary))
        assert admit(some, Peer("203.0.113.1")) == ["421"]

    at(100.0, work)


def test_who_stalls_within_a_transaction_gives_way() -> None:
    def work() -> None:
        stalled = Peer("192.0.2.1", since=30.0, boundary=False)
        some = Places(2, 2)
        admit(some, stalled, Peer("198.51.100.1", since=None))
        assert admit(some, Peer("203.0.113.1")) == [""]
        assert stalled.heard.startswith("421")

    at(100.0, work)


def test_for_those_that_are_expected_there_is_always_a_place() -> None:
    def work() -> None:
        some = Places(2, 2, Expected(["203.0.113.0/24"]))
        admit(some, Peer("192.0.2.1", None), Peer("198.51.100.1", None))
        assert admit(some, Peer("203.0.113.1"), Peer("203.0.113.2")) == ["", ""]
        assert admit(some, Peer("192.0.2.9")) == ["421"]
        assert admit(some, Peer("203.0.113.3")) == [""], "one of its own that is idle gives way"
        assert len(some) == 4

    at(100.0, work)


def test_strangers_do_not_displace_those_that_are_expected() -> None:
    def work() -> None:
        expected = Peer("203.0.113.1", since=0.0)
        some = Places(2, 2, Expected(["203.0.113.0/24"]))
        admit(some, expected, Peer("192.0.2.1", since=99.0))
        assert admit(some, Peer("198.51.100.1")) == ["421"]
        assert expected.heard == ""

    at(100.0, work)


def test_where_memory_is_short_slow_strangers_give_way_and_no_one_else() -> None:
    def work() -> None:
        some = Places(9, 9, Expected(["203.0.113.0/24"]))
        slow, quick, expected = Peer("192.0.2.1"), Peer("192.0.2.2", 99.0), Peer("203.0.113.1")
        admit(some, slow, quick, expected)
        some.hurry()
        assert [one.heard[:9] for one in (slow, quick, expected)] == ["421 4.3.1", "", ""]
        assert len(some) == 2

    at(100.0, work)


# -- over the wire ---------------------------------------------------------------------------------


async def connection(port: int, source: str) -> Dialogue:
    return Dialogue(*await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0)))


async def crowd(port: int, *networks: int, at_work: bool = False) -> list[Dialogue]:
    """25 connections of each of these networks."""
    found = []
    for network in networks:
        for _ in range(25):
            one = await connection(port, f"127.0.{network}.1")
            await one.replied(220)
            if at_work:
                one.say("HELO x", "MAIL FROM:<>")
                await one.replied(250)
                await one.replied(250)
            found.append(one)
    return found


def over_the_wire(
    salmon: Salmon, talk: Callable[[int, list[Dialogue]], Awaitable[None]], **keys: Any
) -> None:
    salmon.handle(".*")

    async def main() -> None:
        async with listener(salmon, **keys) as one:
            others: list[Dialogue] = []
            await asyncio.wait_for(talk(one.port, others), 60)
            for other in others:
                other.abort()

    asyncio.run(main())


def test_a_hundred_idle_strangers_keep_no_one_out(salmon: Salmon) -> None:
    async def talk(port: int, others: list[Dialogue]) -> None:
        others += await crowd(port, 1, 2, 3, 4)
        newcomer = await connection(port, "127.0.9.1")
        others.append(newcomer)
        await newcomer.replied(220)
        newcomer.say("EHLO x")
        await newcomer.replied(250)
        assert (await newcomer.send(b"hello")).startswith("250")
        heard = await asyncio.wait_for(
            asyncio.wait(
                [asyncio.ensure_future(one.reader.read(4)) for one in others[:100]],
                return_when=asyncio.FIRST_COMPLETED,
            ),
            20,
        )
        assert [task.result() for task in heard[0]] == [b"421 "]
        for task in heard[1]:
            task.cancel()

    over_the_wire(salmon, talk)
    assert len(salmon.handled) == 1


def test_a_hundred_strangers_at_work_keep_no_one_out_that_is_expected(salmon: Salmon) -> None:
    async def talk(port: int, others: list[Dialogue]) -> None:
        others += await crowd(port, 1, 2, 3, 4, at_work=True)
        for source, code in (("127.0.8.1", 421), ("127.0.9.1", 220), ("127.0.9.1", 220)):
            others.append(await connection(port, source))
            await others[-1].replied(code)
        others[-1].say("EHLO x")
        await others[-1].replied(250)
        assert (await others[-1].send(b"hello")).startswith("250")

    over_the_wire(salmon, talk, keep_places_for=["127.0.9.0/24"])
    assert len(salmon.handled) == 1


def test_an_agents_server_has_a_place_also_where_strangers_have_its_address(
    salmon: Salmon,
) -> None:
    """Those of its own address that are idle give way to it at once."""

    async def main() -> None:
        plugins = Plugins.load()
        keys = {"listen": "127.0.0.1:0", "max_connections": 4, "hostname": "h"}
        agent = {**etrn_keys(25, "example.org"), "server": "localhost"}
        valid = configuration(agent, default=keys, plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            [one] = await collector.listeners()
            await one.start()
            expected = collector.services["default"].expected
            for _ in range(1000):  # until localhost has been looked up
                if "127.0.0.1" in expected:
                    break
                await asyncio.sleep(0.01)
            idle = [await connection(one.port, "127.0.0.1") for _ in range(10)]
            idle += [await connection(one.port, f"127.0.{number}.1") for number in range(1, 10)]
            for stranger in idle:
                await stranger.hear()
            server = await connection(one.port, "127.0.0.1")
            await server.replied(220)
            for client in (*idle, server):
                client.abort()
            await one.stop(5)

    asyncio.run(main())


def test_whom_an_agent_has_just_talked_to_is_expected() -> None:
    expected = Expected()
    expected.meet("::ffff:192.0.2.1")
    assert "192.0.2.1" in expected and "192.0.2.2" not in expected
    for number in range(100):
        expected.meet(f"198.51.100.{number}")
    assert "198.51.100.99" in expected and "192.0.2.1" not in expected


def test_of_one_network_an_idle_connection_gives_way_after_a_while(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(port: int, others: list[Dialogue]) -> None:
        others += await crowd(port, 1)
        others.append(await connection(port, "127.0.1.9"))
        await others[-1].replied(421)
        monkeypatch.setattr(places, "IDLE", 0.0)
        others.append(await connection(port, "127.0.1.9"))
        await others[-1].replied(220)
        await others[0].hear("421 4.7.0 idle")
        await others[0].silence()

    over_the_wire(salmon, talk)


def test_a_client_that_is_denied_takes_no_place(salmon: Salmon) -> None:
    async def talk(port: int, others: list[Dialogue]) -> None:
        others.append(await connection(port, "127.0.1.1"))
        await others[-1].replied(220)
        others.append(await connection(port, "127.0.2.1"))
        await others[-1].replied(554)
        others[0].say("NOOP")
        await others[0].replied(250)

    over_the_wire(salmon, talk, max_connections=1, deny=["127.0.2.0/24"])
