"""A server with several addresses, some of them dead."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.collecting import collect
from support.configuration import agent_keys
from support.dialogue import no_more_mail, scripted
from support.processes import LONG
from support.salmon import Salmon

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.net.outcome import Outcome

real = socket.getaddrinfo


@contextlib.contextmanager
def silent(address: str) -> Iterator[int]:
    """A port that answers no call: the queue of those that wait is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind((address, 0))
        listener.listen(0)
        for _ in range(8):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def addresses_are(monkeypatch: pytest.MonkeyPatch, *where: tuple[str, int]) -> None:
    def found(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        if host != "odmr.example.net":
            return real(host, port, *rest, **more)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", one) for one in where]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def collected(salmon: Salmon, port: int, **keys: Any) -> Report:
    async def main() -> Report:
        keys_of_agent = agent_keys(port, server="odmr.example.net", **keys)
        [report] = await collect(salmon, keys_of_agent)
        return report

    return asyncio.run(main())


@pytest.mark.parametrize("dead", ["silent", "closed"])
def test_an_address_that_is_dead_does_not_hold_up_the_other(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, dead: str
) -> None:
    async def main(port: int) -> Report:
        async with scripted(no_more_mail) as alive:
            addresses_are(monkeypatch, ("127.0.0.2", port), ("127.0.0.1", alive))
            keys = agent_keys(alive, server="odmr.example.net", timeout=LONG)
            [report] = await collect(salmon, keys)
        return report

    began = time.monotonic()
    with silent("127.0.0.2") as port:
        report = asyncio.run(main(port if dead == "silent" else 1))
    assert report.outcome is Outcome.NO_MAIL
    assert time.monotonic() - began < LONG / 2


def test_each_address_has_the_timeout_for_itself_and_its_own_reason(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with silent("127.0.0.2") as port, silent("127.0.0.3") as other:
        addresses_are(monkeypatch, ("127.0.0.2", port), ("127.0.0.3", other), ("127.0.0.4", 1))
        report = collected(salmon, 366, timeout=0.6)
    assert report.outcome is Outcome.FAILED and report.error is not None
    assert 0.6 < report.seconds < LONG
    for words in (
        "connecting to odmr.example.net:366: ",
        "127.0.0.2: no connection in 0.6 seconds",
        "127.0.0.3: no connection in 0.6 seconds",
        "127.0.0.4: Connection refused",
    ):
        assert words in report.error
    assert report.error.count("does a firewall drop the packets?") == 1
    assert report.error.count("is it running, is the port right?") == 1


def test_a_name_that_is_not_there_names_the_key(salmon: Salmon) -> None:
    async def main() -> Report:
        [report] = await collect(salmon, agent_keys(366, server="odmr.invalid"))
        return report

    report = asyncio.run(main())
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "check server" in report.error
